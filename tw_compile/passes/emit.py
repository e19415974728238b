"""Adding nodes to a graph together with their fake values, and nodes that compute sizes."""

import operator
from collections.abc import Callable
from typing import Any

import sympy
import torch
from torch.fx import Graph, Node
from torch.fx.node import map_arg

from ..compat import FloorDiv, OpOverload, get_layout_constraint_tag
from .graph_utils import aten, value

# Adds a call to a graph: (target, *args, **kwargs) -> Node.
Emit = Callable[..., Node]


class Emitter:
    """Adds calls to ``graph``, which has its placeholders already.

    Callers set these two:
    like: the node from which the next calls take their place in the model's source
    half: 0 or 1 if the next calls belong to a half, otherwise None
    """

    def __init__(self, graph: Graph, fake_mode: Any):
        self.graph, self.fake_mode = graph, fake_mode
        self.like: Node | None = None
        self.half: int | None = None
        self.sizes: dict[sympy.Expr, int | Node] = {}  # a size -> the number, or the node that computes it

    def __call__(self, target: Callable, *args: Any, **kwargs: Any) -> Node:
        node = self.graph.call_function(target, args, kwargs)
        fake_args, fake_kwargs = map_arg((args, kwargs), value)
        node.meta = {k: v for k, v in (self.like.meta if self.like else {}).items() if k in ("stack_trace", "nn_module_stack")}
        if self.like is not None:
            node.meta["of"] = self.like.name  # verify.py compares the values of both
        with self.fake_mode:
            node.meta["val"] = target(*fake_args, **fake_kwargs)
        node.meta["half"] = self.half
        keep_strides(node)
        return node

    def size(self, size: int | torch.SymInt | sympy.Expr) -> int | Node:
        """A size as an argument of an op: an int, or a node that computes it."""
        size = size.node.expr if isinstance(size, torch.SymInt) else sympy.sympify(size)
        if size not in self.sizes:
            half, self.half = self.half, None
            self.sizes[size] = self._compute(size)
            self.half = half
        return self.sizes[size]

    def _compute(self, size: sympy.Expr) -> int | Node:
        if size.is_Integer:
            return int(size)
        if size.is_Symbol:
            for node in self.graph.find_nodes(op="placeholder"):
                if isinstance(value(node), torch.SymInt) and value(node).node.expr == size:
                    return node
            raise KeyError(f"no input of the graph has the size {size}")
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


def keep_strides(node: Node) -> None:
    """Let Inductor give a call of an op that needs it the strides of its inputs that they have in the graph, as AOTAutograd does."""
    if isinstance(node.target, OpOverload) and get_layout_constraint_tag(node.target) == torch.Tag.needs_exact_strides:
        node.meta["eager_input_vals"] = map_arg((node.args, node.kwargs), value)


def size_of(emit: Emit, node: Node, dim: int) -> int | Node:
    """The size of dimension ``dim`` of a tensor, as an argument of an op."""
    size = value(node).shape[dim]
    return size if isinstance(size, int) else emit(aten.sym_size.int, node, dim)
