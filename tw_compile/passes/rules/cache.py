"""Writes of keys and values to a cache: a concatenation to those of earlier calls, or a write to given places of a static cache.

Within a sequence, the first half's rows are written before the second half's. So where both write to one place, the second half's row
stays there, as without a cut. The first half's queries attend to the cache between the two writes, if the mask hides the second half's
rows from them.

Between sequences, each half's entries of a static cache are written in turn, and each half is a slice of the cache. The second write
returns the whole cache. So nothing is concatenated, and Inductor can do both writes in place.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import sympy
import torch
from torch.fx import Node

from ...compat import statically_known_true
from ..emit import Emit, size_of
from ..graph_utils import aten, calls, is_tensor, is_view, prims, value
from .mask import first_row
from .per_half import PerHalf
from .put import PARTS, SCATTERS, written_by
from .token_axis import Split, TokenAxis, expr, expr_of, product, same_axis, split_rule

# Ops that, like views, may be between a cache and the attention that reads it. They do no arithmetic, and also run on what the first half
# attends to.
_COPIES = (aten.clone.default, prims.convert_element_type.default)


@dataclass(frozen=True)
class Write:
    """A call that writes rows, which are cut, to a cache. Each half writes its own rows, one after the other.

    before: the values before the rows in a concatenation, or the cache
    rows:   the rows that are written
    axis:   the token axis of the rows in the result of the call, or in a view of the result; None if it is not known
    first:  the index of the first token's row along this axis, a sympy formula, if the other tokens' rows follow it; otherwise None
    rule:   how a half writes its rows to the cache, the first argument of the call; None for a concatenation
    """

    call: Node
    before: tuple[Node, ...]
    rows: Node
    axis: TokenAxis | None
    first: Any = None
    rule: Split | None = None

    @property
    def dim(self) -> int:
        """The dimension of a concatenation."""
        assert self.axis is not None
        return self.axis.dim


@dataclass(frozen=True)
class Entries:
    """A call that writes rows to a static cache, of which the halves are entries, such as sequences.

    positions: where each entry has the rows along ``dim``, [tokens]
    rows:      the rows, with the dimensions of the cache
    axis:      the axis of the entries, in the rows and in the cache
    """

    cache: Node
    positions: Node
    rows: Node
    dim: int
    axis: TokenAxis


@dataclass(frozen=True)
class _Bound(PerHalf):
    """``start``, and as many entries as the halves before have, and the half itself if ``end``."""

    start: Any
    unit: Any
    end: bool

    def argument(self, half: int, lengths: tuple[sympy.Expr, ...], size: Callable[[Any], Any], part: Callable[[Node, int], Node]) -> Any:
        return size(self.start + sum(lengths[: half + self.end]) * expr_of(self.unit))


def write_of(node: Node, axes: Mapping[Node, TokenAxis]) -> Write | Entries | None:
    """How the halves of a call write rows to a cache; None if the call is no such write. axes: input that is cut -> its TokenAxis"""
    if calls(node, aten.cat.default):
        *before, rows = node.args[0]
        dim = (node.args[1] if len(node.args) > 1 else 0) % value(node).dim()
        last = bool(before) and set(axes) == {rows} and rows not in before and axes[rows].dim == dim
        first = sum(product([value(a).shape[dim]]) for a in before)
        return Write(node, tuple(before), rows, axes[rows], first) if last else None
    if not (calls(node, aten.index_put.default, *SCATTERS) or calls(node, PARTS[0])) or node.args[0] in axes or node.kwargs:
        return None
    if calls(node, aten.index_put.default):
        return _put(node, axes)
    return _slice(node, axes) if calls(node, PARTS[0]) else _scatter(node, axes)


def _put(node: Node, axes: Mapping[Node, TokenAxis]) -> Write | Entries | None:
    """``cache[..., indices, ...] = rows``"""
    cache, indices, rows = node.args[:3]
    written = written_by(node)
    if written is None:
        return None
    axis, *others = written.axes(node, axes)
    if not all(same_axis(axis, other) for other in others):
        return None
    given = [index for index in indices if index is not None]
    single = given[0] if len(given) == 1 and value(given[0]).dim() == 1 else None
    if written.first <= axis.dim < written.first + written.rank:
        in_result = TokenAxis(written.first, axis.unit) if single is not None else None
        first = first_row(single) if single is not None else None
        return Write(node, (cache,), rows, in_result, first, Split(axis, slices=written.slices(node, axis)))
    if single is None or single in axes or value(rows).dim() != value(cache).dim() or any(node.args[3:]):
        return None
    return Entries(cache, single, rows, written.first, axis)


def _scatter(node: Node, axes: Mapping[Node, TokenAxis]) -> Write | None:
    """``cache.scatter(dim, index, rows)``, along the tokens: index and rows have the dimensions of the cache."""
    cache, dim, index, rows = node.args
    axis = next(iter(axes.values()))
    if axis.dim != dim % value(cache).dim() or not all(same_axis(axis, other) for other in axes.values()):
        return None
    slices = {place: axis for place, a in ((2, index), (3, rows)) if is_tensor(a)}
    return Write(node, (cache,), rows if is_tensor(rows) else index, axis, first_row(index, axis.dim), Split(axis, slices=slices))


def _slice(node: Node, axes: Mapping[Node, TokenAxis]) -> Write | None:
    """``cache[..., start:end, ...] = rows``, along the tokens"""
    (cache, rows), dim, start, step = node.args[:2], _argument(node, 2, 0), _argument(node, 3, 0), _argument(node, 5, 1)
    size, axis = value(cache).shape[dim], axes[rows]
    start = value(start) if isinstance(start, Node) else start or 0
    if isinstance(start, int) and start < 0:
        start = start + size
    if axis.dim != dim % value(cache).dim() or step != 1 or not statically_known_true(start >= 0):
        return None
    bounds = (_Bound(expr(start), axis.unit, end) for end in (False, True))
    return Write(node, (cache,), rows, axis, expr(start), Split(axis, args=(cache, rows, dim, *bounds)))


def _argument(node: Node, place: int, default: int) -> Any:
    return node.args[place] if len(node.args) > place else default


def view_of(write: Write, node: Node) -> Write | None:
    """The write, with the axis in the result of ``node``, if that is a view or copy of the write's result, or has it as a part."""
    if calls(node, *PARTS):
        return replace(write, axis=None)
    if node.op != "call_function" or not (is_view(node.target) or calls(node, *_COPIES)) or not isinstance(node.args[0], Node):
        return None
    if write.axis is None:
        return write
    rule = layout_rule(node, write.axis)
    return replace(write, axis=rule.axis) if isinstance(rule, Split) and isinstance(rule.axis, TokenAxis) else None


