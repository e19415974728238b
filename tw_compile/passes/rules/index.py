"""Token-axis rules of ops that read entries by an index."""

import torch
from torch.fx import Node

from ..graph_utils import aten, value
from .token_axis import Axes, Split, TokenAxis, register_token_rule, same_axis

INTEGERS = (torch.int32, torch.int64)


@register_token_rule(aten.embedding.default)
def _embedding(node: Node, axes: Axes) -> Split | str | None:
    table, ids = node.args[:2]
    return Split(axes[ids]) if ids in axes and table not in axes else None


@register_token_rule(aten.gather.default)
def _gather(node: Node, axes: Axes) -> Split | str | None:
    source, dim, index = node.args[:3]
    found = list(axes.values())
    if dim % value(node).dim() == found[0].dim or not all(same_axis(found[0], other) for other in found):
        return None
    return Split(found[0], slices={i: found[0] for i, a in ((0, source), (2, index)) if a not in axes})


@register_token_rule(aten.index.Tensor)
def _index(node: Node, axes: Axes) -> Split | str | None:
    """One index, which has an entry for each token; or which is along another dimension than that of the tokens."""
    source, indices = node.args
    given = [(dim, index) for dim, index in enumerate(indices) if index is not None]
    if len(given) > 1 or value(given[0][1]).dtype not in INTEGERS:
        return None
    ((dim, index),) = given
    if source not in axes:
        return Split(TokenAxis(dim + axes[index].dim, axes[index].unit))
    if index in axes or axes[source].dim == dim:
        return "its index may take an entry of either half"
    moved = value(index).dim() - 1 if axes[source].dim > dim else 0
    return Split(TokenAxis(axes[source].dim + moved, axes[source].unit))
