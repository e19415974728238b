"""The rule of ops whose inputs have rows in another order than that of the tokens: see experts.py and copies.py."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch.fx import Node

from ..find import communicates
from .per_half import PerHalf
from .token_axis import Split, TokenAxis, equal, expr_of, map_places, split_rule

OTHER_ORDER = "its rows are not in the order of the tokens, and it does more than to change each row"


def each_row(node: Node, axes: Mapping[Node, TokenAxis], order: Any) -> Split | str:
    """The rule of a call that makes each row of its results of the same rows of its inputs, which all have this order."""
    units = [axis.unit for axis in axes.values()]
    rule = split_rule(node, {a: TokenAxis(axis.dim, axis.unit) for a, axis in axes.items()})
    if isinstance(rule, str):
        return rule
    results = rule.axis if isinstance(rule.axis, tuple) else (rule.axis,)
    alike = all(equal(expr_of(axis.unit), expr_of(units[0])) for axis in results)
    if communicates(node) or rule.slices or rule.whole or rule.agrees or _differs(rule) or not alike:
        return OTHER_ORDER
    ordered = tuple(replace(axis, order=order) for axis in results)
    return replace(rule, axis=ordered if isinstance(rule.axis, tuple) else ordered[0])


def _differs(rule: Split) -> bool:
    """Whether the arguments of the calls for the halves differ in more than the inputs."""
    found: list[object] = []
    map_places(lambda _, a: found.append(a), rule.args or (), rule.kwargs or {})
    return any(isinstance(a, PerHalf) for a in found)
