"""Fused graph -> where to cut it, or why not at all."""

from dataclasses import dataclass

from torch.fx import Node

from ..autotune import schedule
from ..autotune.plan import Place, Plan, by_rule, first_half, place_of_cut
from ..options import Options
from .graph_utils import value


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
