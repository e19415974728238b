"""Triton kernels of what ``codec.py`` computes.

Each program has one row. A row of [H] is held as two tiles of [blocks, BLOCK / 2]: the first and the second halves of all blocks, which
share bytes when they are packed in 4 bits. A half of a block has PARTS groups; with a group of a whole block both halves have one scale.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...site import Site
from . import codec

BLOCK = tl.constexpr(codec.BLOCK)
HALF = tl.constexpr(codec.BLOCK // 2)
LEAST = tl.constexpr(codec.LEAST)
# (x + ROUND) - ROUND is x rounded to a whole number, ties to even, for |x| < 2**22.
ROUND = tl.constexpr(1.5 * 2**23)


@triton.jit
def _offsets(BLOCKS: tl.constexpr):
    """Offsets of the first halves of a row's blocks."""
    return tl.arange(0, BLOCKS)[:, None] * BLOCK + tl.arange(0, HALF)[None, :]


@triton.jit
def _loaded(row, first, hidden):
    low = tl.load(row + first, mask=first < hidden, other=0.0).to(tl.float32)
    high = tl.load(row + first + HALF, mask=first < hidden, other=0.0).to(tl.float32)
    return low, high


@triton.jit
def _stored(row, low, high, first, hidden):
    tl.store(row + first, low.to(row.dtype.element_ty), mask=first < hidden)
    tl.store(row + first + HALF, high.to(row.dtype.element_ty), mask=first < hidden)


