"""A rewritten graph -> the same graph, with collectives in halves where the other ranks have them so.

For a rank that compiles anew alone, over the process group: what others have on the wire is known, and a rank whose graph does not
allow a site, as it reads the sum itself, takes part in its two halves all the same.
"""

import math

import sympy
from torch.fx import Node

from ..compat import detect_fake_mode
from .cut import Cut
from .emit import Emitter
from .fuse import summed
from .graph_utils import WAIT, aten, c10d, value
from .rules.token_axis import expr


def halve(node: Node, cut: Cut) -> bool:
    """Make two calls of an all-reduce, in place: of the entries in front of the cut, and of the others. Whether it can be done."""
    x = value(node.args[0]) if node.target is c10d.all_reduce.default else None
    entries = sympy.simplify(expr(math.prod(x.shape)) / expr(cut.length)) if x is not None else sympy.nan
    if x is None or entries.as_numer_denom()[1] != 1:
        return False
    graph, done = node.graph, summed(node)
    emit = Emitter(graph, detect_fake_mode([x]))
    emit.like = node
    with graph.inserting_before(node):
        at = [emit.size(expr(n) * entries) for n in (0, cut.first, cut.length)]
        flat, parts = emit(aten.reshape.default, node.args[0], [-1]), []
        for emit.half, first, end in zip((0, 1), at, at[1:]):
            part = emit(aten.slice.Tensor, flat, 0, first, end)
            parts.append(emit(WAIT, emit(node.target, part, *node.args[1:])))
        emit.half = None
        whole = emit(aten.reshape.default, emit(aten.cat.default, parts), [emit.size(n) for n in x.shape])
    done.replace_all_uses_with(whole)
    for old in (done, node):
        if not old.users:
            graph.erase_node(old)
    return True
