"""What a site computes, in eager PyTorch: the specification, and the oracle of the tests."""

import torch
from torch import Tensor

# As the number of a site: the one after that of the site before it in the slot. So layers that are alike make the same calls.
NEXT_SITE = -1


def empty_results(x: Tensor, fp32_residual: bool) -> tuple[Tensor, Tensor]:
    """What a site on x returns, (norm, residual), without values; fp32_residual: the residual is float32."""
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
