"""Rewritten graph -> the same graph, with an all-reduce in two halves where the other ranks run it in two halves.

This is for a rank that compiles again alone, over the process group, and knows which collectives the other ranks run. If its graph
reads the sum itself, there can be no site. The rank then still runs the two collectives of the other ranks.
"""

import itertools
import math

import sympy
from torch.fx import Node

from ..compat import detect_fake_mode, free_unbacked_symbols
from .cut import Cut
from .emit import Emitter
from .fuse import summed
from .graph_utils import WAIT, aten, c10d, value
from .rules.token_axis import expr


def halve(node: Node, cut: Cut) -> bool:
    """Replace an all-reduce by two, in place: one of the entries before the cut, one of the others. Returns whether that is possible."""
    x = value(node.args[0]) if node.target is c10d.all_reduce.default else None
    entries = sympy.simplify(expr(math.prod(x.shape)) / expr(cut.length)) if x is not None else sympy.nan
    if x is None or entries.as_numer_denom()[1] != 1 or free_unbacked_symbols(x):
        return False
    graph, done = node.graph, summed(node)
    emit = Emitter(graph, detect_fake_mode([x]))
    emit.like = node
    with graph.inserting_before(node):
        at = [emit.size(expr(n) * entries) for n in (0, cut.first, cut.length)]
        flat, parts = emit(aten.reshape.default, node.args[0], [-1]), []
        for half, (first, end) in enumerate(itertools.pairwise(at)):
            emit.half = half
            part = emit(aten.slice.Tensor, flat, 0, first, end)
            parts.append(emit(WAIT, emit(node.target, part, *node.args[1:])))
        emit.half = None
        whole = emit(aten.reshape.default, emit(aten.cat.default, parts), [emit.size(n) for n in x.shape])
    done.replace_all_uses_with(whole)
    for old in (done, node):
        if not old.users:
            graph.erase_node(old)
    return True
