"""Writes of keys and values to a cache: a concatenation to those of earlier calls, or a write at given positions of a static cache.

Within a sequence, the first half's rows are written before the second half's. The first half's queries attend to the cache between the
two writes, if the mask hides the second half's rows from them.

Between sequences, each half's entries of a static cache are written in turn, and each half is a slice of the cache. The second write
returns the whole cache. So nothing is concatenated, and Inductor can do both writes in place.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import Node

from ..emit import Emit, size_of
from ..graph_utils import aten, calls, is_tensor, is_view, prims, value
from .mask import INDEX, first_row
from .token_axis import Split, TokenAxis, product, split_rule

# Ops that, like views, may be between a cache and the attention that reads it. They do no arithmetic, and also run on what the first half
# attends to.
_COPIES = (aten.clone.default, prims.convert_element_type.default)


@dataclass(frozen=True)
class Write:
    """A call that writes rows, which are cut, to a cache. Each half can write its own rows.

    before:    the values before the rows in a concatenation, or the cache
    rows:      the rows that are written
    dim:       the dimension along which they are written
    axis:      the token axis of the rows in the result of the call, or in a view of the result
    positions: where the rows are written, [tokens]; None for a concatenation
    """

    call: Node
    before: tuple[Node, ...]
    rows: Node
    dim: int
    axis: TokenAxis
    positions: Node | None = None


def write_of(node: Node, axes: Mapping[Node, TokenAxis]) -> Write | None:
    """The Write that a call is, or None. axes: input that is cut -> its TokenAxis"""
    if calls(node, aten.cat.default):
        *before, rows = node.args[0]
        dim = (node.args[1] if len(node.args) > 1 else 0) % value(node).dim()
        last = bool(before) and set(axes) == {rows} and rows not in before and axes[rows].dim == dim
        return Write(node, tuple(before), rows, dim, axes[rows]) if last else None
    if calls(node, aten.index_put.default) and len(node.args) == 3 and not node.kwargs:
        cache, (*others, positions), rows = node.args
        is_index = is_tensor(positions) and value(positions).dim() == 1 and value(positions).dtype in INDEX
        if not is_index or any(others) or positions in axes or rows not in axes or value(rows).dim() != value(cache).dim():
            return None
        dim, axis = len(others), axes[rows]
        return Write(node, (cache,), rows, dim, axis, positions) if axis.dim in (0, dim) else None
    return None


def view_of(write: Write, node: Node) -> Write | None:
    """The write, with the axis in the result of ``node``, if that is a view or copy of the write's result; otherwise None."""
    is_layout = node.op == "call_function" and (is_view(node.target) or calls(node, *_COPIES)) and isinstance(node.args[0], Node)
    rule = split_rule(node, {node.args[0]: write.axis}) if is_layout else None
    return replace(write, axis=rule.axis) if isinstance(rule, Split) and isinstance(rule.axis, TokenAxis) else None


def first_key(keys: Write, values: Write) -> Any:
    """The index of the first token's row in keys and values, as a sympy formula; None if unknown. The other tokens follow it."""
    if keys.axis != values.axis:
        return None
    if keys.positions is None and values.positions is None:
        return sum(product([value(node).shape[keys.dim]]) for node in keys.before)  # values have as many rows as keys
    rows = [write.positions and first_row(write.positions) for write in (keys, values)]
    return rows[0] if rows[0] == rows[1] else None


def put_entries(emit: Emit, cache: Node, positions: Node, rows: Node, dim: int, first: int | Node) -> Node:
    """A cache with rows written to its entries first, first + 1, … of dimension 0.

    positions: where each entry has the rows along ``dim``, [tokens]
    rows:      [entries, …, tokens, …]
    dim:       the dimension of the tokens
    """
    indices = [_iota(emit, rows, 0, dim, first), *(_iota(emit, cache, d, dim) for d in range(1, dim))]
    return emit(aten.index_put.default, cache, [*indices, positions], rows)


def _iota(emit: Emit, like: Node, d: int, dim: int, start: int | Node = 0) -> Node:
    """start, start + 1, … for each entry of dimension ``d``, in a shape that broadcasts with the index of dimension ``dim``."""
    how: dict[str, Any] = dict(start=start, step=1, dtype=torch.int64, device=value(like).device, requires_grad=False)
    return emit(aten.reshape.default, emit(prims.iota.default, size_of(emit, like, d), **how), [-1] + [1] * (dim - d))
