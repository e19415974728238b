"""A site: its packed arguments, and its computation in eager PyTorch, which is the specification and the reference of the tests."""

from typing import NamedTuple

import torch
from torch import Tensor

from . import quantise as quantisation

# The slot of values that are not split. Slots 0 and 1 are for the woven halves.
SLOT_WHOLE = 2

# A number of a site that stands for the number after that of the slot's last site. With it, equal layers make the same calls.
NEXT_SITE = -1

# The eps of a site without a norm: its norm is the new residual, in the dtype of x.
WITHOUT_NORM = -1.0


class Site(NamedTuple):
    """The arguments of a site. The ops take the same, in this order.

    x:                [..., H], the partial sums of this rank, in bfloat16, float16 or float32
    residual:         [..., H], with the dtype and shape of x, or float32; or the residual that the slot's last site returned; or None
    weight:           [H], in the dtype of x or float32; or None for ones. The norm is multiplied by ``weight + offset``
    bias:             [H], in the dtype of x; or None. It is added to the sum, and the result is multiplied by ``scale``
    shift:            [H], in the dtype of x or float32; or None. It is added to the norm, and only allowed with ``center``
    eps:              is added to the mean of squares; WITHOUT_NORM for no norm, also without weight and center
    center:           True for a LayerNorm, False for an RMSNorm
    ctas:             the number of CTAs of the kernel; 0 leaves the choice to the transport
    slot:             0 or 1 for a woven half, SLOT_WHOLE for values that are not split
    number:           the number of the site, for error messages; NEXT_SITE for the number after the slot's last one
    fp32_residual:    the new residual is float32
    sharded_residual: only the slot's next site reads the new residual, so that it may be in a form of the transport
    quantise:         the norm is quantised: a ``quantise.Quantise`` as text; or ''. Only with x in bfloat16 or float16
    static_scale:     the scale of that quantisation, float32 with one element; not used where each row has its own
    """

    x: Tensor
    residual: Tensor | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None
    shift: Tensor | None = None
    eps: float = 1e-5
    scale: float = 1.0
    offset: float = 0.0
    center: bool = False
    ctas: int = 0
    slot: int = SLOT_WHOLE
    number: int = 0
    fp32_residual: bool = False
    sharded_residual: bool = False
    quantise: str = ""
    static_scale: Tensor | None = None

    @property
    def addends(self) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, float, float, float, bool]:
        """The arguments of ``add_norm`` after the sum."""
        return self[1:9]


class Planned(NamedTuple):
    """What is known of a site before its calls.

    shape:  of x
    output: what the norm is quantised to, ``quantise.Quantise.output``; or ''
    """

    slot: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    center: bool
    output: str = ""


def empty_results(x: Tensor, fp32_residual: bool, quantise: str = "") -> tuple[Tensor, ...]:
    """(norm, residual) as a site on x returns them, with undefined values; see ``quantise.results`` for more than these two.

    fp32_residual: the residual is float32
    """
    norm = torch.empty_like(x, memory_format=torch.contiguous_format)
    residual = torch.empty_like(norm, dtype=torch.float32 if fp32_residual else x.dtype)
    return quantisation.empty_results(norm, residual, quantise)


def add_norm(
    total: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    shift: Tensor | None,
    eps: float,
    scale: float,
    offset: float,
    center: bool,
) -> tuple[Tensor, Tensor]:
    """Residual add and norm of a reduced value, in float32.

    total:    [..., H], the sum over the ranks, in any floating-point dtype
    residual: [..., H] in any floating-point dtype, or None
    weight:   [H], or None for ones. The norm is multiplied by ``weight + offset``
    bias:     [H] or None, is added to the sum
    shift:    [H] or None, is added to the norm; only with ``center``
    scale:    multiplies the sum after the bias is added
    eps:      see ``Site``
    center:   True for a LayerNorm, which subtracts the mean of each row; False for an RMSNorm
    Returns (norm, residual), both [..., H] in float32. A site rounds each of them once, to the dtype of the model.
    """
    r = total.float()
    if bias is not None:
        r = r + bias.float()
    if scale != 1.0:
        r = r * scale
    if residual is not None:
        r = r + residual.float()
    if eps == WITHOUT_NORM:
        return r, r
    row = r - r.mean(-1, keepdim=True) if center else r
    norm = row * torch.rsqrt(row.square().mean(-1, keepdim=True) + eps)
    if weight is not None:
        norm = norm * (weight.float() + offset)
    if shift is not None:
        norm = norm + shift.float()
    return norm, r


def all_reduce_add_norm(
    partials: list[Tensor],
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    shift: Tensor | None,
    eps: float,
    scale: float,
    offset: float,
    center: bool,
) -> tuple[Tensor, Tensor]:
    """A whole site, computed from the partial sums of all ranks.

    partials: one [..., H] tensor of each rank, in rank order. They are added in float32 in this order, so that all ranks get the same
              bits, whichever rank computes them
    The other arguments are those of ``add_norm``.
    Returns (norm, residual), both [..., H]: the norm in the dtype of the partials, the residual in float32.
    """
    total = partials[0].float()
    for partial in partials[1:]:
        total = total + partial.float()
    norm, r = add_norm(total, residual, weight, bias, shift, eps, scale, offset, center)
    return norm.to(partials[0].dtype), r
