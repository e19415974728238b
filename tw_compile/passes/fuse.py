"""[Match] -> graph: each site becomes one call of ``tokenweave.fused``, on the compute stream and not split."""

import operator
from collections.abc import Callable
from typing import Any

from torch.fx import Graph, Node

from .. import ops
from ..site import SLOT_WHOLE
from .find import Match, stays
from .graph_utils import RESHAPES, WAIT, aten, calls, in_order, same_shape, sort_and_clean, value


def fuse(graph: Graph, matches: list[Match], transport: str, ctas: int) -> list[Node]:
    """Replace each match by a ``fused`` call, in place. Returns the calls in the order of the matches.

    A call has the place of its all-reduce in the order of the collectives. No other collective is removed.

    ctas: CTAs of the kernel; 0 leaves the number to the kernel
    """
    replaced = {node for match in matches for node in (match.all_reduce, summed(match.all_reduce))}
    # From the last site to the first, so that the residual of a site is still the node that its match contains.
    calls_of = {m: _replace(graph, m, i, transport, ctas) for i, m in reversed(list(enumerate(matches)))}
    sort_and_clean(graph, lambda node: stays(node) and node not in replaced)
    return [calls_of[m] for m in matches]


def _replace(graph: Graph, match: Match, index: int, transport: str, ctas: int) -> Node:
    def emit(target: Callable, *args: Any, meta: Node, val: Any = None) -> Node:
        node = graph.call_function(target, args)
        node.meta = {**meta.meta, "val": value(meta) if val is None else val}
        return node

    norm, total = match.norm, match.total
    dtype = value(match.x).dtype
    results = value(total).to(dtype), value(total)
    with graph.inserting_before(match.all_reduce):
        x, done = match.x, summed(match.all_reduce)
        for step in match.linear:
            x, done = emit(step.target, *[x if a is done else a for a in step.args], meta=step), step
        named = dict(
            x=x, residual=match.residual, weight=norm.weight, bias=match.bias, shift=norm.shift,
            eps=norm.eps, scale=match.scale, offset=norm.offset, center=norm.center,
            group=match.group, transport=transport, ctas=ctas, slot=SLOT_WHOLE, site=index,
            fp32_residual=results[1].dtype != dtype, sharded_residual=False, in_workspace=False, quantise="", static_scale=None,
        )  # fmt: skip
        call = emit(ops.fused, *in_order(ops.fused, named), meta=total, val=results)
        normed = emit(operator.getitem, call, 0, meta=total, val=results[0])
        residual = emit(operator.getitem, call, 1, meta=total)
        if not same_shape(value(norm.output).shape, value(total).shape):
            view = _view_before(norm.output, total)
            normed = emit(aten.reshape.default, normed, view.args[1], meta=norm.output)
    norm.output.replace_all_uses_with(normed)
    total.replace_all_uses_with(residual, delete_user_cb=lambda user: user is not call)
    return call


def summed(all_reduce: Node) -> Node:
    """The node of the sum: the wait of an asynchronous all-reduce, or the all-reduce itself."""
    waits = [user for user in all_reduce.users if calls(user, WAIT)]
    return waits[0] if waits else all_reduce


def _view_before(output: Node, total: Node) -> Node:
    """The reshape of ``total`` that the norm reads."""
    shape = value(output).shape
    return next(u for u in total.users if calls(u, *RESHAPES) and same_shape(value(u).shape, shape))
