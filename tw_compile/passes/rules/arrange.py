"""Token-axis rules of ops that arrange entries: copies, complex views, repetitions, and writes along another dimension."""

from torch.fx import Node

from ..graph_utils import aten, is_one, is_tensor, value
from .put import BOTH, PARTS, SCATTERS
from .token_axis import Axes, Split, TokenAxis, places, pointwise, register_token_rule, same_axis

register_token_rule(aten.copy.default)(pointwise)


@register_token_rule(aten.view_as_complex.default, aten.view_as_real.default)
def _complex(node: Node, axes: Axes) -> Split | str | None:
    """The last dimension, of real and imaginary parts, goes or comes."""
    axis = axes[node.args[0]]
    return Split(axis) if axis.dim < value(node).dim() - (node.target is aten.view_as_real.default) else None


@register_token_rule(aten.repeat.default)
def _repeat(node: Node, axes: Axes) -> Split | str | None:
    """The tokens themselves are not repeated: copies of all of them would come one after the other."""
    source, times = node.args
    axis = axes[source]
    dim = axis.dim + len(times) - value(source).dim()
    return Split(TokenAxis(dim, axis.unit)) if is_one(times[dim]) else None


@register_token_rule(*SCATTERS, *PARTS)
def _written_beside(node: Node, axes: Axes) -> Split | str | None:
    """Entries are written along another dimension than that of the tokens. All inputs have all tokens. cache.py has other writes."""
    op, rank = node.target, value(node).dim()
    position = 1 if op in SCATTERS else 2
    dim = (node.args[position] if len(node.args) > position else 0) % rank
    inputs = [(place, a) for place, a in places(node) if is_tensor(a)]
    lacking = 1 if op is aten.select_scatter.default else None  # the place of the value that lacks the dimension
    found = [TokenAxis(axes[a].dim + (place == lacking and axes[a].dim >= dim), axes[a].unit) for place, a in inputs if a in axes]
    axis = found[0]
    if axis.dim == dim or not all(same_axis(axis, other) for other in found):
        return BOTH
    slices = {place: TokenAxis(axis.dim - (place == lacking and axis.dim > dim), axis.unit) for place, a in inputs if a not in axes}
    return Split(axis, slices=slices)