@triton.jit
def _largest(x, BLOCKS: tl.constexpr, PARTS: tl.constexpr):
    """The largest magnitude of each part of a half block, [blocks * PARTS]; infinity for a part with a value that is not finite."""
    magnitude = tl.where(x == x, tl.abs(x), float("inf"))  # tl.max ignores NaN
    return tl.max(tl.reshape(magnitude, (BLOCKS * PARTS, HALF // PARTS)), 1)


@triton.jit
def _times(x, factor, BLOCKS: tl.constexpr, PARTS: tl.constexpr):
    """A tile times a factor for each part of its half blocks."""
    return tl.reshape(tl.reshape(x, (BLOCKS * PARTS, HALF // PARTS)) * factor[:, None], (BLOCKS, HALF))


@triton.jit
def _scale(largest, MOST: tl.constexpr):
    """The scales of groups with these largest magnitudes. Rounded by hand, as Triton's interpreter truncates to bfloat16."""
    bits = (tl.maximum(largest, LEAST) * (1.0 / MOST)).to(tl.int32, bitcast=True)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000).to(tl.float32, bitcast=True).to(tl.bfloat16)


@triton.jit
def _quantised(x, scale, MOST: tl.constexpr, BLOCKS: tl.constexpr, PARTS: tl.constexpr):
    parts = tl.reshape(x, (BLOCKS * PARTS, HALF // PARTS))
    q = (tl.div_rn(parts, tl.broadcast_to(scale.to(tl.float32)[:, None], parts.shape)) + ROUND) - ROUND
    q = tl.where(q == q, q, 0.0)
    return tl.reshape(tl.minimum(tl.maximum(q, -MOST), MOST).to(tl.int8), (BLOCKS, HALF))


@triton.jit
def _scale_places(hidden, BLOCKS: tl.constexpr, GROUP: tl.constexpr, PARTS: tl.constexpr):
    """(indices of the scales of the first halves' parts, of the second halves' parts, whether they are in the row)"""
    part = tl.arange(0, BLOCKS * PARTS)
    low = part // PARTS * (BLOCK // GROUP) + part % PARTS
    return low, low + (BLOCK // GROUP - PARTS), part // PARTS < hidden // BLOCK


@triton.jit
def _pack(row, low, high, hidden, first, BITS: tl.constexpr, GROUP: tl.constexpr, BLOCKS: tl.constexpr):
    """Quantise a row, and store it at ``row``, a pointer to bytes."""
    MOST: tl.constexpr = float((1 << (BITS - 1)) - 1)
    PARTS: tl.constexpr = max(HALF // GROUP, 1)
    of_low, of_high = _largest(low, BLOCKS, PARTS), _largest(high, BLOCKS, PARTS)
    if GROUP == BLOCK:
        of_low = tl.maximum(of_low, of_high)
        of_high = of_low
    of_low, of_high = _scale(of_low, MOST), _scale(of_high, MOST)
    low, high = _quantised(low, of_low, MOST, BLOCKS, PARTS), _quantised(high, of_high, MOST, BLOCKS, PARTS)
    values = row.to(tl.pointer_type(tl.int8))
    if BITS == 8:
        _stored(values, low, high, first, hidden)
    else:
        both = tl.arange(0, BLOCKS)[:, None] * HALF + tl.arange(0, HALF)[None, :]
        tl.store(values + both, (low & 15) | (high << 4), mask=first < hidden)
    scales = (row + hidden * BITS // 8).to(tl.pointer_type(tl.bfloat16))
    low_at, high_at, inside = _scale_places(hidden, BLOCKS, GROUP, PARTS)
    tl.store(scales + low_at, of_low, mask=inside)
    if GROUP != BLOCK:
        tl.store(scales + high_at, of_high, mask=inside)


@triton.jit
def _unpacked(row, hidden, first, BITS: tl.constexpr, GROUP: tl.constexpr, BLOCKS: tl.constexpr):
    """The values of a packed row at ``row``, in float32."""
    PARTS: tl.constexpr = max(HALF // GROUP, 1)
    scales = (row + hidden * BITS // 8).to(tl.pointer_type(tl.bfloat16))
    low_at, high_at, inside = _scale_places(hidden, BLOCKS, GROUP, PARTS)
    of_low = tl.load(scales + low_at, mask=inside, other=0.0).to(tl.float32)
    of_high = tl.load(scales + high_at, mask=inside, other=0.0).to(tl.float32)
    values = row.to(tl.pointer_type(tl.int8))
    if BITS == 8:
        low, high = _loaded(values, first, hidden)
    else:
        both = tl.arange(0, BLOCKS)[:, None] * HALF + tl.arange(0, HALF)[None, :]
        byte = tl.load(values + both, mask=first < hidden, other=0).to(tl.int32)
        low, high = ((byte << 28) >> 28).to(tl.float32), (byte >> 4).to(tl.float32)
    return _times(low, of_low, BLOCKS, PARTS), _times(high, of_high, BLOCKS, PARTS)


@triton.jit
def _add_norm(
    low, high, residual, new, weight, bias, shift, hidden, eps, scale, offset, first,
    HAS_RESIDUAL: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SHIFT: tl.constexpr, CENTER: tl.constexpr,
):  # fmt: skip
    """``site.add_norm`` of a row. Stores the new residual, and returns the norm in float32."""
    if HAS_BIAS:
        a, b = _loaded(bias, first, hidden)
        low, high = low + a, high + b
    low, high = low * scale, high * scale
    if HAS_RESIDUAL:
        a, b = _loaded(residual, first, hidden)
        low, high = low + a, high + b
    _stored(new, low, high, first, hidden)
    if CENTER:
        mean = tl.sum(low + high) / hidden
        low, high = tl.where(first < hidden, low - mean, 0.0), tl.where(first < hidden, high - mean, 0.0)
    factor = tl.rsqrt(tl.sum(low * low + high * high) / hidden + eps)
    low, high = low * factor, high * factor
    if HAS_WEIGHT:
        a, b = _loaded(weight, first, hidden)
        low, high = low * (a + offset), high * (b + offset)
    if HAS_SHIFT:
        a, b = _loaded(shift, first, hidden)
        low, high = low + a, high + b
    return low, high


@triton.jit
def _pack_kernel(x, packed, tokens, hidden, size, BITS: tl.constexpr, GROUP: tl.constexpr, BLOCKS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    first = _offsets(BLOCKS)
    low, high = _loaded(x + tl.minimum(row, tokens - 1) * hidden, first, hidden)
    _pack(packed + row * size, low, high, hidden, first, BITS, GROUP, BLOCKS)


@triton.jit
def _unpack_kernel(packed, out, hidden, size, BITS: tl.constexpr, GROUP: tl.constexpr, BLOCKS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    first = _offsets(BLOCKS)
    low, high = _unpacked(packed + row * size, hidden, first, BITS, GROUP, BLOCKS)
    _stored(out + row * hidden, low, high, first, hidden)


@triton.jit
def _reduce_kernel(
    received, x, residual, new, weight, bias, shift, packed, begin, rows, hidden, eps, scale, offset, size, size_out,
    OWN: tl.constexpr, RANKS: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, BITS_OUT: tl.constexpr, GROUP_OUT: tl.constexpr,
    BLOCKS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SHIFT: tl.constexpr,
    CENTER: tl.constexpr,
):  # fmt: skip
    mine = tl.program_id(0).to(tl.int64)
    at = (begin + mine) * hidden
    first = _offsets(BLOCKS)
    low, high = tl.zeros((BLOCKS, HALF), tl.float32), tl.zeros((BLOCKS, HALF), tl.float32)
    for rank in tl.static_range(RANKS):
        if rank == OWN:
            a, b = _loaded(x + at, first, hidden)
        else:
            a, b = _unpacked(received + (rank * rows + mine) * size, hidden, first, BITS, GROUP, BLOCKS)
        low, high = low + a, high + b
    low, high = _add_norm(
        low, high, residual + at if HAS_RESIDUAL else residual, new + at, weight, bias, shift, hidden, eps, scale, offset, first,
        HAS_RESIDUAL, HAS_WEIGHT, HAS_BIAS, HAS_SHIFT, CENTER,
    )  # fmt: skip
    _pack(packed + mine * size_out, low, high, hidden, first, BITS_OUT, GROUP_OUT, BLOCKS)


def _shape(hidden: int) -> dict[str, int]:
    """How a row is held, and by how many warps: 32 values in a thread of a long row."""
    blocks = triton.next_power_of_2(triton.cdiv(hidden, codec.BLOCK))
    return {"BLOCKS": blocks, "num_warps": min(max(blocks * codec.BLOCK // 1024, 1), 16)}


def pack(x: Tensor, rows: int, bits: int) -> Tensor:
    """``codec.pack``"""
    tokens, hidden = x.shape
    packed = x.new_empty(rows, codec.row_bytes(hidden, bits), dtype=torch.uint8)
    _pack_kernel[(rows,)](x, packed, tokens, hidden, packed.shape[1], BITS=bits, GROUP=codec.GROUP[bits], **_shape(hidden))
    return packed


def unpack(packed: Tensor, out: Tensor, bits: int) -> None:
    """``codec.unpack``"""
    tokens, hidden = out.shape
    _unpack_kernel[(tokens,)](packed, out, hidden, packed.shape[1], BITS=bits, GROUP=codec.GROUP[bits], **_shape(hidden))


def reduce(received: Tensor, own: int, site: Site, residual: Tensor, trips: tuple[int, int]) -> Tensor:
    """``codec.reduce``"""
    ranks, rows, size = received.shape
    tokens, hidden = site.x.shape
    packed = received.new_empty(rows, codec.row_bytes(hidden, trips[1]))
    count = min(rows, tokens - own * rows)
    if count > 0:
        _reduce_kernel[(count,)](
            received, site.x, site.residual, residual, site.weight, site.bias, site.shift, packed, own * rows, rows, hidden, site.eps,
            site.scale, site.offset, size, packed.shape[1], OWN=own, RANKS=ranks, BITS=trips[0], GROUP=codec.GROUP[trips[0]],
            BITS_OUT=trips[1], GROUP_OUT=codec.GROUP[trips[1]], HAS_RESIDUAL=site.residual is not None,
            HAS_WEIGHT=site.weight is not None, HAS_BIAS=site.bias is not None, HAS_SHIFT=site.shift is not None, CENTER=site.center,
            **_shape(hidden),
        )  # fmt: skip
    return packed
