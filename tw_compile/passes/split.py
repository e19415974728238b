"""Fused graph -> the same graph with everything between its first and its last site done twice, once for each half.

Each node of a half carries ``meta["half"]``. Values are cut where a site first needs half of them, and joined again where
an op without a token-axis rule needs them whole, or after the last site.
"""

import operator
from dataclasses import dataclass
from functools import partial

import torch
from torch._dynamo.utils import detect_fake_mode
from torch.fx import Graph, Node
from torch.fx.node import map_arg
from torch.utils._pytree import tree_map

from .. import ops
from ..report import Join
from . import attention
from .cut import Cut
from .emit import Emitter
from .graph_utils import Ancestors, arguments, aten, calls, in_order, same_shape, source_of, value
from .token_axis import Split, TokenAxis, expr, expr_of, split_rule


@dataclass(frozen=True)
class Halves:
    """A value that exists as two nodes, to be joined along ``axis``."""

    nodes: tuple[Node, Node]
    axis: TokenAxis


def split(graph: Graph, sites: list[Node], cut: Cut) -> tuple[Graph, list[Node], list[Join]]:
    """Cut the region between the first and the last of ``sites`` (``fused`` calls).

    Returns (new graph, the sites that were cut, what had to be joined between the first and the last of them).
    """
    return _Splitter(graph, sites, cut).run()


def _chain(sites: list[Node], before: Ancestors) -> list[Node]:
    """The sites of which each depends on the one before it, so that a half has one of them under way at a time."""
    chain = sites[:1]
    for site in sites[1:]:
        if before(chain[-1], site):
            chain.append(site)
    return chain


class _Splitter:
    def __init__(self, graph: Graph, sites: list[Node], cut: Cut):
        shape = value(sites[0].args[0]).shape
        self.old, self.cut = graph, cut
        self.sites = _chain([s for s in sites if same_shape(value(s.args[0]).shape[:-1], shape[:-1])], Ancestors(graph))
        self.emit = Emitter(Graph(graph.owning_module), detect_fake_mode([value(sites[0].args[0])]))
        self.env: dict[Node, Node | Halves] = {}
        self.joined: dict[Node, Node] = {}  # a value that is cut -> its whole
        self.cuts: dict[tuple[Node, TokenAxis], tuple[Node, Node]] = {}  # a whole and an axis -> its halves
        self.joins: list[Join] = []

    def run(self):
        last = self.sites[-1]
        inside = True
        for node in self.old.nodes:
            self.emit.like = node
            if node in self.env:
                continue  # a result that was made together with its call
            if node in self.sites:
                self._site(node)
            elif inside and self._cut_inputs(node):
                self._inside(node)
            else:
                self._whole(node)
            inside = inside and node is not last
        self.emit.graph.lint()
        return self.emit.graph, self.sites, self.joins

    # --- one node ----------------------------------------------------------------------------------------------------

    def _cut_inputs(self, node: Node) -> dict[Node, TokenAxis]:
        halves = {a: self.env[a] for a in node.all_input_nodes}
        return {a: h.axis for a, h in halves.items() if isinstance(h, Halves)}

    def _whole(self, node: Node) -> None:
        self.env[node] = self.emit.graph.node_copy(node, self._join)

    def _inside(self, node: Node) -> None:
        axes = self._cut_inputs(node)
        if calls(node, operator.getitem):
            parent = self.env[node.args[0]]
            parts = [self._in_half(h, operator.getitem, n, node.args[1]) for h, n in enumerate(parent.nodes)]
            self.env[node] = Halves(tuple(parts), parent.axis[node.args[1]])
            return
        if calls(node, aten.sym_size.int):
            self.env[node] = self.emit.size(value(node))  # of the whole, which takes no joining
            return
        rule = split_rule(node, axes)
        if not isinstance(rule, str):
            rule = self._checked(rule)
        if isinstance(rule, str):
            self.joins.append(Join(str(node.target), source_of(node), rule))
            self._whole(node)
            return
        if attention.is_cut_causally(node, axes):
            self._causal_attention(node, rule)
            return
        args = node.args if rule.args is None else rule.args
        parts = []
        for half in (0, 1):

            def convert(a, half=half):
                if isinstance(a, torch.SymInt):
                    return self.emit.size(a)
                if not isinstance(a, Node):
                    return a
                return self._join(a) if a in rule.whole else self._half(a, half, rule.slices.get(a))

            new_args, new_kwargs = tree_map(convert, (tuple(args), dict(node.kwargs)))
            parts.append(self._in_half(half, node.target, *new_args, **new_kwargs))
        self.env[node] = Halves(tuple(parts), rule.axis)

    def _checked(self, rule):
        for a, axis in rule.slices.items():
            length = value(a).shape[axis.dim]
            if expr(length) != expr(self.cut.length) * expr_of(axis.unit):
                return f"an input has {length} entries along the token axis, not {expr(self.cut.length) * expr_of(axis.unit)}"
        return rule

    def _site(self, node: Node) -> None:
        """A fused call for each half, and its results."""
        axis = TokenAxis(self.cut.dim)
        given = arguments(node)
        results = {user.args[1]: user for user in node.users}
        made = {index: [] for index in results}
        for half in (0, 1):
            rows = {name: self._half(given[name], half, axis) for name in ("x", "residual") if given[name] is not None}
            whole = {name: self._join(a) for name, a in given.items() if isinstance(a, Node) and name not in rows}
            call = self._in_half(half, ops.fused, *in_order(ops.fused, given | rows | whole | {"slot": half}))
            for index in results:
                made[index].append(self._in_half(half, operator.getitem, call, index))
        for index, user in results.items():
            self.env[user] = Halves(tuple(made[index]), axis)

    def _causal_attention(self, node: Node, rule: Split) -> None:
        query, keys, values = (self.env[a].nodes for a in node.args[:3])
        mask = attention.attention_mask(node)
        rows = None if mask is None else [self._half(mask, half, rule.slices.get(mask)) for half in (0, 1)]
        emit = lambda half: partial(self._in_half, half)
        results = attention.causal_halves(emit, node, query, keys, values, rows)
        for user in node.users:  # only the result itself, by the rule
            self.env[user] = Halves(results, self.env[node.args[0]].axis)

    # --- halves and wholes -------------------------------------------------------------------------------------------

    def _in_half(self, half: int, target, *args, **kwargs) -> Node:
        self.emit.half = half
        node = self.emit(target, *args, **kwargs)
        self.emit.half = None
        return node

    def _half(self, old: Node, half: int, axis: TokenAxis | None) -> Node:
        """One half of a value; of a value that is not cut, its slice along ``axis``, or all of it without one."""
        known = self.env[old]
        if isinstance(known, Halves):
            return known.nodes[half]
        if axis is None:
            return known
        if (known, axis) not in self.cuts:
            at = self.emit.size(expr(self.cut.first) * expr_of(axis.unit))
            end = self.emit.size(expr(self.cut.length) * expr_of(axis.unit))
            first = self._in_half(0, aten.slice.Tensor, known, axis.dim, 0, at)
            self.cuts[known, axis] = first, self._in_half(1, aten.slice.Tensor, known, axis.dim, at, end)
        return self.cuts[known, axis][half]

    def _join(self, old: Node) -> Node:
        known = self.env[old]
        if not isinstance(known, Halves):
            return known
        if old not in self.joined:
            self.joined[old] = whole = self.emit(aten.cat.default, list(known.nodes), known.axis.dim)
            self.cuts[whole, known.axis] = known.nodes  # cut again, it is the halves it came from
        return self.joined[old]
