"""Adding nodes to a graph together with their fake values, sizes included."""

import operator

import sympy
import torch
from torch.fx import Graph, Node
from torch.fx.node import map_arg

from ..compat import FloorDiv
from .graph_utils import aten, value


class Emitter:
    """Appends calls to ``graph``, whose placeholders are there already.

    like: the node whose place in the model's source the next calls take over; set by the caller
    half: 0 or 1 where the next calls belong to one half, else None; set by the caller
    """

    def __init__(self, graph: Graph, fake_mode):
        self.graph, self.fake_mode = graph, fake_mode
        self.like, self.half = None, None
        self.sizes = {}  # sympy expression -> what computes it

    def __call__(self, target, *args, **kwargs) -> Node:
        node = self.graph.call_function(target, args, kwargs)
        fake_args, fake_kwargs = map_arg((args, kwargs), value)
        node.meta = {k: v for k, v in (self.like.meta if self.like else {}).items() if k in ("stack_trace", "nn_module_stack")}
        if self.like is not None:
            node.meta["of"] = self.like.name  # by which values are compared (verify.py)
        with self.fake_mode:
            node.meta["val"] = target(*fake_args, **fake_kwargs)
        node.meta["half"] = self.half
        return node

    def size(self, size):
        """An int or SymInt or sympy expression as what an op's argument can be: an int, or a node that computes it."""
        size = size.node.expr if isinstance(size, torch.SymInt) else sympy.sympify(size)
        if size not in self.sizes:
            half, self.half = self.half, None
            self.sizes[size] = self._compute(size)
            self.half = half
        return self.sizes[size]

    def _compute(self, size):
        if size.is_Integer:
            return int(size)
        if size.is_Symbol:
            for node in self.graph.find_nodes(op="placeholder"):
                if isinstance(value(node), torch.SymInt) and value(node).node.expr == size:
                    return node
            raise KeyError(f"no input of the graph is the size {size}")
        if isinstance(size, FloorDiv):
            return self(operator.floordiv, *map(self.size, size.args))
        if size.is_Pow and size.exp.is_Integer and size.exp > 0:
            return self(operator.pow, self.size(size.base), int(size.exp))
        if size.is_Add or size.is_Mul:
            first, *rest = map(self.size, size.args)
            for other in rest:
                first = self(operator.add if size.is_Add else operator.mul, first, other)
            return first
        raise KeyError(f"cannot compute the size {size}")


def size_of(emit, node: Node, dim: int):
    """A size of a value as an op's argument. emit: a function (target, *args) -> Node"""
    size = value(node).shape[dim]
    return size if isinstance(size, int) else emit(aten.sym_size.int, node, dim)
