"""Fused graph -> the same graph with everything between its first and its last site done twice, once for each half.

Each node of a half carries ``meta["half"]``. Values are cut where a site first needs half of them, and joined again where
an op without a token-axis rule needs them whole, or after the last site.
"""

import operator
from dataclasses import dataclass
from functools import partial

import torch
from torch.fx import Graph, Node
from torch.fx.node import map_arg

from .. import ops
from ..compat import detect_fake_mode, pytree
from ..report import Join
from . import attention
from .cache import Write, put_entries, view_of, write_of
from .cut import Cut
from .emit import Emitter
from .gather import GATHER, gather_along, side_by_side
from .graph_utils import Ancestors, arguments, aten, calls, in_order, same_shape, source_of, value
from .token_axis import Split, TokenAxis, expr, expr_of, split_rule


@dataclass(frozen=True)
class Halves:
    """A value that exists as two nodes, to be joined along ``axis``."""

    nodes: tuple[Node, Node]
    axis: TokenAxis


_NOT_HIDDEN = "no mask is known to hide what the second half writes from the first half"


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
        self.before = Ancestors(graph)
        self.sites = _chain([s for s in sites if same_shape(value(s.args[0]).shape[:-1], shape[:-1])], self.before)
        self.emit = Emitter(Graph(graph.owning_module), detect_fake_mode([value(sites[0].args[0])]))
        self.env: dict[Node, Node | Halves] = {}
        self.joined: dict[Node, Node] = {}  # a value that is cut -> its whole
        self.cuts: dict[tuple[Node, TokenAxis], tuple[Node, Node]] = {}  # a whole and an axis -> its halves
        self.written: dict[Node, Write] = {}  # a whole, to which each half's rows are written in turn
        self.firsts: dict[Node, Node] = {}  # such a whole -> what it is before the second half's are
        self.joins: list[Join] = []

    def run(self):
        for node in self.old.nodes:
            self.emit.like = node
            if node in self.env:
                continue  # a result that was made together with its call
            if node in self.sites:
                self._site(node)
            elif not self.before(node, self.sites[-1]):
                self._whole(node)
            elif self._cut_inputs(node):
                self._inside(node)
            else:
                self._whole(node)
                self._follow(node)
        self.emit.graph.lint()
        return self.emit.graph, self.sites, self.joins

    # --- one node ----------------------------------------------------------------------------------------------------

    def _cut_inputs(self, node: Node) -> dict[Node, TokenAxis]:
        halves = {a: self.env[a] for a in node.all_input_nodes}
        return {a: h.axis for a, h in halves.items() if isinstance(h, Halves)}

    def _whole(self, node: Node) -> None:
        if calls(node, aten.sym_size.int) and self._cut_inputs(node):
            self.env[node] = self.emit.size(value(node))  # which takes no joining
        else:
            self.env[node] = self.emit.graph.node_copy(node, self._join)

    def _inside(self, node: Node) -> None:
        axes = self._cut_inputs(node)
        if calls(node, operator.getitem):
            parent = self.env[node.args[0]]
            parts = [self._in_half(h, operator.getitem, n, node.args[1]) for h, n in enumerate(parent.nodes)]
            self.env[node] = Halves(tuple(parts), parent.axis[node.args[1]])
            return
        if calls(node, aten.sym_size.int):
            self._whole(node)
            return
        if calls(node, GATHER) and axes[node.args[0]].dim == 0 and (found := side_by_side(node)):
            self._gather(node, *found)
            return
        if write := write_of(node, axes):
            self._write(node, write)
            return
        rule = split_rule(node, axes)
        if not isinstance(rule, str):
            rule = self._checked(rule)
        if isinstance(rule, str):
            self.joins.append(Join(str(node.target), source_of(node), rule))
            self._whole(node)
            return
        if attention.is_cut_causally(node, axes, self._rows):
            self._causal_attention(node, rule)
            return
        self._follow(node)
        of_input = lambda half: lambda a: self._join(a) if a in rule.whole else self._half(a, half, rule.slices.get(a))
        self.env[node] = Halves(tuple(self._again(node, rule, half, of_input(half)) for half in (0, 1)), rule.axis)

    def _again(self, node: Node, rule: Split, half: int, of_input) -> Node:
        """The call that ``rule`` makes of ``node`` for a half. of_input: a node of the old graph -> its argument"""

        def convert(a):
            if isinstance(a, torch.SymInt):
                return self.emit.size(a)
            return of_input(a) if isinstance(a, Node) else a

        args, kwargs = pytree.tree_map(convert, (node.args if rule.args is None else tuple(rule.args), dict(node.kwargs)))
        return self._in_half(half, node.target, *args, **kwargs)

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

    def _gather(self, node: Node, cat: Node, dim: int, between: list[Node]) -> None:
        """Both halves of a gather along another dimension than the first, where they have their tokens."""
        x, ranks, group = node.args
        parts = [gather_along(partial(self._in_half, half), self._half(x, half, None), ranks, group, dim) for half in (0, 1)]
        self.env |= dict.fromkeys([node, *between])  # nobody else reads these
        self.env[cat] = Halves(tuple(parts), self.env[x].axis)

    def _causal_attention(self, node: Node, rule: Split) -> None:
        queries, mask = self.env[node.args[0]].nodes, attention.attention_mask(node)
        emit = lambda half: partial(self._in_half, half)
        if mask is None:
            keys, values = (self.env[a].nodes for a in node.args[1:3])
            results = attention.causal_halves(emit, node, queries, keys, values)
        else:
            keys, values = map(self._seen, node.args[1:3])
            rows = [self._half(mask, half, rule.slices.get(mask)) for half in (0, 1)]
            results = attention.masked_halves(emit, node, queries, keys, values, rows)
        for user in node.users:  # only the result itself, by the rule
            self.env[user] = Halves(results, self.env[node.args[0]].axis)

    # --- what is written to a cache ----------------------------------------------------------------------------------

    def _write(self, node: Node, write: Write) -> None:
        before, rows = [self._join(a) for a in write.before], self.env[write.rows].nodes
        if write.axis.dim != write.dim:
            self._write_entries(node, write, *before)
            return
        if write.positions is None:
            self.env[node] = self.emit(aten.cat.default, [*before, *rows], write.dim)
        else:
            (cache,) = before
            for half in (0, 1):
                at = [None] * write.dim + [self._half(write.positions, half, TokenAxis(0, write.axis.unit))]
                cache = self._in_half(half, aten.index_put.default, cache, at, rows[half])
                self.firsts.setdefault(node, cache)
            self.env[node] = cache
        self.written[node] = write

    def _write_entries(self, node: Node, write: Write, cache: Node) -> None:
        """A write between sequences: the halves are slices of the cache, and the cache is not made of them."""
        at, parts = [expr(n) * expr_of(write.axis.unit) for n in (0, self.cut.first, self.cut.length)], []
        for half, first, end in zip((0, 1), map(self.emit.size, at), map(self.emit.size, at[1:])):
            emit = partial(self._in_half, half)
            cache = put_entries(emit, cache, self.env[write.positions], self.env[write.rows].nodes[half], write.dim, first)
            parts.append(emit(aten.slice.Tensor, cache, 0, first, end))
        self.env[node], self.joined[node] = Halves(tuple(parts), write.axis), cache

    def _follow(self, node: Node) -> None:
        """A call that takes all of what the halves have written: it is a view of that, or waits for both."""
        for a in node.all_input_nodes:
            if a not in self.written or isinstance(value(node), torch.SymInt):
                continue
            write = self.written[a]
            if view := view_of(write, node):
                self.written[node] = view
            else:
                self.joins.append(Join(str(write.call.target), source_of(write.call), _NOT_HIDDEN))
                self.written = {n: w for n, w in self.written.items() if w.call is not write.call}

    def _first(self, old: Node) -> Node:
        """What there is of a whole before the second half's rows are written to it."""
        if old not in self.firsts:
            write = self.written[old]
            if old is write.call:
                parts = [*map(self._join, write.before), self.env[write.rows].nodes[0]]
                self.firsts[old] = self._in_half(0, aten.cat.default, parts, write.dim)
            else:
                source = old.args[0]
                rule = split_rule(old, {source: self.written[source].axis})
                self.firsts[old] = self._again(old, rule, 0, lambda a: self._first(a) if a is source else self._join(a))
        return self.firsts[old]

    def _rows(self, old: Node) -> Write | None:
        """Keys or values of all tokens, as what has been written; None where they are something else."""
        known = self.env[old]
        return Write(old, (), old, known.axis.dim, known.axis) if isinstance(known, Halves) else self.written.get(old)

    def _seen(self, old: Node) -> tuple[Node, Node]:
        """The keys or the values that the halves of a causal attention see."""
        if old in self.written:
            return self._first(old), self.env[old]
        halves = self.env[old].nodes
        return halves[0], self._in_half(1, aten.cat.default, list(halves), 2)

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
