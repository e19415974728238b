"""The operands of the GEMMs that autotuning runs, other than ``mm``: an op with its shapes, dtypes, strides and constants, as plain data.

    ("gemm", "aten::_scaled_mm", columns, (argument, ...))

An argument is ("tensor", dtype, shape, order), ("list", argument, ...), ("dtype", name) or ("constant", value). The first one is the rows.
In a shape, -n stands for one entry for n tokens. order: the dimensions, that with the largest stride first.
"""

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def channels_of(gemm: tuple) -> int:
    """The number of channels of a GEMM's input."""
    _, _, _, ((_, _, shape, _), *_) = gemm
    return shape[-1]


def bytes_of(gemm: tuple, tokens: int) -> int:
    """The size of the operands of a GEMM."""
    return sum(math.prod(_shape(shape, tokens)) * getattr(torch, dtype).itemsize for dtype, shape, _ in _tensors(gemm[3]))


class Gemm:
    """A GEMM with its operands: ``gemm(tokens)`` returns its product, and ``gemm(tokens, out)`` writes it there, with any dtype.

    The operands are for up to ``most`` tokens. Rows and weights are random, as GEMMs of zeros take less power and so are faster; scales
    are ones. draw(n) returns n random numbers.
    """

    def __init__(self, gemm: tuple, most: int, draw: Callable[[int], Tensor]) -> None:
        _, name, _, (rows, *others) = gemm
        namespace, name = name.split("::")
        self.op, self.draw = getattr(getattr(torch.ops, namespace), name), draw
        made = functools.partial(self._made, most)
        self.arguments = [made(rows, True), *map(made, others)]

    def __call__(self, tokens: int, out: Tensor | None = None) -> Tensor:
        given = [argument(tokens) for argument in self.arguments]
        dtype = next((a for a in given if isinstance(a, torch.dtype)), None)
        if out is not None and dtype == out.dtype and hasattr(self.op, "out"):
            return self.op.out(*given, out=out)
        product = self.op.default(*given)
        # A kernel behind the GEMM reads its product, and writes what is reduced.
        return product if out is None else out.copy_(product)

    def _made(self, most: int, argument: tuple, rows: bool = False) -> Callable[[int], Any]:
        """A function of the number of tokens that returns the argument."""
        kind, *about = argument
        if kind == "list":
            items = [self._made(most, item) for item in about]
            return lambda tokens: [item(tokens) for item in items]
        if kind == "tensor":
            dtype, shape, order = about
            flat = self._values(getattr(torch, dtype), math.prod(_shape(shape, most)), rows)
            return lambda tokens: _strided(flat, _shape(shape, tokens), order)
        constant = getattr(torch, about[0]) if kind == "dtype" else about[0]
        return lambda tokens: constant

    def _values(self, dtype: torch.dtype, n: int, rows: bool) -> Tensor:
        device, name = self.draw(0).device, str(dtype)
        if (rows and dtype.is_floating_point) or "float8_e4" in name or "float8_e5" in name:
            return self.draw(n).to(dtype)
        if dtype.is_floating_point and "float4" not in name:
            return torch.ones(n, device=device).to(dtype)
        whole = torch.uint8 if dtype.is_floating_point else dtype  # all bits of a float4 are a number
        limits = torch.iinfo(whole)
        return torch.randint(limits.min, limits.max, (n,), dtype=whole, device=device).view(dtype)


def ends(device: torch.device, experts: int, rows: int, skewed: bool) -> Tensor:
    """Where the rows of each expert end: all have as many; or skewed, the expert i has as many as 1 / (i + 1) of the first one's."""
    shares = [1 / (i + 1) if skewed else 1.0 for i in range(experts)]
    ends = [round(rows * part / sum(shares)) for part in itertools.accumulate(shares)]
    return torch.tensor(ends, dtype=torch.int32, device=device)


def _tensors(arguments: Sequence[tuple]) -> list[tuple]:
    found = []
    for kind, *about in arguments:
        found += [tuple(about)] if kind == "tensor" else _tensors(about) if kind == "list" else []
    return found


def _shape(shape: Sequence[int], tokens: int) -> list[int]:
    return [size if size >= 0 else -(tokens // size) for size in shape]


def _strided(flat: Tensor, shape: Sequence[int], order: Sequence[int]) -> Tensor:
    dense = flat[: math.prod(shape)].view([shape[dim] for dim in order])
    return dense.permute([order.index(dim) for dim in range(len(shape))])
