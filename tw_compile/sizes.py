"""A graph with symbolic sizes, made anew for the sizes at hand.

Dynamo traces a graph for sizes of a first call, and whoever then compares a size adds a guard to it: what is compiled for 2048
tokens would not be asked about 8. Here each form of a graph gets symbols of its own, with the sizes that it is compiled for as
hints. So what is learnt about sizes while it is compiled belongs to this form alone, as its conditions, and no guard of Dynamo's
comes of it. Sizes without a hint (``mark_unbacked``) have one then, and those of 0 and 1 are constants.
"""

from dataclasses import dataclass

import sympy
import torch
from torch.fx import Graph, GraphModule

from .compat import FakeTensorMode, FakeTensorProp, ShapeEnv, SymNode, ValueRanges, int_oo
from .passes.graph_utils import value


def copied(gm: GraphModule, graph: Graph | None = None) -> GraphModule:
    """A module with a copy of the graph, and copies of the graphs of its higher-order ops. Tensors are shared.

    graph: to take in place of ``gm.graph``, itself and not a copy
    """
    if graph is None:
        graph, env = Graph(), {}
        for node in gm.graph.nodes:
            env[node] = graph.node_copy(node, env.__getitem__)
    new = GraphModule(gm, graph)
    new.meta = dict(gm.meta)
    for name, inner in list(new.named_children()):
        if isinstance(inner, GraphModule):
            setattr(new, name, copied(inner))
    return new


class Sizes:
    """The symbols in the inputs of a graph, and where a call has their values."""

    def __init__(self, gm: GraphModule):
        """Raises ValueError for an input that is a symbol of another kind than a size, or has a size that no input tells."""
        self.symbols: list[sympy.Symbol] = []
        self._places: list[tuple[int, int | None]] = []
        free = set()
        for i, node in enumerate(gm.graph.find_nodes(op="placeholder")):
            given = value(node)
            if isinstance(given, (torch.SymFloat, torch.SymBool)):
                raise ValueError(f"an input of the graph is a {type(given).__name__}")
            numbers = [(given, None)] if isinstance(given, torch.SymInt) else []
            if isinstance(given, torch.Tensor):
                numbers = [(size, dim) for dim, size in enumerate(given.shape)]
                free |= set().union(*(_expr(n).free_symbols for n in (*given.stride(), given.storage_offset())))
            for number, dim in numbers:
                expr = _expr(number)
                free |= expr.free_symbols
                if expr.is_Symbol and expr not in self.symbols:
                    self.symbols.append(expr)
                    self._places.append((i, dim))
        if lacking := free - set(self.symbols):
            raise ValueError(f"no input of the graph tells the size {sorted(map(str, lacking))[0]}")

    def __bool__(self):
        return bool(self.symbols)

    def of_call(self, args: list) -> tuple[int, ...]:
        """The values of the symbols in a call."""
        return tuple([args[i] if dim is None else args[i].shape[dim] for i, dim in self._places])

    def hints(self, gm: GraphModule) -> tuple[int, ...] | None:
        """Those that the graph was traced with; None where one of them is not known."""
        hints = []
        for i, dim in self._places:
            given = value(gm.graph.find_nodes(op="placeholder")[i])
            node = (given if dim is None else given.shape[dim]).node
            if not node.has_hint():
                return None
            hints.append(int(node.hint))
        return tuple(hints)


@dataclass
class ForSizes:
    """A graph and its inputs with symbols of their own.

    symbols: of the graph that it was made from -> what they are here, a symbol or a number
    values:  of these symbols, for which it was made
    """

    gm: GraphModule
    inputs: list
    mode: FakeTensorMode
    symbols: dict
    values: dict

    def is_alike(self, values: dict) -> bool:
        """Whether the same symbols are numbers with other values, so that both have sizes of one form."""
        return all(new == values[old] if new.is_Integer else values[old] > 1 for old, new in self.symbols.items())

    def holds(self, values: dict) -> bool:
        """Whether all that was taken for granted about sizes, up to now, holds for other values."""
        return self.is_alike(values) and all(_is_true(guard.expr, self._own(values)) for guard in self._guards())

    def number(self, size, values: dict) -> int | None:
        """A size in this graph, for other values; None where it depends on data."""
        known = _expr(size).xreplace(self._own(values))
        return int(known) if known.is_Integer else None

    def _own(self, values: dict) -> dict:
        return {new: sympy.Integer(values[old]) for old, new in self.symbols.items() if new.is_Symbol}

    def _guards(self) -> list:
        return self.mode.shape_env.guards if self.symbols else []


def for_sizes(gm: GraphModule, values: dict[sympy.Symbol, int], fixed: bool = False) -> ForSizes:
    """A copy of a graph, for these values of the symbols in its inputs. fixed: and for no others"""
    env = ShapeEnv()
    mode = FakeTensorMode(shape_env=env, allow_non_fake_inputs=True)
    symbols = {old: sympy.Integer(number) if fixed else _symbol(env, old, number) for old, number in values.items()}
    new = copied(gm)

    def size(old):
        expr = _expr(old).xreplace(symbols)
        hint = int(expr.xreplace(env.backed_var_to_val))
        return hint if expr.is_Integer else torch.SymInt(SymNode(expr, env, int, hint))

    def like(old):
        if isinstance(old, torch.SymInt):
            return size(old)
        if not isinstance(old, torch.Tensor):
            return old
        with mode:
            base = torch.empty_strided([size(n) for n in old.shape], [size(n) for n in old.stride()], dtype=old.dtype, device=old.device)
            offset = size(old.storage_offset())
            return base if isinstance(offset, int) and offset == 0 else base.as_strided(base.shape, base.stride(), offset)

    placeholders = new.graph.find_nodes(op="placeholder")
    inputs = [like(value(node)) for node in placeholders]
    for node in new.graph.nodes:
        for name in ("unbacked_bindings", "tensor_meta"):  # of other symbols
            node.meta.pop(name, None)
    with torch.no_grad(), mode:
        FakeTensorProp(new, mode).propagate_dont_convert_inputs(*inputs)
    return ForSizes(new, inputs, mode, symbols, values)


def _symbol(env: ShapeEnv, old: sympy.Symbol, number: int):
    """What a symbol of another environment is in ``env``: one of the same name, where that is the name of a size with a hint."""
    if number < 2:
        return sympy.Integer(number)
    new = old if old.name.startswith("s") else sympy.Symbol(f"s_{old.name}", integer=True, positive=True)
    env.backed_var_to_val[new] = sympy.Integer(number)
    env._update_var_to_range(new, ValueRanges(2, int_oo))
    return new


def _expr(size) -> sympy.Expr:
    return size.node.expr if isinstance(size, torch.SymInt) else sympy.Integer(size)


def _is_true(expr, known: dict) -> bool:
    return sympy.sympify(expr).xreplace(known) == sympy.true


