"""Token-axis rules of ops of linear algebra: GEMMs that add to a value, convolutions, triangular systems."""

from torch.fx import Node

from ..graph_utils import aten, is_one, value
from .token_axis import Axes, Split, TokenAxis, register_token_rule, same_axis


@register_token_rule(aten.baddbmm.default)
def _baddbmm(node: Node, axes: Axes) -> Split | str | None:
    """As ``bmm``, of which the tokens are the batch or the rows; what is added is broadcast to the result."""
    added, a, b = node.args[:3]
    axis = axes.get(a)
    if axis is None or axis.dim == 2 or (b in axes and (axis.dim == 0) != (axes[b].dim == 0)):
        return None
    whole = frozenset([2] if axis.dim == 1 and b in axes else [])  # each query needs all keys
    slices = {2: axis} if axis.dim == 0 and b not in axes else {}
    dim = axis.dim - (3 - value(added).dim())
    if added in axes:
        return Split(axis, whole, slices) if same_axis(axes[added], TokenAxis(dim, axis.unit)) else None
    if dim >= 0 and not is_one(value(added).shape[dim]):
        slices |= {0: TokenAxis(dim, axis.unit)}
    return Split(axis, whole, slices)


@register_token_rule(aten.convolution.default)
def _convolution(node: Node, axes: Axes) -> Split | str | None:
    """The tokens are the batch, or a dimension along which the kernel has one entry: it then combines the channels of each token."""
    source, weight, _, stride, padding, _, transposed = node.args[:7]
    axis = axes.get(source)
    if axis is None or len(axes) > 1 or axis.dim == 1:
        return None
    if axis.dim > 1:
        i = min(axis.dim - 2, len(stride) - 1)
        alone = is_one(value(weight).shape[axis.dim]) and stride[i] == 1 and padding[min(i, len(padding) - 1)] == 0
        if not alone or transposed:
            return None
    return Split(axis)


@register_token_rule(aten.linalg_solve_triangular.default)
def _solve(node: Node, axes: Axes) -> Split | str | None:
    """The tokens are a batch dimension of both sides."""
    (a, b), rank = node.args[:2], value(node).dim()
    axis = next(iter(axes.values()))
    if axis.dim >= rank - 2 or value(a).dim() != value(b).dim() or not all(same_axis(axis, other) for other in axes.values()):
        return None
    uncut = {i: axis for i, side in enumerate((a, b)) if side not in axes and not is_one(value(side).shape[axis.dim])}
    return Split(axis, slices=uncut)
