"""Writes by index tensors, ``base[..., indices, ...] = rows``: which dimension of each input is which of what is written.

What is written has the dimensions of the base. In place of those that have an index, it has those of all indices, broadcast.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from torch.fx import Node

from ..graph_utils import aten, is_one, is_tensor, value
from .mask import INDEX
from .token_axis import Axes, Split, TokenAxis, places, register_token_rule, same_axis

BOTH = "it may write an entry of either half"

# Other ops that write: by an index along one dimension, and to a part.
SCATTERS = (aten.scatter.src, aten.scatter.value, aten.scatter_add.default)
PARTS = (aten.slice_scatter.default, aten.select_scatter.default)


@dataclass(frozen=True)
class Written:
    """The dimensions of what an ``index_put`` writes.

    first:  the first dimension of the indices
    rank:   how many dimensions the indices have
    shifts: place of an input, other than the base -> its dimension 0 as one of what is written. (1, i) is the place of an index
    dims:   those of the base that have no index -> the same of what is written
    """

    first: int
    rank: int
    shifts: Mapping[object, int]
    dims: Mapping[int, int]

    def axes(self, node: Node, axes: Mapping[Node, TokenAxis]) -> list[TokenAxis]:
        """The token axes of the inputs other than the base, as axes of what is written. axes: input that is cut -> its TokenAxis"""
        inputs = [(self.shifts[place], axes[a]) for place, a in places(node) if place in self.shifts and a in axes]
        return [TokenAxis(shift + axis.dim, axis.unit) for shift, axis in inputs]

    def slices(self, node: Node, axis: TokenAxis) -> dict[object, TokenAxis]:
        """Place of an input, other than the base, -> the axis along which a half takes a part of it."""
        found = {}
        for place, a in places(node):
            dim = axis.dim - self.shifts.get(place, axis.dim + 1)
            if is_tensor(a) and 0 <= dim < value(a).dim() and not is_one(value(a).shape[dim]):
                found[place] = TokenAxis(dim, axis.unit)
        return found


def written_by(node: Node) -> Written | None:
    """What an ``index_put`` writes; None if an index is a mask."""
    base, indices, rows = node.args[:3]
    given = {dim: index for dim, index in enumerate(indices) if index is not None}
    if any(value(index).dtype not in INDEX for index in given.values()):
        return None
    rank, kept = max(value(index).dim() for index in given.values()), [d for d in range(value(base).dim()) if d not in given]
    adjacent = max(given) - min(given) + 1 == len(given)
    first = min(given) if adjacent else 0
    shifts: dict[object, int] = {(1, dim): first + rank - value(index).dim() for dim, index in given.items()}
    shifts[2] = rank + len(kept) - value(rows).dim()
    return Written(first, rank, shifts, {d: i if i < first else i + rank for i, d in enumerate(kept)})


@register_token_rule(aten.index_put.default)
def _index_put(node: Node, axes: Axes) -> Split | str | None:
    """The base is cut, along a dimension that has no index. cache.py has writes to a base that is not cut."""
    base, written = node.args[0], written_by(node)
    if written is None or base not in axes or axes[base].dim not in written.dims:
        return BOTH
    axis = TokenAxis(written.dims[axes[base].dim], axes[base].unit)
    if not all(same_axis(axis, other) for other in written.axes(node, axes)):
        return BOTH
    return Split(axes[base], slices=written.slices(node, axis))
