"""``site.add_norm`` as one Triton kernel, for sums that a process group has reduced outside of Inductor's code.

Each program has one row, in float32. The norm and the residual are rounded once, to the dtype of their memory.
"""

import triton
import triton.language as tl
from torch import Tensor

from ..site import WITHOUT_NORM


@triton.jit
def _kernel(
    total, residual, weight, bias, shift, norm, new, hidden, eps, scale, offset,
    HAS_RESIDUAL: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SHIFT: tl.constexpr, CENTER: tl.constexpr,
    NORMS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * hidden
    column = tl.arange(0, BLOCK)
    inside = column < hidden
    r = tl.load(total + at + column, mask=inside, other=0.0).to(tl.float32)
    if HAS_BIAS:
        r += tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
    r *= scale
    if HAS_RESIDUAL:
        r += tl.load(residual + at + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(new + at + column, r.to(new.dtype.element_ty), mask=inside)
    if NORMS:
        if CENTER:
            r = tl.where(inside, r - tl.sum(r) / hidden, 0.0)
        r *= tl.rsqrt(tl.sum(r * r) / hidden + eps)
        if HAS_WEIGHT:
            r *= tl.load(weight + column, mask=inside, other=0.0).to(tl.float32) + offset
        if HAS_SHIFT:
            r += tl.load(shift + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(norm + at + column, r.to(norm.dtype.element_ty), mask=inside)


def add_norm(total: Tensor, addends: tuple, norm: Tensor, residual: Tensor) -> None:
    """Write the norm and the new residual of reduced rows.

    total:          [..., H], the sum over the ranks, contiguous
    addends:        ``Site.addends``: the old residual has as many entries as ``total``
    norm, residual: of the shape of ``total``, contiguous, in any floating-point dtype
    """
    old, weight, bias, shift, eps, scale, offset, center = addends
    hidden = total.shape[-1]
    if not total.numel():
        return
    old, weight, bias, shift = (None if a is None else a.contiguous() for a in (old, weight, bias, shift))
    block = triton.next_power_of_2(hidden)
    _kernel[(total.numel() // hidden,)](
        total, old, weight, bias, shift, norm, residual, hidden, eps, scale, offset, HAS_RESIDUAL=old is not None,
        HAS_WEIGHT=weight is not None, HAS_BIAS=bias is not None, HAS_SHIFT=shift is not None, CENTER=center, NORMS=eps != WITHOUT_NORM,
        BLOCK=block, num_warps=min(max(block // 1024, 1), 16),
    )  # fmt: skip
