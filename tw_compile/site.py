"""The arguments of a site, and what it computes, in eager PyTorch. This is the specification of sites, and the oracle of the tests."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

# The slot of sites that are not cut. Slots 0 and 1 are those of the halves.
SLOT_WHOLE = 2

# The number of a site that counts on from the slot's last site, so that equal layers make equal calls.
NEXT_SITE = -1


class Site(NamedTuple):
    """The arguments of a site. The ops take the same, in this order.

    x:                [..., H] this rank's partial sums
    residual:         [..., H], dtype and shape of x, or None; or the residual that the slot's last site returned with ``sharded_residual``
    weight:           [H], of x's dtype or float32, or None for ones; used as ``weight + offset``
    bias:             [H], of x's dtype, or None; added to the sum, before ``scale``
    shift:            [H], of x's dtype or float32, or None; added to the norm. Only with ``center``
    scale:            factor on the sum, after the bias
    center:           LayerNorm; otherwise RMSNorm
    ctas:             CTAs of the kernel; 0 leaves the number to the kernel
    slot:             0 or 1 for a half, SLOT_WHOLE for sites that are not cut
    number:           for error messages; NEXT_SITE counts on from the slot's last one
    fp32_residual:    the new residual is float32
    sharded_residual: only the slot's next site reads the new residual, so that each rank may keep its own rows only
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

    @property
    def addends(self) -> tuple[Any, ...]:
        """The arguments of ``add_norm`` after the sum."""
        return self[1:9]


def empty_results(x: Tensor, fp32_residual: bool) -> tuple[Tensor, Tensor]:
    """Empty tensors for the results of a site on x, (norm, residual). fp32_residual: the residual is float32."""
    norm = torch.empty_like(x, memory_format=torch.contiguous_format)
    return norm, torch.empty_like(norm, dtype=torch.float32 if fp32_residual else x.dtype)


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

    total:    [..., H], the sum over the ranks, any floating dtype
    residual: [..., H] or None, any floating dtype
    weight:   [H] or None (ones); used as ``weight + offset``
    bias:     [H] or None, added to the sum
    shift:    [H] or None, added to the norm; only with ``center``
    scale:    factor on the sum, after the bias
    center:   LayerNorm: the mean of each row is subtracted first; otherwise RMSNorm
    Returns (norm, residual), both [..., H] in float32. A site rounds each of them once, to the dtype of the model.
    """
    r = total.float()
    if bias is not None:
        r = r + bias.float()
    if scale != 1.0:
        r = r * scale
    if residual is not None:
        r = r + residual.float()
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
    """A whole site, from the partial sums of all ranks.

    partials: one [..., H] tensor of each rank, in rank order. They are added in float32 in this order, so that all ranks get the same
              bits, whichever rank computes them.
    The other arguments are those of ``add_norm``.
    Returns (norm, residual), both [..., H], the norm in the dtype of the partials, the residual in float32.
    """
    total = partials[0].float()
    for partial in partials[1:]:
        total = total + partial.float()
    norm, r = add_norm(total, residual, weight, bias, shift, eps, scale, offset, center)
    return norm.to(partials[0].dtype), r
