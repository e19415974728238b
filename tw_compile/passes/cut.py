"""Fused graph -> where to cut it, or why it is not cut."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from ..autotune import schedule
from ..autotune.plan import Place, Plan, by_rule, first_half, place_of_cut, why_experts_are_whole
from ..options import Options
from .graph_utils import value
from .rules.experts import choices_of, groups


@dataclass(frozen=True)
class Cut:
    """Where all sites of a graph are cut.

    dim:     the dimension of the reduced values that is cut
    length:  its number of entries, int or SymInt
    first:   the number of entries in the first half, int or SymInt
    ctas:    CTAs of a communication kernel; 0 leaves the number to the kernel
    experts: why experts are not cut, or ''
    """

    dim: int
    length: Any
    first: Any
    ctas: int = 0
    experts: str = ""

    @property
    def halves(self) -> tuple:
        return self.first, self.length - self.first


def stream(sites: list[Node]) -> list[Node]:
    """The sites that can be cut alike: most of them, where the sites of a graph have several numbers of tokens, as of image and text."""
    shapes = [str(list(value(site.args[0]).shape[:-1])) for site in sites]
    tokens = [math.prod(size for size in value(site.args[0]).shape[:-1] if isinstance(size, int)) for site in sites]
    best = max(range(len(sites)), key=lambda i: (shapes.count(shapes[i]), tokens[i], -i))
    return [site for site, shape in zip(sites, shapes) if shape == shapes[best]]


def batch_of(sites: list[Node]) -> list:
    """The shape of the reduced values of a graph's ``fused`` calls, without the last dimension."""
    return list(value(sites[0].args[0]).shape[:-1])


def experts_of(sites: list[Node]) -> list[tuple[int, int]]:
    """(experts, choices of a token) of each grouped GEMM of a graph whose experts may be cut."""
    tokens = math.prod(batch_of(sites))
    found = [(groups(node), choices_of(node, tokens)) for node in sites[0].graph.nodes]
    return [(number, choices) for number, choices in found if number and choices]


def plan_by_rule(sites: list[Node]) -> Plan:
    """The plan of a graph that is not autotuned."""
    x = value(sites[0].args[0])
    return by_rule(x.shape[-1], schedule.sms_of(x.device), experts_of(sites))


def choose_cut(sites: list[Node], options: Options, plan: Plan | None = None) -> Cut | str:
    """The cut of a graph for its ``fused`` calls and the hints of its sizes; or why it is not cut.

    plan: None takes the plan by rule
    """
    plan, batch = plan or plan_by_rule(sites), batch_of(sites)
    numbers = [n for size in batch if (n := number(size)) is not None]
    if len(numbers) < len(batch):
        return "its number of tokens depends on data"
    at = place_of_cut(numbers, options, plan)
    return at if isinstance(at, str) else cut_at(batch, at, plan)


def cut_at(batch: list, at: Place, plan: Plan) -> Cut:
    """The cut of values with this shape at this place. batch: see ``batch_of``"""
    whole = "" if at.experts else why_experts_are_whole(plan)
    return Cut(at.dim, batch[at.dim], first_half(batch[at.dim], at.rule, plan.split_ratio), plan.ctas, whole)


def number(size: int | torch.SymInt) -> int | None:
    """The number that a size has where the graph is compiled, without a guard; None if it depends on data."""
    return size if isinstance(size, int) else size.node.hint
