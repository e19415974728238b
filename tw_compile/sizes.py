"""Copies of a graph with symbolic sizes, with new symbols for the sizes of a call.

Dynamo traces a graph with the sizes of its first call as hints. A pass that compares a size would add a guard to Dynamo's graph, which
would then be compiled again where the comparison has another result. So each form of a graph is compiled in a copy, with symbols of its
own whose hints are the sizes of the present call. Guards on them become conditions of this form, not guards of Dynamo's. Sizes without
a hint (``mark_unbacked``) get one; sizes of 0 and 1 become constants. But a graph that was traced as if a size could not be 1 has nothing
to say of 1 that it does not say of 2: a caller that drops Dynamo's guards, such as vLLM, gets the same form for both.
"""

from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch.fx import Graph, GraphModule

from .compat import FakeTensorMode, FakeTensorProp, ShapeEnv, SymNode, ValueRanges, int_oo
from .passes.graph_utils import copied_graph, value


def copied(gm: GraphModule, graph: Graph | None = None) -> GraphModule:
    """A copy of a module and of the graphs of its higher-order ops. It shares the tensors.

    graph: used in place of a copy of ``gm.graph``
    """
    new = GraphModule(gm, copied_graph(gm.graph) if graph is None else graph)
    new.meta = dict(gm.meta)
    for name, inner in list(new.named_children()):
        if isinstance(inner, GraphModule):
            setattr(new, name, copied(inner))
    return new


class Sizes:
    """The size symbols in the inputs of a graph, and where to read their values in a call."""

    def __init__(self, gm: GraphModule) -> None:
        """Raises ValueError for an input that is a symbolic float or bool, and for a size that cannot be read from the inputs."""
        self.symbols: list[sympy.Symbol] = []
        self._places: list[tuple[int, int | None]] = []
        free = set()
        for i, node in enumerate(gm.graph.find_nodes(op="placeholder")):
            given = value(node)
            if isinstance(given, (torch.SymFloat, torch.SymBool)):
                raise ValueError(f"an input of the graph is a {type(given).__name__}")
            numbers: list[tuple] = [(given, None)] if isinstance(given, torch.SymInt) else []
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
            raise ValueError(f"no input of the graph has the size {min(map(str, lacking))}")

    def __bool__(self) -> bool:
        return bool(self.symbols)

    def of_call(self, args: list) -> tuple[int, ...]:
        """The values of the symbols in a call."""
        return tuple([args[i] if dim is None else args[i].shape[dim] for i, dim in self._places])

    def hints(self, gm: GraphModule) -> tuple[int, ...] | None:
        """The values with which the graph was traced; None if one of them is unknown."""
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
    """A copy of a graph for given sizes.

    inputs:  fake inputs, with symbols of their own
    mode:    the fake tensor mode of the inputs, with the guards on their symbols
    symbols: symbol of the original graph -> its symbol or number in the copy
    values:  symbol of the original graph -> the value for which the copy was made
    least:   symbol of the original graph -> the least value that its symbol in the copy stands for
    """

    gm: GraphModule
    inputs: list
    mode: FakeTensorMode
    symbols: dict
    values: dict
    least: dict = field(default_factory=dict)

    def is_alike(self, values: dict) -> bool:
        """Whether the copy's constants are the sizes in ``values``, and its symbols stand for those there."""
        return all(new == values[old] if new.is_Integer else values[old] >= self.least[old] for old, new in self.symbols.items())

    def holds(self, values: dict) -> bool:
        """Whether all guards on the copy's symbols hold for other values."""
        return self.is_alike(values) and all(_is_true(guard.expr, self._own(values)) for guard in self._guards())

    def number(self, size: int | torch.SymInt, values: dict) -> int | None:
        """A size in the copy, for other values of the symbols; None if it depends on data."""
        known = _expr(size).xreplace(self._own(values))
        return int(known) if known.is_Integer else None

    def _own(self, values: dict) -> dict:
        return {new: sympy.Integer(values[old]) for old, new in self.symbols.items() if new.is_Symbol}

    def _guards(self) -> list:
        return self.mode.shape_env.guards if self.symbols else []


def for_sizes(gm: GraphModule, values: dict[sympy.Symbol, int], fixed: bool = False) -> ForSizes:
    """A copy of a graph, for these values of the symbols in its inputs. fixed: with constants in place of the symbols"""
    env = ShapeEnv()
    mode = FakeTensorMode(shape_env=env, allow_non_fake_inputs=True)
    least = dict.fromkeys(values, 2) | dict.fromkeys(_never_one(gm), 1)
    symbols = {
        old: sympy.Integer(number) if fixed or number < least[old] else _symbol(env, old, number) for old, number in values.items()
    }
    new = copied(gm)

    def size(old: torch.SymInt) -> int | torch.SymInt:
        expr = _expr(old).xreplace(symbols)
        hint = int(expr.xreplace(env.backed_var_to_val))
        return hint if expr.is_Integer else torch.SymInt(SymNode(expr, env, int, hint))

    def like(old: Any) -> Any:
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
        for name in ("unbacked_bindings", "tensor_meta"):  # they contain the original symbols
            node.meta.pop(name, None)
    with torch.no_grad(), mode:
        FakeTensorProp(new, mode).propagate_dont_convert_inputs(*inputs)
    return ForSizes(new, inputs, mode, symbols, values, least)


def _never_one(gm: GraphModule) -> set[sympy.Symbol]:
    """The symbols in a graph's inputs that were traced as if they could not be 0 or 1."""
    found = set()
    for node in gm.graph.find_nodes(op="placeholder"):
        given = value(node)
        for size in given.shape if isinstance(given, torch.Tensor) else [given]:
            if isinstance(size, torch.SymInt) and (symbol := size.node.expr).is_Symbol:
                known = size.node.shape_env.var_to_range.get(symbol)
                found |= {symbol} if known is not None and known.lower >= 2 else set()
    return found


def _symbol(env: ShapeEnv, old: sympy.Symbol, number: int) -> sympy.Symbol:
    """A symbol of ``env`` for a symbol of another environment, with ``number`` as its hint, if that is more than 1.

    It has the same name, unless that is the name of a size without a hint.
    """
    new = old if old.name.startswith("s") else sympy.Symbol(f"s_{old.name}", integer=True, positive=True)
    env.backed_var_to_val[new] = sympy.Integer(max(number, 2))
    env._update_var_to_range(new, ValueRanges(2, int_oo))
    return new


def _expr(size: int | torch.SymInt) -> sympy.Expr:
    return size.node.expr if isinstance(size, torch.SymInt) else sympy.Integer(size)


def _is_true(expr: sympy.Expr, known: dict) -> bool:
    return sympy.sympify(expr).xreplace(known) == sympy.true