def layout_rule(node: Node, axis: TokenAxis) -> Split | str:
    """As ``split_rule``, of a view or copy of a cache. The first rows of a cache are still those that they were."""
    is_slice = calls(node, aten.slice.Tensor) and len(node.args) < 5 and node.args[1] % value(node).dim() == axis.dim
    return Split(axis) if is_slice and node.args[2:3] in ((), (0,)) else split_rule(node, {node.args[0]: axis})


def first_key(keys: Write, values: Write) -> Any:
    """The index of the first token's row in keys and values, as a sympy formula; None if unknown. The other tokens follow it."""
    return keys.first if keys.axis is not None and (keys.axis, keys.first) == (values.axis, values.first) else None


def put_entries(emit: Emit, write: Entries, cache: Node, rows: Node, first: int | Node) -> Node:
    """A cache with rows written to its entries first, first + 1, … of the axis of ``write``."""
    last = max(write.dim, write.axis.dim)

    def along(d: int) -> Node:
        """The index of dimension ``d``, in a shape that broadcasts with the others."""
        start, like = (first, rows) if d == write.axis.dim else (0, cache)
        how: dict[str, Any] = dict(start=start, step=1, dtype=torch.int64, device=value(cache).device, requires_grad=False)
        index = write.positions if d == write.dim else emit(prims.iota.default, size_of(emit, like, d), **how)
        return emit(aten.reshape.default, index, [-1] + [1] * (last - d)) if d < last else index

    return emit(aten.index_put.default, cache, [along(d) for d in range(last + 1)], rows)
