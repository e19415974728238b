"""Rows in 8 or 4 bits, for the wire: the format, and its computation in eager PyTorch, which is the reference of ``kernels.py``.

A row of H values is cut into groups with a bfloat16 scale each. A value is ``scale * q`` with a whole number q of [-127, 127] or
[-7, 7]. A packed row has the bytes of all q, then the scales, and is as long as the next multiple of 16 bytes. With 4 bits a byte has two
numbers: that of value i of BLOCK values in the low half, and that of value ``i + BLOCK / 2`` in the high half.

All arithmetic is in float32, and nothing is float16: values above 65504 stay what they are. q is the value divided by the rounded scale,
with which the other side multiplies it. The values of a group are off by at most 1/250 or 1/14 of its largest one. A group with a value
that is not finite is all NaN on the other side.
"""

import torch
from torch import Tensor

from ...site import Site, add_norm

# Bits of a wire -> bits of the first trip, of partial sums, and of the second one, of norms. Norms are rounded again in every layer, and
# partial sums are added to a residual that is not (Flash Communication, arXiv 2412.04964).
TRIPS = {8: (8, 8), 6: (4, 8), 4: (4, 4)}
# Bits -> values of a group. With 4 bits a large value takes more from its neighbours.
GROUP = {8: 128, 4: 32}
# Values that share bytes. A hidden size is a multiple of it.
BLOCK = 128
# A group with smaller values is scaled as if this were its largest one, so that its scale is not 0.
LEAST = 2.0**-100


def refusal(dtype: torch.dtype, hidden: int, wire: int) -> str:
    """Why rows are not sent in ``wire`` bits; '' if they are."""
    if not isinstance(hidden, int) or hidden % BLOCK:
        return f"a hidden size of {hidden} is not a multiple of {BLOCK}"
    if dtype == torch.float32 and wire < 8:
        return f"a float32 model is not sent in {wire} bits: use a wire of 8, or a model in bfloat16"
    return ""


def row_bytes(hidden: int, bits: int) -> int:
    """Bytes of a packed row of ``hidden`` values."""
    return -(-(hidden * bits // 8 + hidden // GROUP[bits] * 2) // 16) * 16


def sent_bytes(hidden: int, itemsize: int, world: int, wire: int, norm: bool = True) -> float:
    """Bytes that each rank sends for a token and a site.

    itemsize: bytes of a value of the model, which a wire of 16 bits sends
    norm:     whether the site has a norm; without one, its second trip is the residual, which is not quantised
    """
    first, second = [hidden * itemsize] * 2 if wire == 16 else [row_bytes(hidden, bits) for bits in TRIPS[wire]]
    return (first + (second if norm else hidden * itemsize)) * (world - 1) / world


def pack(x: Tensor, rows: int, bits: int) -> Tensor:
    """Quantise rows. x: [T, H] -> [rows, bytes] in uint8. Rows from T on are copies of the last one."""
    x = x[torch.arange(rows, device=x.device).clamp_max(x.shape[0] - 1)].float()
    groups, most = x.unflatten(-1, (-1, GROUP[bits])), (1 << (bits - 1)) - 1
    largest = groups.abs().nan_to_num(torch.inf, torch.inf).amax(-1, keepdim=True).clamp_min(LEAST)
    scales = (largest * (1.0 / most)).bfloat16()
    q = (groups / scales.float()).round().clamp(-most, most).nan_to_num(0.0).to(torch.int8)
    if bits == 4:
        low, high = q.flatten(-2).unflatten(-1, (-1, BLOCK)).chunk(2, -1)
        q = (low & 15) | (high << 4)
    packed = torch.cat([q.flatten(-2).view(torch.uint8), scales.squeeze(-1).contiguous().view(torch.uint8)], -1)
    return torch.nn.functional.pad(packed, (0, row_bytes(x.shape[-1], bits) - packed.shape[-1]))


def unpack(packed: Tensor, out: Tensor, bits: int) -> None:
    """Write what ``pack`` has packed to ``out``, [T, H] in any floating-point dtype. packed: [T or more, bytes] in uint8"""
    tokens, hidden = out.shape
    end = hidden * bits // 8
    values, scales = packed[:tokens, :end].view(torch.int8), packed[:tokens, end : end + hidden // GROUP[bits] * 2].contiguous()
    if bits == 4:
        values = values.unflatten(-1, (-1, BLOCK // 2))
        values = torch.cat([(values << 4) >> 4, values >> 4], -1).flatten(-2)
    groups = values.float().unflatten(-1, (-1, GROUP[bits])) * scales.view(torch.bfloat16).float().unsqueeze(-1)
    out.copy_(groups.flatten(-2))


def reduce(received: Tensor, own: int, site: Site, residual: Tensor, trips: tuple[int, int]) -> Tensor:
    """Sum, residual add and norm of the rows that this rank owns: rows ``own * rows`` and following.

    received: [ranks, rows, bytes], packed rows of each rank's partial sums of these rows
    own:      this rank. Its partial sum is taken from the site, as it is
    site:     its x and residual are [T, H]
    residual: [ranks * rows, H]; the owned rows of the new residual are written to it
    trips:    bits of ``received``, and of the result
    Returns the packed rows of the norm, [rows, bytes]; those from T on are undefined. The partial sums are added in rank order.
    """
    rows, (tokens, hidden) = received.shape[1], site.x.shape
    mine = slice(own * rows, min((own + 1) * rows, tokens))
    if mine.start >= tokens:
        return received.new_empty(rows, row_bytes(hidden, trips[1]))
    total, partial = (torch.zeros(mine.stop - mine.start, hidden, device=site.x.device) for _ in range(2))
    for rank, packed in enumerate(received):
        if rank != own:
            unpack(packed, partial, trips[0])
        total += site.x[mine] if rank == own else partial
    norm, residual[mine] = add_norm(total, None if site.residual is None else site.residual[mine], *site.addends[1:])
    return pack(norm, rows, trips[1])
