"""Fused graph -> where to cut it, or why not at all."""

import math
from dataclasses import dataclass

from torch.fx import Node

from ..autotune import schedule
from ..autotune.plan import Place, Plan, by_rule, first_half, place_of_cut
from ..options import Options
from .graph_utils import aten, calls, value
from .rules.attention import SIGNATURES


@dataclass(frozen=True)
class Cut:
    """Where all sites of a graph are cut: dimension ``dim`` of their shape, ``first`` of its ``length`` entries in front.

    ctas: of the communication kernels, 0 for their own choice
    """

    dim: int
    length: object
    first: object
    ctas: int = 0

    @property
    def halves(self) -> tuple:
        return self.first, self.length - self.first


def section_of(sites: list[Node], options: Options) -> schedule.Section | None:
    """What of a graph is run to tune its schedule, by its ``fused`` calls; None where nothing can be, or nothing is left to decide."""
    x = value(sites[0].args[0])
    if options.fused_only or not schedule.possible(x.device):
        return None
    if options.min_tokens != "auto" and options.split != "auto" and options.ctas != "auto":
        return None
    *batch, hidden = x.shape
    tokens = math.prod(batch)
    sequences = batch[0] if len(batch) > 1 and isinstance(batch[0], int) else 1
    wanted = (tokens,) if isinstance(tokens, int) else schedule.SIZES
    least, most = max(sequences, schedule.SIZES[0]), schedule.MAX_ELEMENTS // hidden
    sizes = tuple(dict.fromkeys(min(size, most) for size in wanted if size >= least))
    phases = [_phase(site, hidden) for site in sites[1 : 1 + schedule.PHASES]]
    if None in phases or not phases or not sizes:
        return None
    ctas = 0 if options.ctas == "auto" else options.ctas
    return schedule.Section(hidden, str(x.dtype).removeprefix("torch."), sizes, sequences, ctas, tuple(phases))


def batch_of(sites: list[Node]) -> list:
    """The shape of the reduced values of a graph's ``fused`` calls, without the last dimension."""
    return list(value(sites[0].args[0]).shape[:-1])


def plan_by_rule(sites: list[Node]) -> Plan:
    """The plan of a graph that is not tuned."""
    x = value(sites[0].args[0])
    return by_rule(x.shape[-1], schedule.sms_of(x.device))


def choose_cut(sites: list[Node], options: Options, plan: Plan | None = None) -> Cut | str:
    """The cut for a graph's ``fused`` calls and the sizes that it is compiled for, or why there is none.

    plan: None goes by a rule. Sizes are taken by their hints: which form of a graph runs is decided in each call (forms.py).
    """
    plan, batch = plan or plan_by_rule(sites), batch_of(sites)
    numbers = [number(size) for size in batch]
    if None in numbers:
        return "its number of tokens depends on data"
    at = place_of_cut(numbers, options, plan)
    return at if isinstance(at, str) else cut_at(batch, at, plan)


def cut_at(batch: list, at: Place, plan: Plan) -> Cut:
    """batch: see ``batch_of``"""
    return Cut(at.dim, batch[at.dim], first_half(batch[at.dim], at.rule, plan.split_ratio), plan.ctas)


def number(size) -> int | None:
    """A size, as the number that it has where the graph is compiled; no guard comes of it. None where that depends on data."""
    return size if isinstance(size, int) else size.node.hint


def _phase(site: Node, hidden: int) -> tuple | None:
    """The work between a site and the one in front of it, to be run when the schedule is tuned; None if it does not end in a GEMM."""
    ops, node = [], site.prev
    while not calls(node, site.target) and node.op != "root":
        if calls(node, aten.mm.default, aten.addmm.default):
            ops.append(("mm", *value(node.args[-1]).shape))
        elif calls(node, *SIGNATURES):
            query, key = (value(a) for a in node.args[:2])
            ops.append(("attention", query.shape[1], key.shape[1], query.shape[3]))
        node = node.prev
    ops.reverse()
    if not ops or ops[-1][0] != "mm" or ops[-1][2] != hidden or not all(isinstance(size, int) for op in ops for size in op[1:]):
        return None
    return tuple(ops)
