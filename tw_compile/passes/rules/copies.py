"""Token-axis rules of rows of several copies of all tokens, one copy after the other: of experts that each get all tokens.

    x.repeat(experts, 1)                           [experts * tokens, H]
    scores.transpose(0, 1).reshape(-1, 1)          [experts * tokens, 1]
    rows.view(experts, -1, H)                      [experts, tokens, H]

A half of such a value has the copies of its own tokens. It has no place in the whole, so the halves cannot be joined by a concatenation.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import sympy
from torch.fx import Node

from ..graph_utils import RESHAPES, aten, calls, is_one, value
from .rows import OTHER_ORDER, each_row
from .token_axis import Split, TokenAxis, equal, expr_of, product, split_rule


@dataclass(frozen=True)
class Copies:
    """The order of a value that has ``number`` copies of all tokens, one after the other."""

    number: int


def is_copied(node: Node, axes: Mapping[Node, TokenAxis]) -> bool:
    """Whether a call makes or takes copies of all tokens."""
    if any(isinstance(axis.order, Copies) for axis in axes.values()):
        return True
    return calls(node, aten.repeat.default, *RESHAPES) and isinstance(split_rule(node, axes), str) and _copied(node, axes) is not None


def copied_rule(node: Node, axes: Mapping[Node, TokenAxis]) -> Split | str:
    """As ``split_rule``, for a call that ``is_copied``."""
    orders = {axis.order for axis in axes.values()}
    if len(orders) > 1:
        return OTHER_ORDER
    (order,) = orders
    if order is None:
        return _copied(node, axes) or OTHER_ORDER
    if calls(node, *RESHAPES):
        return _taken_apart(node, axes[node.args[0]]) or each_row(node, axes, order)
    return each_row(node, axes, order)


def _copied(node: Node, axes: Mapping[Node, TokenAxis]) -> Split | None:
    """How a call makes copies that come one after the other."""
    source, shape = node.args[0], value(node).shape
    axis, before = axes[source], value(source).shape
    if axis.order is not None:
        return None
    if calls(node, aten.repeat.default):
        times = node.args[1]
        dim = axis.dim + len(times) - len(before)
        number = times[dim]
        return Split(_axis(dim, axis.unit, number)) if isinstance(number, int) and all(map(is_one, shape[:dim])) else None
    outer = product(before[: axis.dim])
    dim = next((i for i, size in enumerate(shape) if not is_one(size)), 0)
    unit = sympy.simplify(expr_of(axis.unit) * product(before[axis.dim + 1 :]) / product(shape[dim + 1 :]))
    if not outer.is_Integer or outer < 2 or unit.as_numer_denom()[1] != 1:
        return None
    return _reshaped(node, dim, _axis(dim, unit, int(outer)))


def _taken_apart(node: Node, axis: TokenAxis) -> Split | None:
    """A reshape with a dimension for the copies, and one for the tokens."""
    before, shape = value(node.args[0]).shape, value(node).shape
    outer = product(before[: axis.dim]) * axis.order.number
    for dim, size in enumerate(shape):
        unit = sympy.simplify(expr_of(axis.unit) * product(before[axis.dim + 1 :]) / axis.order.number / product(shape[dim + 1 :]))
        if not is_one(size) and equal(product(shape[:dim]), outer) and unit.as_numer_denom()[1] == 1:
            return _reshaped(node, dim, TokenAxis(dim, unit))
    return None


def _axis(dim: int, unit: object, number: int) -> TokenAxis:
    return TokenAxis(dim, expr_of(unit) * number, Copies(number))


def _reshaped(node: Node, dim: int, axis: TokenAxis) -> Split:
    """A reshape, of which one dimension has another size in each half."""
    shape = value(node).shape
    sizes = [shape[i] if isinstance(size, int) and size == -1 else size for i, size in enumerate(node.args[1])]
    sizes[dim] = -1
    return Split(axis, args=(node.args[0], sizes))
