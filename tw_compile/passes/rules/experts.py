"""Token-axis rules of experts: rows that are sorted by expert, multiplied by the weights of their experts, and put back in order.

    keys, permutation = sort(the expert of each choice)          [S], S = tokens * choices
    rows = x[permutation // choices]                             [S, H]
    ends = cumsum(histc(keys))                                   [E]
    rows = _grouped_mm(act(_grouped_mm(rows, up, ends)), down, ends)
    rows[inverse of the permutation].view(tokens, choices, H).sum(1)

A half cannot take a part of the sorted rows: they are of all tokens. But each half can sort, count and multiply its own rows. Its row at i
is then made of the choice permutation[i] in the way in which the whole's rows are made of theirs, whichever rows lie beside it. Behind the
inverse, row j is of choice j, in the whole and in each half. This holds for any order of equal keys, so a sort need not be stable.

Values between the sort and the inverse have a TokenAxis with an ``Order``. Rules of other ops apply where they take nothing but such rows.
A value in the order of a half cannot be joined: what needs all of it makes it again for all tokens, and ``split`` then sorts whole.
"""

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import sympy
import torch
from torch.fx import Graph, Node

from ...compat import OpOverload
from ..graph_utils import RESHAPES, aten, calls, is_tensor, prims, value
from ..norms import is_number
from .functional import given
from .index import INTEGERS
from .rows import OTHER_ORDER, each_row
from .token_axis import FROM_START, Split, TokenAxis, equal, expr, expr_of, same_axis

KEYS, ROWS, PLACES, INVERSE, COUNTS, ENDS = "keys", "rows", "places", "inverse", "counts", "ends"
_SORTS = (aten.sort.default, aten.sort.stable)
# Ops that do not change what is known of a value, if they keep its entries along the token axis.
_LAYOUT = (
    *RESHAPES, prims.convert_element_type.default, aten.clone.default, aten.alias.default, aten.unsqueeze.default, aten.expand.default,
    aten.squeeze.dim, aten.squeeze.dims,
)  # fmt: skip
_ADDS = (aten.index_add.default, aten.scatter_add.default)
_GROUPED = (aten._grouped_mm.default, "transformers::grouped_mm_fallback")


@dataclass(frozen=True)
class Order:
    """What a value has of the order of a sort: of all tokens, or of a half's.

    sort: the sort, of the keys of all choices
    what: KEYS, sorted; ROWS of any data in the same order; PLACES of the rows in a value that has the order of the tokens; INVERSE, the
          place of each row of such a value among the sorted; COUNTS of each key, and ENDS, their running sum
    of:   PLACES: the unit of the value that has the order of the tokens. COUNTS, ENDS: the number of keys
    """

    sort: Node
    what: str
    of: Any = None


def is_routed(node: Node, axes: Mapping[Node, TokenAxis]) -> bool:
    """Whether a call is between the sort of experts' keys and the inverse of its permutation, or is that sort."""
    return any(isinstance(axis.order, Order) for axis in axes.values()) or _sorts(node, axes) or _counted(node) is not None


def orders_of(axis: Any) -> list[Order]:
    """What values have of the order of a sort. axis: a TokenAxis, or a tuple of them"""
    return [each.order for each in (axis if isinstance(axis, tuple) else (axis,)) if isinstance(each.order, Order)]


def routed_rule(node: Node, axes: Mapping[Node, TokenAxis]) -> Split | str:
    """As ``split_rule``, for a call that ``is_routed``."""
    if _sorts(node, axes):
        (axis,) = axes.values()
        order = Order(node, KEYS), Order(node, PLACES, expr_of(axis.unit))
        return Split(tuple(TokenAxis(0, axis.unit, each) for each in order))
    if (sort := _counted(node)) is not None and set(axes) == set(node.all_input_nodes):
        return Split(TokenAxis(0, None, Order(sort, COUNTS, node.args[1])))
    sorts = {axis.order.sort if isinstance(axis.order, Order) else axis.order for axis in axes.values() if axis.order}
    if len(sorts) != 1:
        return OTHER_ORDER
    rule = _RULES.get(node.target) or _RULES.get(_name(node))
    return (rule(node, axes) if rule else None) or _row_by_row(node, axes, sorts.pop())


def _sorts(node: Node, axes: Mapping[Node, TokenAxis]) -> bool:
    """Whether it sorts one key for each choice, in ascending order."""
    if not calls(node, *_SORTS) or value(node.args[0]).dim() != 1 or value(node.args[0]).dtype not in INTEGERS:
        return False
    axis = axes.get(node.args[0])
    return axis is not None and axis.order is None and not given(node).get("descending", False)


