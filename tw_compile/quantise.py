"""The quantisation that a site may end in: its arguments, and its computation in eager PyTorch, which is the specification."""

import functools
from typing import NamedTuple

import torch
from torch import Tensor

# Names of the dtypes of 8 bits -> the dtype, and its name in reports.
DTYPES = {"fp8": (torch.float8_e4m3fn, "FP8"), "int8": (torch.int8, "INT8")}

# The channels of a group that has a scale of its own, as GEMMs with scales of blocks have it.
GROUP = 128

# How a value is scaled: y / scale, y * (1 / scale) or y * scale.
DIVIDE, INVERSE, MULTIPLY = HOWS = "divide", "inverse", "multiply"


class Quantise(NamedTuple):
    """How a norm is quantised::

        scale = max(max(largest + added, least) / most, floor)     largest: the largest magnitude of the row or group, after rounding;
                                                                   if it is not above 0, ``zero``, unless that is 0
        q     = clamp(y / scale, low, high)                        rounded to the nearest, ties to even

    A scale of 0 stays 0, and its values are not divided: a row of zeros becomes zeros, not NaN.

    dtype:      "fp8" (e4m3) or "int8"
    per_token:  each row has a scale, as above, or each of its groups; otherwise one scale is given, and of the numbers only ``low`` and
                ``high`` are used
    how:        DIVIDE, INVERSE or MULTIPLY
    narrow:     each step of the scale is rounded to the dtype of the norm; otherwise it is in float32
    group:      0, or GROUP: that many neighbouring channels of a row have a scale, not the whole row; with ``per_token``
    keeps_norm: the norm comes out as well, for its other readers
    """

    dtype: str
    per_token: bool
    how: str = DIVIDE
    narrow: bool = False
    added: float = 0.0
    least: float = 0.0
    most: float = 1.0
    floor: float = 0.0
    low: float = 0.0
    high: float = 0.0
    zero: float = 0.0
    group: int = 0
    keeps_norm: bool = False

    def __str__(self) -> str:
        """As text, which ``read`` takes: as an op has it."""
        return " ".join(str(int(value) if isinstance(value, bool) else value) for value in self)

    @property
    def name(self) -> str:
        per = "tensor" if not self.per_token else f"group of {self.group}" if self.group else "token"
        return f"{DTYPES[self.dtype][1]} per {per}"

    @property
    def output(self) -> str:
        """What a kernel is compiled for: the dtype, and the size of groups; such as "fp8" and "fp8_128"."""
        return f"{self.dtype}_{self.group}" if self.group else self.dtype

    def scales(self, hidden: int) -> int:
        """The number of scales that a row of ``hidden`` channels has of its own."""
        return (hidden // self.group if self.group else 1) if self.per_token else 0


@functools.cache
def read(text: str) -> Quantise:
    """The Quantise of a text."""
    dtype, per_token, how, narrow, *numbers, group, keeps_norm = text.split()
    added, least, most, floor, low, high, zero = map(float, numbers)
    of_scale = added, least, most, floor
    return Quantise(dtype, per_token == "1", how, narrow == "1", *of_scale, low, high, zero, int(group), keeps_norm == "1")


def quantised(norm: Tensor, how: Quantise, static_scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """Quantise a norm.

    norm:         [..., H], bfloat16 or float16
    static_scale: the scale of all values, float32 with one element; not used where each row has its own
    Returns (q, [..., H] in 8 bits; scale, [..., 1] or [..., H / group] in float32, or that of all values).
    """
    if how.group:
        q, scale = quantised(norm.unflatten(-1, (norm.shape[-1] // how.group, how.group)), how._replace(group=0), None)
        return q.flatten(-2), scale.squeeze(-1)
    scale = _scale_of_rows(norm, how) if how.per_token or static_scale is None else static_scale.reshape(())
    y = norm.float()
    if how.how == MULTIPLY:
        y = y * scale
    else:
        divisor = scale.masked_fill(scale == 0, 1.0)
        y = y / divisor if how.how == DIVIDE else y * divisor.reciprocal()
    if how.dtype == "int8":
        y = y.round()
    return y.clamp(how.low, how.high).to(DTYPES[how.dtype][0]), scale


def _scale_of_rows(norm: Tensor, how: Quantise) -> Tensor:
    def rounded(value: Tensor) -> Tensor:
        return value.to(norm.dtype).float() if how.narrow else value

    largest = norm.abs().amax(-1, keepdim=True).float()
    if how.zero:
        largest = largest.where(largest > 0, how.zero)
    if how.added:
        largest = rounded(largest + how.added)
    if how.least:
        largest = rounded(largest.clamp_min(how.least))
    scale = rounded(largest / largest.new_full((), how.most))  # a tensor, as GPUs multiply by the inverse of a number
    return rounded(scale.clamp_min(how.floor)) if how.floor else scale


def results(norm: Tensor, residual: Tensor, quantise: str, static_scale: Tensor | None) -> tuple[Tensor, ...]:
    """The results of a site that ends in ``quantise``, a Quantise as text, from those of its norm.

    Returns (norm, residual) without one. Otherwise (norm, or a tensor without elements where it is not kept; residual; q), and the scales
    if each row has its own.
    """
    if not quantise:
        return norm, residual
    how = read(quantise)
    q, scale = quantised(norm, how, static_scale)
    return norm if how.keeps_norm else norm.new_empty(0), residual, q, *([scale] if how.per_token else [])


def empty_results(norm: Tensor, residual: Tensor, quantise: str) -> tuple[Tensor, ...]:
    """The same with undefined values of q and the scale."""
    if not quantise:
        return norm, residual
    how = read(quantise)
    scale = [norm.new_empty((*norm.shape[:-1], how.scales(norm.shape[-1])), dtype=torch.float32)] if how.per_token else []
    return norm if how.keeps_norm else norm.new_empty(0), residual, torch.empty_like(norm, dtype=DTYPES[how.dtype][0]), *scale
