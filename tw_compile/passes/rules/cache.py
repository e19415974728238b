"""Keys and values written to a cache: behind those of earlier calls by concatenation, or at given positions of a static cache.

Cut within a sequence, the second half's rows are written after the first half's. What there is in between is all that the
first half's queries need, where the mask hides the second half's rows from them.

Cut between sequences, a static cache is written in two steps too, each at the entries of its half, of which the half is a
slice. The last step returns the whole cache, so nothing is concatenated, and Inductor can do both steps in place.
"""

from dataclasses import dataclass, replace

import torch
from torch.fx import Node

from ..emit import size_of
from ..graph_utils import aten, calls, is_tensor, is_view, prims, value
from .mask import INDEX, first_row
from .token_axis import Split, TokenAxis, product, split_rule

# What may stand between a cache and the attention that reads it, beside views. It is done for the first half too, and takes no
# arithmetic.
_COPIES = (aten.clone.default, prims.convert_element_type.default)


@dataclass(frozen=True)
class Write:
    """A call that writes ``rows``, which are cut, along dimension ``dim``: each half can write its own.

    before:    what is concatenated in front of the rows, or the one cache into which they are put
    axis:      along which the rows are cut; where the call's result has them, or a view of it that is looked at
    positions: where the rows are put, [tokens]; None for a concatenation
    """

    call: Node
    before: tuple[Node, ...]
    rows: Node
    dim: int
    axis: TokenAxis
    positions: Node | None = None


def write_of(node: Node, axes) -> Write | None:
    """The write that a call is, if it is one. axes: the TokenAxis of each input that is cut."""
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
    """The same write as a call on its result shows it, if that is another view of it."""
    is_layout = node.op == "call_function" and (is_view(node.target) or calls(node, *_COPIES)) and isinstance(node.args[0], Node)
    rule = split_rule(node, {node.args[0]: write.axis}) if is_layout else None
    return replace(write, axis=rule.axis) if isinstance(rule, Split) and isinstance(rule.axis, TokenAxis) else None


def first_key(keys: Write, values: Write):
    """The row of the first token among keys and values, as a formula; the other tokens follow. None where it is not known."""
    if keys.axis != values.axis:
        return None
    if keys.positions is None and values.positions is None:
        return sum(product([value(node).shape[keys.dim]]) for node in keys.before)  # values have as many rows as keys
    rows = [write.positions and first_row(write.positions) for write in (keys, values)]
    return rows[0] if rows[0] == rows[1] else None


def put_entries(emit, cache: Node, positions: Node, rows: Node, dim: int, first) -> Node:
    """``cache`` with ``rows`` [count, …, tokens, …] put at ``positions`` of the entries first, first + 1, … of dimension 0.

    emit: a function (target, *args, **kwargs) -> Node
    dim:  of the tokens
    """
    indices = [_iota(emit, rows, 0, dim, first), *(_iota(emit, cache, d, dim) for d in range(1, dim))]
    return emit(aten.index_put.default, cache, [*indices, positions], rows)


def _iota(emit, like: Node, d: int, dim: int, start=0) -> Node:
    """start, start + 1, … for each entry of dimension ``d``, to be broadcast with an index of dimension ``dim``."""
    how = dict(start=start, step=1, dtype=torch.int64, device=value(like).device, requires_grad=False)
    return emit(aten.reshape.default, emit(prims.iota.default, size_of(emit, like, d), **how), [-1] + [1] * (dim - d))