def _counted(node: Node) -> Node | None:
    """The sort of the keys that a call counts: how many there are of 0, 1, ..."""
    if not calls(node, aten.histc.default) or len(node.args) != 4 or node.args[2:] != (0, node.args[1] - 1):
        return None
    keys = node.args[0]
    while calls(keys, prims.convert_element_type.default, aten.clone.default) and value(keys).itemsize >= 4:  # exact for numbers of experts
        keys = keys.args[0]
    if calls(keys, operator.getitem) and keys.args[1] == 0 and calls(keys.args[0], *_SORTS):
        return keys.args[0]
    sorts = [user for user in keys.users if calls(user, *_SORTS)]
    return sorts[0] if len(sorts) == 1 else None


def _name(node: Node) -> str:
    return node.target.name() if isinstance(node.target, OpOverload) else ""


def groups(node: Node) -> int | None:
    """The number of experts whose weights a grouped GEMM of rows has; None for other calls."""
    if not calls(node, aten._grouped_mm.default) and _name(node) not in _GROUPED:
        return None
    rows, weight = map(value, node.args[:2])
    number = weight.shape[0]
    return number if (rows.dim(), weight.dim()) == (2, 3) and isinstance(number, int) else None


def choices_of(node: Node, tokens: Any) -> int | None:
    """How many rows a grouped GEMM has for each token, where the graph is compiled; None if that is not known, or for other calls."""
    sizes = value(node.args[0]).shape[0] if groups(node) else None, tokens
    rows, tokens = (size.node.hint if isinstance(size, torch.SymInt) else size for size in sizes)
    return rows // tokens if rows and tokens and rows % tokens == 0 else None


def key_sorts(graph: Graph) -> list[Node]:
    """The sorts in a graph with experts that may be of their keys."""
    found = [node for node in graph.nodes if calls(node, *_SORTS) and value(node.args[0]).dim() == 1]
    return [node for node in found if value(node.args[0]).dtype in INTEGERS] if any(map(groups, graph.nodes)) else []


# --- ops that read or change the order -------------------------------------------------------------------------------


def _what(axes: Mapping[Node, TokenAxis], a: Any, what: str) -> Order | None:
    """The order of an input, if it is ``what``, along its first dimension."""
    axis = axes.get(a) if isinstance(a, Node) else None
    order = axis.order if axis is not None and axis.dim == 0 else None
    return order if isinstance(order, Order) and order.what == what else None


def _quotient(node: Node, axes: Mapping[Node, TokenAxis]) -> Split | None:
    """The place of the token, of the place of its choice. Nothing else may be done with places: they are not those of the whole."""
    source, by = node.args[:2]
    order = _what(axes, source, PLACES)
    if order is None or node.kwargs.get("rounding_mode", "floor") != "floor" or is_tensor(by):
        return None
    unit = sympy.simplify(order.of / expr(value(by) if isinstance(by, Node) else by))
    if unit.as_numer_denom()[1] != 1 or value(node).dtype not in INTEGERS:
        return None
    return Split(replace(axes[source], order=replace(order, of=unit)))


def _taken(node: Node, axes: Mapping[Node, TokenAxis]) -> Split | None:
    """``index``: rows by their places; rows of tokens by their inverse; entries of a table by sorted keys."""
    source, indices = node.args
    if len(indices) != 1 or value(indices[0]).dim() != 1:
        return None
    (index,) = indices
    if order := _what(axes, index, PLACES):
        slices = _of_tokens(axes, source, TokenAxis(0, order.of))
        return None if slices is None else Split(TokenAxis(0, axes[index].unit, Order(order.sort, ROWS)), slices=slices)
    if _what(axes, index, INVERSE):
        return Split(TokenAxis(0, axes[index].unit)) if _what(axes, source, ROWS) or _what(axes, source, KEYS) else None
    order = _what(axes, index, KEYS) or _what(axes, index, ROWS)
    if order is None or source in axes or value(index).dtype not in INTEGERS:
        return None
    return Split(TokenAxis(0, axes[index].unit, Order(order.sort, ROWS)))


def _of_tokens(axes: Mapping[Node, TokenAxis], a: Node, axis: TokenAxis) -> dict[Any, TokenAxis] | None:
    """The slices of an input, the first one, that has an entry of ``axis`` for each token; None if it has not."""
    if a in axes:
        return {} if same_axis(axes[a], axis) else None
    return {0: axis}


