"""The calls of the self-test of transports, and their correct results."""

import functools
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist

from ..quantise import Quantise
from ..site import WITHOUT_NORM, Site, add_norm
from ..wording import count
from .symmetric.tuning import LEAST_ROWS, by_rule

_TOLERANCES = {torch.bfloat16: 0.02, torch.float16: 0.003, torch.float32: 1e-4}
_COARSE = {"8": 0.05, "6": 0.5, "4": 0.5}  # bits of a wire -> by how much it rounds
_FP8_OF_ROWS = Quantise("fp8", True, most=448.0, low=-448.0, high=448.0)
_TEST_HIDDEN = 512
_TEST_REPEATS = 10


def chains(group: dist.ProcessGroup, device: torch.device) -> list["Chain"]:
    """The chains of the self-test: with both norms, and with sizes around each at which another kernel or workspace begins."""
    switch = by_rule(group.size()).one_shot_rows
    sizes = sorted({1, 5, switch, switch + 1, LEAST_ROWS - 1, LEAST_ROWS, LEAST_ROWS + 1, 2 * LEAST_ROWS + 1} - {0})
    two = 5, LEAST_ROWS + 1
    return [Chain(group, device, dtype, center, rows, quantise) for dtype, center, some, quantise in (
        (torch.bfloat16, False, sizes, None), (torch.bfloat16, True, two, None), (torch.float16, False, two, None),
        (torch.float32, False, two, None), (torch.bfloat16, False, two, _FP8_OF_ROWS),
    ) for rows in some]  # fmt: skip


def difference(transport: Any, given: list["Chain"], group: dist.ProcessGroup) -> str:
    """How a transport's results differ from the process group's on this rank; '' if they do not.

    It calls sites as the passes do: with a sharded residual and with a whole one, behind GEMMs and alone, woven and fused, with all
    arguments that a norm can have; and many in a row. All calls come before all comparisons, so that no rank waits in a kernel for a rank
    that has found a difference.
    """
    for chain in given:
        chain.reduce(group)
    with transport.call():
        for chain in given:
            chain.run(transport)
        for _ in range(_TEST_REPEATS):
            for chain in given[::4]:
                chain.fuse(transport, 2)
    coarse = _COARSE.get(transport.name.partition(":")[2], 0.0)
    return next((difference for chain in given if (difference := chain.difference(coarse))), "")


class Chain:
    """Sites in a row, and their correct results. x of the second site is the output of a GEMM. quantise: of all norms but the last"""

    def __init__(
        self,
        group: dist.ProcessGroup,
        device: torch.device,
        dtype: torch.dtype,
        center: bool,
        rows: int,
        quantise: Quantise | None,
    ) -> None:
        self.dtype, self.center, self.rows, self.quantise = dtype, center, rows, quantise
        self.outputs = ["", *([quantise.output] if quantise else [])]
        everybodys, own = (torch.Generator().manual_seed(seed) for seed in (0, 1 + group.rank()))
        draw = lambda generator, *shape: torch.randn(*shape, generator=generator).to(device, dtype)  # noqa: E731
        self.a, self.b = draw(own, rows, 64), draw(own, 64, _TEST_HIDDEN) / 8
        self.xs = [draw(own, rows, _TEST_HIDDEN), self.a @ self.b, draw(own, rows, _TEST_HIDDEN)]
        self.residual = draw(everybodys, rows, _TEST_HIDDEN)
        vector = functools.partial(draw, everybodys, _TEST_HIDDEN)
        # The arguments of the first three sites: a weight in float32 only; everything; a weight only.
        none, shift = (None, 1e-5, 1.0, 0.0, center), vector() if center else None
        self.numerics: tuple[tuple, ...] = (
            (vector().float(), None, *none), (vector(), vector(), shift, 1e-6, 0.5, 1.0, center), (vector(), None, *none)
        )  # fmt: skip
        if not center:  # a site without a norm
            self.xs.append(draw(own, rows, _TEST_HIDDEN))
            self.numerics += ((None, None, None, WITHOUT_NORM, 1.0, 0.0, False),)
        self.got: list[tuple[int, torch.Tensor]] = []
        self.right: list[torch.Tensor] = []

    def reduce(self, group: dist.ProcessGroup) -> None:
        """Compute the correct results with the process group."""
        residual = self.residual
        for x, numerics in zip(self.xs, self.numerics):
            total = x.to(torch.float32, copy=True)
            dist.all_reduce(total, group=group)
            norm, residual = add_norm(total, residual, *numerics)
            self.right.append(norm)
        self.right.append(residual)

    def run(self, transport: Any) -> None:
        self.fuse(transport, 2)
        chains = [self._weave(transport, slot) for slot in range(2)]
        for _ in range(1 + len(self.xs)):  # sites of both slots are in flight
            for chain in chains:
                next(chain, None)

    def fuse(self, transport: Any, slot: int) -> None:
        residual = self.residual
        for number in range(len(self.xs)):
            norm, residual = _values(*transport.fused(self._site(transport, residual, slot, number), False))
            self.got.append((number, norm))
        self.got.append((len(self.xs), residual))

    def _weave(self, transport: Any, slot: int) -> Iterator[None]:
        residual = self.residual
        for number in range(len(self.xs)):
            transport.start(self._site(transport, residual, slot, number))
            yield
            norm, residual = _values(*transport.wait(slot, True))
            self.got.append((number, norm.clone()))
        self.got.append((len(self.xs), residual))

    def _site(self, transport: Any, residual: torch.Tensor, slot: int, number: int) -> Site:
        x = transport.linear(self.a, self.b, None, slot) if number == 1 else self.xs[number]
        carries = number < len(self.xs) - 1  # a float32, sharded residual to the next site
        quantise = str(self.quantise) if self.quantise and carries else ""
        given: tuple[Any, ...] = x, residual, *self.numerics[number], 0, slot, number, carries, carries, quantise
        return Site(*given)

    def difference(self, coarse: float) -> str | None:
        """How the results differ from the correct ones; None if they do not. A single wrong value is a difference.

        coarse: by how much the wire rounds
        """
        tolerance = max(_TOLERANCES[self.dtype], coarse, 2.0**-4 if self.quantise else 0.0)
        for number, ours in self.got:
            right = self.right[number]
            error = ((ours.float() - right).abs() / (right.abs() + 4)).max().item()
            if not error < tolerance:
                what = "residual" if number == len(self.xs) else "quantised norm" if self.quantise else "norm"
                return f"the {what} of {count(self.rows, 'token')} in {self.dtype} is off by {error:.1e}"
        return None


def _values(norm: torch.Tensor, residual: torch.Tensor, *quantised: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(the norm, also where a site has quantised it; the residual)"""
    return (quantised[0].float() * quantised[1] if quantised else norm), residual
