"""The transport of a group across hosts: fast links inside of each host, a network between the hosts.

The ranks of a host own a part of the rows each, the same ones on every host:

1. reduce-scatter inside of the host: each rank gets the host's sum of its rows
2. all-reduce of these between the ranks of all hosts that own the same rows; here alone values may have fewer bits
3. residual add and norm of the own rows
4. all-gather of the norm inside of the host

So a network carries each row once, and not once for each rank of a host. The residual stays with its owners from site to site.
"""

import weakref
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from ..compat import resolve_process_group
from ..site import Site, empty_results
from . import agree, link
from .beside import Beside, rows_of
from .low_bit.transport import LowBit
from .process_group import add_norm_of, c10d


@dataclass(frozen=True)
class Levels:
    """The groups of a rank: ``inside`` of its host, and ``across`` the hosts, of those that own the same rows."""

    inside: dist.ProcessGroup
    across: dist.ProcessGroup


_levels: "weakref.WeakKeyDictionary[dist.ProcessGroup, Levels]" = weakref.WeakKeyDictionary()


def levels(group_name: str) -> Levels:
    """The groups of this rank. A collective of the group the first time, which makes them; they stay as long as the process does.

    Raises ValueError for a group that is not alike on several hosts.
    """
    group = resolve_process_group(group_name)
    if group not in _levels:
        hosts = agree.exchange(group_name, "the hosts of a group", link.host())
        found = link.nested(hosts)
        if isinstance(found, str):
            raise ValueError(found)
        globally = dist.get_process_group_ranks(group)
        inside = [sorted(ranks, key=globally.__getitem__) for ranks in found]  # the order of the ranks of a new group
        _levels[group] = Levels(_part(group, inside), _part(group, [*map(list, zip(*inside))]))
    return _levels[group]


def _part(group: dist.ProcessGroup, parts: list[list[int]]) -> dist.ProcessGroup:
    """The new group of those ranks of ``group`` among which this rank is. A collective of ``group`` alone. parts: in ranks of the group"""
    if dist.group.WORLD is not None and dist.group.WORLD.bound_device_id is not None:
        # new_group would then split the communicator of all ranks of the job, of which others may not be here.
        return dist.split_group(group, parts)
    globally = dist.get_process_group_ranks(group)
    mine = next(part for part in parts if group.rank() in part)
    backend = dist.get_backend_config(group)
    return dist.new_group([globally[rank] for rank in mine], backend=backend, use_local_synchronization=True)


class Hierarchical(Beside):
    """Sites over ``levels``.

    Between the hosts, those from ``least_bytes`` bytes of partial sums on have ``bits`` bits: 16, 8, 6 or 4.
    """

    def __init__(self, group_name: str, device: torch.device, bits: int = 16, least_bytes: int = 0) -> None:
        super().__init__(group_name, device)
        self.name = "hierarchical" if bits == 16 else f"hierarchical:{bits}"
        found = levels(group_name)
        self.inside, self.across = found.inside.group_name, found.across.group_name
        self.ranks, self.rank, self.hosts = found.inside.size(), found.inside.rank(), found.across.size()
        self.world, self.bits, self.least_bytes = self.ranks * self.hosts, bits, least_bytes
        self._between = None if bits == 16 else LowBit(self.across, device, bits, least_bytes)

    def another(self, least_bytes: int) -> "Hierarchical":
        """A new transport of the same kind."""
        return Hierarchical(self.group_name, self.device, self.bits, least_bytes)

    def in_full(self) -> "Hierarchical":
        """The same in 16 bits."""
        return Hierarchical(self.group_name, self.device)

    def in_16_bits(self, x: Tensor) -> str:
        """Why a site with these partial sums is sent in 16 bits, the same on all ranks; '' if it is not. x may have symbolic sizes"""
        return "" if self._between is None else self._between.in_16_bits(x)

    def memory(self, site: Site) -> tuple[Tensor, Tensor]:
        norm, residual, *_ = empty_results(site.x, site.fp32_residual)
        hidden = norm.shape[-1]
        rows = self.ranks * self._rows(norm.numel() // hidden)
        return norm.new_empty(rows, hidden), residual.new_empty(rows, hidden)

    def _rows(self, tokens: int) -> int:
        """Rows of an owner: a multiple of the hosts, as a wire of fewer bits divides them between the hosts."""
        return self.hosts * -(-tokens // (self.ranks * self.hosts))

    def run(self, site: Site, norm: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        x, hidden = rows_of(site.x), norm.shape[-1]
        tokens, rows = x.shape[0], self._rows(x.shape[0])
        first = self.rank * rows
        count = min(max(tokens - first, 0), rows)  # of my rows; on all hosts alike
        if tokens:
            padded = x if tokens == self.ranks * rows else F.pad(x, (0, 0, 0, self.ranks * rows - tokens))
            mine = c10d.wait_tensor(c10d.reduce_scatter_tensor(padded, "sum", self.ranks, self.inside))
            my_norm = norm.new_empty(rows, hidden)
            my_residual = residual[first : first + rows] if site.sharded_residual else residual.new_empty(rows, hidden)
            if count:
                carried = None if site.residual is None else rows_of(site.residual)[first : first + count]
                packs = None if self.in_16_bits(site.x) else self._between
                self._reduce(site._replace(x=mine[:count], residual=carried), my_norm, my_residual, packs)
            self._gather(my_norm, norm)
            if not site.sharded_residual:
                self._gather(my_residual, residual)
        return norm[:tokens].view(site.x.shape), residual[:tokens].view(site.x.shape)

    def _reduce(self, site: Site, norm: Tensor, residual: Tensor, packs: LowBit | None) -> None:
        """The part of a site between the hosts.

        site:           with the rows of this rank
        norm, residual: in front of which the results are written
        packs:          what sends values in fewer bits; None for 16
        """
        count = site.x.shape[0]
        if packs is not None:
            packs.run(site, norm[:count], residual[: self.hosts * -(-count // self.hosts)])
            return
        total = c10d.wait_tensor(c10d.all_reduce_(site.x, "sum", self.across))
        for result, where in zip(add_norm_of(total, site), (norm, residual)):
            where[:count] = result

    def _gather(self, mine: Tensor, all_rows: Tensor) -> None:
        c10d.wait_tensor(c10d.all_gather_into_tensor_out(mine, self.ranks, self.inside, out=all_rows))
