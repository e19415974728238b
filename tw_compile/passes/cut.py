"""Fused graph -> where to cut it, or why not at all."""

from dataclasses import dataclass

import torch
from torch.distributed.distributed_c10d import _resolve_process_group
from torch.fx import Node

from ..options import Options
from ..planning import ctas_beside_gemms, first_half, loses, min_tokens
from .graph_utils import arguments, aten, calls, is_one, value


@dataclass(frozen=True)
class Cut:
    """Where all sites of a graph are cut: dimension ``dim`` of their shape, ``first`` of its ``length`` entries in front."""

    dim: int
    length: object
    first: object

    @property
    def halves(self) -> tuple:
        return self.first, self.length - self.first


def choose_cut(sites: list[Node], options: Options) -> Cut | str:
    """The cut for a graph's ``fused`` calls, or why there is none.

    Compares symbolic sizes: this is where the threshold becomes a guard of the compiled graph.
    """
    shape = value(sites[0].args[0]).shape
    dim = next((i for i, size in enumerate(shape[:-1]) if not is_one(size)), None)
    if dim is None:
        return "one token cannot be split"
    sms = _sms(value(sites[0].args[0]).device)
    if sms is not None and options.mode == "auto" == options.min_tokens:
        world = _resolve_process_group(arguments(sites[0])["group"]).size()
        ctas = ctas_beside_gemms(world) if options.ctas == "auto" else options.ctas
        if reason := loses(_flops(sites), _wire_bytes(sites, world), sms, ctas):
            return reason
    tokens, per_step, least = 1, 1, min_tokens(options, shape[-1], sms)
    for size in shape[:-1]:
        tokens = tokens * size
    for size in shape[dim + 1 : -1]:
        per_step = per_step * size
    if not tokens >= least:
        return f"fewer than {least} tokens"
    first = first_half(shape[dim], per_step, options, least)
    return first if isinstance(first, str) else Cut(dim, shape[dim], first)


def _sms(device: torch.device) -> int | None:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else None


def _flops(sites: list[Node]) -> float:
    """Of one token, in the GEMMs between the first and the last site."""
    total, node = 0, sites[0]
    while node is not sites[-1]:
        node = node.next
        if calls(node, aten.mm.default, aten.addmm.default):
            rows, columns = value(node.args[-1]).shape
            total += 2 * rows * columns if isinstance(rows, int) and isinstance(columns, int) else 0
    return total


def _wire_bytes(sites: list[Node], world: int) -> float:
    """Of one token, for the sites that have compute in front of them: in each direction, from and to one rank."""
    x = value(sites[0].args[0])
    return (len(sites) - 1) * 2 * (world - 1) / world * x.shape[-1] * x.dtype.itemsize