def _put(node: Node, axes: Mapping[Node, TokenAxis]) -> Split | None:
    """Rows are written to their places, or added there. Numbers from 0 on at their places are the inverse."""
    if calls(node, aten.index_put.default):
        (base, (places, *others), rows), dim, at = node.args[:3], 0, 2
        if others or places is None or value(places).dim() > 1:
            return None
    else:
        (base, dim, places, rows), at = node.args[:4], 3
    order = _what(axes, places, PLACES)
    if order is None or dim % value(base).dim() != 0:
        return None
    adds = given(node).get("accumulate", node.target in _ADDS)
    axis, target = axes[places], TokenAxis(0, order.of)
    slices = _of_tokens(axes, base, target)
    if slices is None or (not adds and not equal(order.of, expr_of(axis.unit))):
        return None  # several rows have the same place
    if _what(axes, rows, ROWS):
        return Split(target, slices=slices)
    counts = calls(rows, prims.iota.default) and rows.kwargs["start"] == 0 and rows.kwargs["step"] == 1
    if adds or not counts:
        return None
    numbers = {at: TokenAxis(0, axis.unit, FROM_START)}
    return Split(replace(axis, order=Order(order.sort, INVERSE)), slices=slices | numbers)


def _sorted_places(node: Node, axes: Mapping[Node, TokenAxis]) -> Split | None:
    """``argsort`` of a permutation is its inverse."""
    order = _what(axes, node.args[0], PLACES)
    if order is None or not equal(order.of, expr_of(axes[node.args[0]].unit)) or given(node).get("descending", False):
        return None
    if value(node.args[0]).dim() != 1 or any(user.args[1] != 1 for user in node.users):
        return None
    return Split((replace(axes[node.args[0]], order=Order(order.sort, INVERSE)),) * 2)


def _running_sum(node: Node, axes: Mapping[Node, TokenAxis]) -> Split | None:
    order = _what(axes, node.args[0], COUNTS)
    return Split(TokenAxis(0, None, replace(order, what=ENDS))) if order and value(node).dim() == 1 else None


def _grouped(node: Node, axes: Mapping[Node, TokenAxis]) -> Split | str | None:
    """Each row meets the weights of its key, as the ends are of these keys."""
    named = given(node)
    rows, weight, *_ = named.values()
    ends = _what(axes, named.get("offs"), ENDS)
    if ends is None or not _what(axes, rows, ROWS) or len(axes) > 2 or (value(rows).dim(), value(weight).dim()) != (2, 3):
        return None
    if not equal(expr(value(weight).shape[0]), expr(ends.of)):
        return None
    if not _is_choice(ends.sort.args[0]):
        return "the experts of its rows may be negative numbers, which no expert has: they are not what topk or argmax returns"
    return Split(axes[rows])


def _is_choice(keys: Any) -> bool:
    """Whether keys are known to be no negative numbers: the indices of a ``topk``, also with another number for what is not chosen."""
    if calls(keys, aten.where.self):
        return all(map(_is_choice, keys.args[1:]))
    if calls(keys, aten.full.default):
        return is_number(keys.args[1]) and keys.args[1] >= 0
    if calls(keys, *_LAYOUT, aten.slice.Tensor, aten.select.int, aten.permute.default):
        return value(keys).dtype in INTEGERS and _is_choice(keys.args[0])
    of = keys.args[0] if isinstance(keys, Node) and len(keys.args) == 2 and keys.args[1] == 1 else None
    return calls(keys, aten.argmax.default) or calls(of, aten.topk.default, *_SORTS, aten.max.dim)


_RULES: dict[object, Callable[[Node, Mapping[Node, TokenAxis]], Split | str | None]] = {
    aten.div.Tensor_mode: _quotient,
    aten.floor_divide.default: _quotient,
    aten.index.Tensor: _taken,
    **dict.fromkeys((aten.index_put.default, aten.scatter.src, *_ADDS), _put),
    **dict.fromkeys(_SORTS, _sorted_places),
    aten.cumsum.default: _running_sum,
    **dict.fromkeys(_GROUPED, _grouped),
}


# --- all other ops ---------------------------------------------------------------------------------------------------


def _row_by_row(node: Node, axes: Mapping[Node, TokenAxis], sort: Node) -> Split | str:
    """The rule of an op that makes each row of its result of the same rows of its inputs."""
    whats = {axis.order.what if isinstance(axis.order, Order) else "" for axis in axes.values()}
    keeps = calls(node, *_LAYOUT) and len(whats) == 1
    if keeps and whats <= {COUNTS, ENDS} and is_tensor(node) and value(node).dim() == 1:
        return Split(next(iter(axes.values())))
    places = keeps and whats == {PLACES} and value(node).dtype in INTEGERS
    if not (whats <= {KEYS, ROWS} or places):
        return OTHER_ORDER
    first = next(axis.order for axis in axes.values() if axis.order)
    kept = keeps and value(node).dtype in (*INTEGERS, value(node.args[0]).dtype)
    return each_row(node, axes, first if kept else Order(sort, ROWS))
