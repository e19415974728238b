"""The transport over the process group in 8 or 4 bits.

Each rank owns a part of the rows. First trip: every rank sends each owner its partial sums of the owner's rows, quantised (all-to-all).
The owner adds them in float32 in rank order, adds the residual, and norms. Second trip: the owners send the norm, quantised, to all ranks
(all-gather). All ranks unpack the same bytes, and so have the same bits. The residual is never quantised: it stays with the owner of its
rows in float32, or is gathered in the model's dtype where something else reads it, as from a site without a norm.
"""

from typing import Any

import torch
from torch import Tensor

from ...compat import resolve_process_group
from ...site import WITHOUT_NORM, Site, empty_results
from ..beside import Beside, rows_of
from ..process_group import ProcessGroup, c10d
from . import codec


class LowBit(Beside):
    """Sites in ``bits`` bits, 8, 6 or 4, from ``least_bytes`` bytes of partial sums on. Others are those of ProcessGroup.

    A norm travels in the wire's format also where a site quantises it, which each rank does on arrival: the wire has a scale for each 128
    or 32 values, and the quantisation one for all of a row.

    The halves of a woven graph have a stream each: one half packs and unpacks while the other one's values are on the wire. Their
    collectives, all of one group, stay in the order of the calls.
    """

    streams = 2

    def __init__(self, group_name: str, device: torch.device, bits: int, least_bytes: int = 0) -> None:
        super().__init__(group_name, device)
        self.name, self.bits, self.least_bytes = f"process_group:{bits}", bits, least_bytes
        group = resolve_process_group(group_name)
        self.rank, self.world = group.rank(), group.size()
        self._codec: Any = codec
        if device.type == "cuda":
            from . import kernels  # imports Triton

            self._codec = kernels

    def another(self, least_bytes: int) -> "LowBit":
        """A new transport of the same kind."""
        return LowBit(self.group_name, self.device, self.bits, least_bytes)

    def in_full(self) -> ProcessGroup:
        """The same in 16 bits."""
        return ProcessGroup(self.group_name, self.device)

    def in_16_bits(self, x: Tensor) -> str:
        """Why a site with these partial sums is sent in 16 bits, the same on all ranks; '' if it is not. x may have symbolic sizes"""
        if reason := codec.refusal(x.dtype, x.shape[-1], self.bits):
            return reason
        size = x.numel()
        if not self.least_bytes:
            return ""
        if isinstance(size, torch.SymInt) and not size.node.has_hint():
            return "its number of tokens depends on data"
        if size * x.dtype.itemsize < self.least_bytes:
            return f"{self.bits} bits are faster here from {self.least_bytes >> 10} KB of partial sums on"
        return ""

    def is_plain(self, x: Tensor) -> bool:
        return bool(self.in_16_bits(x))

    def memory(self, site: Site) -> tuple[Tensor, Tensor]:
        """Memory for the results of a site: (norm, [T, H]; residual, [ranks * rows of an owner, H])."""
        norm, residual, *_ = empty_results(site.x, site.fp32_residual)
        hidden = norm.shape[-1]
        rows = self.world * self._rows(norm.numel() // hidden)
        return norm.view(-1, hidden), residual.new_empty(rows, hidden)

    def _rows(self, tokens: int) -> int:
        return -(-tokens // self.world)

    def run(self, site: Site, norm: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        shape, tokens = site.x.shape, norm.shape[0]
        if tokens:
            rows, trips = self._rows(tokens), codec.TRIPS[self.bits]
            flat = site._replace(x=rows_of(site.x), residual=None if site.residual is None else rows_of(site.residual))
            sent = self._codec.pack(flat.x, self.world * rows, trips[0])
            parts = [rows] * self.world
            received = c10d.wait_tensor(c10d.all_to_all_single(sent, parts, parts, self.group_name))
            mine = self._codec.reduce(received.view(self.world, rows, -1), self.rank, flat, residual, trips)
            own = residual[self.rank * rows : (self.rank + 1) * rows]
            if site.eps == WITHOUT_NORM:
                norm.copy_(self._gathered(own.to(norm.dtype))[:tokens])
            else:
                self._codec.unpack(self._gathered(mine), norm, trips[1])
            if not site.sharded_residual:
                residual.copy_(self._gathered(own))
        return norm.view(shape), residual[:tokens].view(shape)

    def _gathered(self, mine: Tensor) -> Tensor:
        """The rows of all ranks, in rank order."""
        return c10d.wait_tensor(c10d.all_gather_into_tensor(mine, self.world, self.group_name))
