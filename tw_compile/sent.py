"""What the sites of a graph send over the process group, or between hosts: in how many bits, and how many bytes. For the report."""

import torch

from . import ops, passes
from .compat import resolve_process_group
from .passes.graph_utils import arguments, calls, value
from .report import Site
from .transports import choose
from .transports.hierarchical import Hierarchical
from .transports.low_bit import codec
from .transports.low_bit.transport import LowBit
from .transports.process_group import ProcessGroup


def describe(new: passes.Rewritten, requested: str) -> None:
    """Add to the report of a rewritten graph what it sends, and why not in fewer bits; nothing where a site is over symmetric memory.

    new:       before it is compiled, which changes its graph
    requested: ``Options.transport_and_wire``, for which the transports of the graph's groups are chosen
    """
    report, packed, transports = new.report, set(), {}
    for node in new.graph.nodes:
        if not calls(node, ops.start, ops.fused):
            continue
        given, x = arguments(node), value(node.args[0])
        transport, _ = choose.choose(requested, given["group"], x.device)
        if not isinstance(transport, ProcessGroup):
            return
        transports[given["group"]] = transport
        if isinstance(transport, LowBit) or (isinstance(transport, Hierarchical) and transport.bits < 16):
            if reason := transport.in_16_bits(x):
                report.reasons += [said] if (said := f"{8 * x.dtype.itemsize} bits: {reason}") not in report.reasons else []
            else:
                packed.add(given["site"])
    report.packed = len(packed)
    full, *fewer = (round(sum(_bytes(site, bits, transports[site.group]) for site in report.sites)) for bits in (16, *codec.TRIPS))
    widths = sorted({8 * getattr(torch, site.dtype).itemsize for site in report.sites})
    report.wire = {" and ".join(map(str, widths)): full} | {str(bits): n for bits, n in zip(codec.TRIPS, fewer) if n < full}


def _bytes(site: Site, bits: int, transport: ProcessGroup) -> float:
    """Bytes that each rank sends for a token at a site; to other hosts, where there is a hierarchy. bits: of the option ``wire``"""
    hidden, dtype = int(site.shape[-1]), getattr(torch, site.dtype)
    world, owners = resolve_process_group(site.group).size(), 1
    if isinstance(transport, Hierarchical):
        world, owners = transport.hosts, transport.ranks
    return codec.sent_bytes(hidden, dtype.itemsize, world, 16 if codec.refusal(dtype, hidden, bits) else bits, bool(site.norm)) / owners
