"""Fused graph -> the same graph, with two calls for each call between the first and the last site, one for each half of the tokens.

A node of a half has ``meta["half"]``. Values are cut where a site first needs half of them. They are joined where an op without a
token-axis rule needs them whole, and after the last site.
"""

import operator
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch.fx import Graph, Node

from .. import ops
from ..compat import detect_fake_mode, free_unbacked_symbols
from ..report import UnsplitOp
from .cut import Cut
from .emit import Emit, Emitter
from .find import collectives, communicates
from .graph_utils import WAIT, Ancestors, arguments, aten, calls, in_order, same_shape, source_of, value
from .halves import Check, Halves
from .rules import algebra, arrange, attention, copies, experts  # noqa: F401  # they register rules
from .rules.cache import Entries, Write, layout_rule, put_entries, view_of, write_of
from .rules.functional import EMPTY, fresh, name_of
from .rules.gather import GATHER, gather_along, side_by_side
from .rules.per_half import PerHalf
from .rules.token_axis import FROM_START, Split, TokenAxis, expr, expr_of, map_places, same_axis, split_rule


def split(
    graph: Graph, sites: list[Node], cut: Cut, keep_whole: Mapping[Node, str] | None = None
) -> tuple[Graph, list[Node], dict[Node, UnsplitOp], dict[Node, str], set[Node]]:
    """Cut a graph between the first and the last of ``sites`` (``fused`` calls).

    keep_whole: calls that are not cut, whatever the rules allow -> the reason
    Returns (
        the new graph; its collectives have the order of ``graph``, first halves first,
        the sites that are cut,
        the calls between the first and the last of them that need both halves,
        each collective that is not a site -> "cut" or "whole",
        the nodes of ``graph`` that are made once, for all tokens
    ).
    """
    whole = dict(keep_whole or {})
    while True:
        splitter = _Splitter(graph, sites, cut, whole)
        made = splitter.run()
        if not splitter.unroutable.keys() - whole.keys():
            return made
        whole = splitter.unroutable | whole


def _chain(sites: list[Node], before: Ancestors) -> list[Node]:
    """Sites that each depend on the one before, so that each half communicates for one site at a time."""
    chain = sites[:1]
    for site in sites[1:]:
        if before(chain[-1], site):
            chain.append(site)
    return chain


def _may_be_zero(length: int | torch.SymInt) -> bool:
    """Whether the length of a half may be 0. A length that is not a number may be 0 only if it depends on data."""
    return length == 0 if isinstance(length, int) else bool(free_unbacked_symbols(length))


class _Splitter:
    def __init__(self, graph: Graph, sites: list[Node], cut: Cut, keep_whole: Mapping[Node, str]):
        shape = value(sites[0].args[0]).shape
        self.old, self.cut, self.keep_whole = graph, cut, keep_whole
        self.before = Ancestors(graph)
        self.sites = _chain([s for s in sites if same_shape(value(s.args[0]).shape[:-1], shape[:-1])], self.before)
        self.emit = Emitter(Graph(graph.owning_module), detect_fake_mode([value(sites[0].args[0])]))
        self.check = Check(cut, self.emit.fake_mode)
        self.env: dict[Node, Node | Halves] = {}
        self.joined: dict[Node, Node] = {}  # a value that is cut -> the value joined
        self.cuts: dict[tuple[Node, TokenAxis], tuple[Node, Node]] = {}  # (a whole value, an axis) -> its halves
        self.written: dict[Node, Write] = {}  # a whole value, to which each half's rows are written in turn
        self.firsts: dict[Node, Node] = {}  # such a value -> the value before the second half's rows are written
        self.unsplit_ops: dict[Node, UnsplitOp] = {}
        self.unroutable: dict[Node, str] = {}  # a sort of experts' rows that is needed for all tokens -> why: see rules/experts.py
        self.done: dict[Node, str] = {node: "whole" for node in collectives(graph) if not calls(node, ops.fused)}

    def run(self) -> tuple[Graph, list[Node], dict[Node, UnsplitOp], dict[Node, str], set[Node]]:
        region = self._region()
        for node in self.old.nodes:
            self.emit.like = node
            if node in self.env:
                continue  # a result that was made together with its call
            if node in self.sites:
                self._site(node)
            elif node not in region:
                self._whole(node)
            elif self._cut_inputs(node):
                self._in_region(node)
            else:
                self._whole(node)
                self._read_written(node)
        self.emit.graph.lint()
        whole = {node for node, made in self.env.items() if not isinstance(made, Halves)}
        return self.emit.graph, self.sites, self.unsplit_ops, self.done, whole

    def _region(self) -> set[Node]:
        """The nodes that the last site needs, or that a collective before it needs, which may have no users."""
        nodes = list(self.old.nodes)
        ends = [node for node in nodes[: nodes.index(self.sites[-1])] if communicates(node)]
        ends += [user for node in ends for user in node.users if calls(user, WAIT)] + [self.sites[-1]]
        needed = 0
        for end in ends:
            needed |= self.before.of[end] | self.before.bit[end]
        return {node for node in nodes if needed & self.before.bit[node]}

    # --- one node ----------------------------------------------------------------------------------------------------

    def _cut_inputs(self, node: Node) -> dict[Node, TokenAxis]:
        """The inputs of a call that are cut -> their axes."""
        halves = {a: self.env[a] for a in node.all_input_nodes}
        return {a: h.axis for a, h in halves.items() if isinstance(h, Halves)}

    def _whole(self, node: Node) -> None:
        """Make a call once, on all tokens."""
        if calls(node, aten.sym_size.int) and self._cut_inputs(node):
            self.env[node] = self.emit.size(value(node))  # without joining the value
        else:
            self.env[node] = self.emit.graph.node_copy(node, self._join)

    def _in_region(self, node: Node) -> None:
        """Make a call whose inputs are cut, once for each half if that is possible."""
        if calls(node, operator.getitem):
            parent = self.env[node.args[0]]
            parts = [self._in_half(h, operator.getitem, n, node.args[1]) for h, n in enumerate(parent.nodes)]
            self.env[node] = Halves(tuple(parts), parent.axis[node.args[1]])
        elif calls(node, aten.sym_size.int):
            self._whole(node)
        elif reason := self.keep_whole.get(node) or self._attempt(node):
            self.unsplit_ops[node] = UnsplitOp(name_of(node), source_of(node), reason)
            for axis in self._cut_inputs(node).values():
                self._need_in_order(axis, f"{name_of(node)} needs its rows in one order: {reason}")
            self._whole(node)
        elif node in self.done:
            self.done[node] = "cut"

    def _attempt(self, node: Node) -> str | None:
        """Make a call once for each half. If that is not possible, undo all changes and return the reason."""
        last = next(iter(reversed(self.emit.graph.nodes)))
        known: tuple[dict[Any, Any], ...] = (self.env, self.joined, self.cuts, self.firsts, self.emit.sizes, self.unsplit_ops)
        lengths, written = [len(k) for k in known], dict(self.written)
        try:
            if (reason := self._in_halves(node)) is None:
                return None
        except Exception as error:  # the call is made on all tokens instead
            reason = f"it fails on half of the tokens: {type(error).__name__}: {error}".splitlines()[0]
        for entries, length in zip(known, lengths):
            while len(entries) > length:
                entries.popitem()  # the newest entry, as entries are only added
        self.written, self.emit.half = written, None
        while (made := next(iter(reversed(self.emit.graph.nodes)))) is not last:
            self.emit.graph.erase_node(made)
        return reason

    def _in_halves(self, node: Node) -> str | None:
        """Make a call once for each half, or return why that is not possible."""
        axes = self._cut_inputs(node)
        if experts.is_routed(node, axes):
            return self._by_rule(node, experts.routed_rule(node, axes))
        if copies.is_copied(node, axes):
            return self._by_rule(node, copies.copied_rule(node, axes))
        if calls(node, GATHER) and axes[node.args[0]].dim == 0 and (found := side_by_side(node)):
            self._gather(node, *found)
            return self.check.fault(found[0], self.env[found[0]])
        if write := write_of(node, axes):
            return self._write(node, write)
        if node.target in attention.SIGNATURES and any(map(_may_be_zero, self.cut.halves)):
            return "a half may have no tokens, and attention needs at least one"
        rule = split_rule(node, axes)
        if not isinstance(rule, str) and attention.is_cut_causally(node, axes, self._rows):
            return self._lacking(node, rule) or self._causal_attention(node, rule)
        return self._by_rule(node, rule)

    def _lacking(self, node: Node, rule: Split) -> str | None:
        """Why an input that a rule slices cannot be sliced; None if it can be."""
        for axis, a in self._sliced(node, rule):
            needed = expr(self.cut.length) * expr_of(axis.unit)
            if (expr(self.cut.first) * expr_of(axis.unit)).is_integer is False:
                return f"an input has one entry for {1 / expr_of(axis.unit)} tokens, and the cut is not at a multiple of them"
            if not self.check.is_size(value(a).shape[axis.dim], needed) and not (rule.agrees and value(a).dim() == 1):
                return f"an input has a size of {value(a).shape[axis.dim]} along the token axis, not {needed}"
        return None

    def _by_rule(self, node: Node, rule: Split | str) -> str | None:
        """Make a call once for each half by its rule, or return why that is not possible."""
        if isinstance(rule, str) or (lacking := self._lacking(node, rule)):
            return rule if isinstance(rule, str) else lacking
        self._read_written(node)

        def of_input(half: int, place: object, a: Node) -> Node:
            return self._join(a) if rule.takes_whole(place, a) else self._half(a, half, rule.slice_of(place, a))

        made = Halves(tuple(self._again(node, rule, half, partial(of_input, half)) for half in (0, 1)), rule.axis)
        self.env[node] = made
        return self.check.fault(node, made)

    def _again(self, node: Node, rule: Split, half: int, of_input: Callable[[Any, Node], Node]) -> Node:
        """Make a call for a half by its rule. of_input: (place, input in the old graph) -> the argument"""

        def convert(place: object, a: Any) -> Any:
            if isinstance(a, PerHalf):
                return a.argument(half, tuple(map(expr, self.cut.halves)), self.emit.size, partial(self._half, axis=None))
            if isinstance(a, torch.SymInt):
                return self.emit.size(a)
            return of_input(place, a) if isinstance(a, Node) else a

        args, kwargs = map_places(convert, *rule.arguments(node))
        return self._in_half(half, rule.target or node.target, *args, **kwargs)

    def _sliced(self, node: Node, rule: Split) -> list[tuple[TokenAxis, Node]]:
        """(axis, input) for each input that is not cut and that a rule slices."""
        found = []

        def look(place: object, a: Any) -> None:
            axis = rule.slice_of(place, a) if isinstance(a, Node) else None
            if axis is not None and not isinstance(self.env[a], Halves):
                found.append((axis, a))

        map_places(look, *rule.arguments(node))
        return found

    def _site(self, node: Node) -> None:
        """Make a ``fused`` call for each half, with its results."""
        axis = TokenAxis(self.cut.dim)
        given = arguments(node)
        results = {user.args[1]: user for user in node.users}
        made: dict[int, list[Node]] = {index: [] for index in results}
        for half in (0, 1):
            rows = {name: self._half(given[name], half, axis) for name in ("x", "residual") if given[name] is not None}
            whole = {name: self._join(a) for name, a in given.items() if isinstance(a, Node) and name not in rows}
            call = self._in_half(half, ops.fused, *in_order(ops.fused, given | rows | whole | {"slot": half}))
            for index in results:
                made[index].append(self._in_half(half, operator.getitem, call, index))
        for index, user in results.items():
            self.env[user] = Halves(tuple(made[index]), axis)

    def _gather(self, node: Node, cat: Node, dim: int, between: list[Node]) -> None:
        """Make a gather along dimension ``dim`` for each half. The tokens are along the first dimension."""
        x, ranks, group = node.args
        parts = [gather_along(partial(self._in_half, half), self._half(x, half, None), ranks, group, dim) for half in (0, 1)]
        self.env |= dict.fromkeys([node, *between])  # they have no other users
        self.env[cat] = Halves(tuple(parts), self.env[x].axis)

    def _causal_attention(self, node: Node, rule: Split) -> str | None:
        """Make an attention whose halves are different calls. Returns why the results are wrong, or None."""
        queries, mask = self.env[node.args[0]].nodes, attention.attention_mask(node)

        def emit(half: int) -> Emit:
            return partial(self._in_half, half)

        if mask is None:
            keys, values = (self.env[a].nodes for a in node.args[1:3])
            results = attention.causal_halves(emit, node, queries, keys, values)
        else:
            keys, values = map(self._seen, node.args[1:3])
            of_mask = rule.slice_of(attention.SIGNATURES[node.target].mask, mask)
            rows = [self._half(mask, half, of_mask) for half in (0, 1)]
            results = attention.masked_halves(emit, node, queries, keys, values, rows)
        made = Halves(results, self.env[node.args[0]].axis)
        self.env |= dict.fromkeys(node.users, made)  # by the rule only the first result has users
        return self.check.fault_of_one(value(node)[0], [value(result) for result in results], made.axis)

    # --- writes to a cache -------------------------------------------------------------------------------------------

    def _write(self, node: Node, write: Write | Entries) -> str | None:
        """Write each half's rows in turn. Returns why that is not possible, or wrong, or None."""
        if isinstance(write, Entries):
            return self._write_entries(node, write)
        before, rule = [self._join(a) for a in write.before], write.rule
        if rule is None:
            self.env[node] = self.emit(aten.cat.default, [*before, *self.env[write.rows].nodes], write.dim)
        elif lacking := self._lacking(node, rule):
            return lacking
        else:
            (cache,) = before
            for half in (0, 1):
                cache = self._again(node, rule, half, partial(self._written_by, half, rule, cache))
                self.firsts.setdefault(node, cache)
            self.env[node] = cache
        self.written[node] = write
        return None

    def _written_by(self, half: int, rule: Split, cache: Node, place: object, a: Node) -> Node:
        """An argument of a half's write to ``cache``."""
        return cache if place == 0 else self._half(a, half, rule.slice_of(place, a))

    def _write_entries(self, node: Node, write: Entries) -> str | None:
        """A write between sequences. The halves are slices of the cache, so they need not be joined."""
        at, parts = [expr(n) * expr_of(write.axis.unit) for n in (0, self.cut.first, self.cut.length)], []
        cache = self._join(write.cache)
        for half, first, end in zip((0, 1), map(self.emit.size, at), map(self.emit.size, at[1:])):
            emit, there = partial(self._in_half, half), replace(write, positions=self._join(write.positions))
            cache = put_entries(emit, there, cache, self.env[write.rows].nodes[half], first)
            parts.append(emit(aten.slice.Tensor, cache, write.axis.dim, first, end))
        self.env[node], self.joined[node] = Halves((parts[0], parts[1]), write.axis), cache
        return self.check.fault(node, self.env[node])

    def _read_written(self, node: Node) -> None:
        """Note a call that reads a value to which both halves have written: a view of it, or an op that waits for both halves."""
        for a in node.all_input_nodes:
            if a not in self.written or isinstance(value(node), torch.SymInt):
                continue
            write = self.written[a]
            view = None if self._cut_inputs(node) else view_of(write, node)
            if view is not None:
                self.written[node] = view
            else:
                self.unsplit_ops[write.call] = UnsplitOp(name_of(write.call), source_of(write.call), attention.why_both(node))
                self.written = {n: w for n, w in self.written.items() if w.call is not write.call}

    def _first(self, old: Node) -> Node:
        """A value to which both halves write, before the second half's rows are written."""
        if old not in self.firsts:
            write = self.written[old]
            if old is write.call:
                parts = [*map(self._join, write.before), self.env[write.rows].nodes[0]]
                self.firsts[old] = self._in_half(0, aten.cat.default, parts, write.dim)
            else:
                source = old.args[0]
                axis = self.written[source].axis
                rule = layout_rule(old, axis) if axis is not None else None
                assert isinstance(rule, Split)  # as in ``view_of``
                self.firsts[old] = self._again(old, rule, 0, lambda _, a: self._first(a) if a is source else self._join(a))
        return self.firsts[old]

    def _rows(self, old: Node) -> Write | None:
        """Keys or values of all tokens, as a Write; None if the halves have not written them."""
        known = self.env[old]
        return Write(old, (), old, known.axis, 0) if isinstance(known, Halves) else self.written.get(old)

    def _seen(self, old: Node) -> tuple[Node, Node]:
        """The keys or the values that each half of a causal attention attends to."""
        if old in self.written:
            return self._first(old), self.env[old]
        halves = self.env[old].nodes
        return halves[0], self._in_half(1, aten.cat.default, list(halves), 2)

    # --- halves and wholes -------------------------------------------------------------------------------------------

    def _in_half(self, half: int, target: Callable, /, *args: Any, **kwargs: Any) -> Node:
        """Add a call that belongs to a half."""
        self.emit.half = half
        node = self.emit(target, *args, **kwargs)
        self.emit.half = None
        return node

    def _half(self, old: Node, half: int, axis: TokenAxis | None) -> Node:
        """One half of a value along ``axis``. Without an axis: the half of a value that is cut, or all of one that is not."""
        known = self.env[old]
        if isinstance(known, Halves) and (axis is None or same_axis(known.axis, axis)):
            return known.nodes[half]
        if axis is None:
            return known
        known = self._join(old)
        if (known, axis) not in self.cuts:
            unit, in_half = expr_of(axis.unit), [partial(self._in_half, h) for h in (0, 1)]
            if calls(known, EMPTY):
                pair = [fresh(emit, known, axis.dim, self.emit.size(expr(n) * unit)) for emit, n in zip(in_half, self.cut.halves)]
            else:
                ends = [(0, self.cut.halves[0]), (0, self.cut.halves[1]) if axis.order == FROM_START else (self.cut.first, self.cut.length)]
                at = [[self.emit.size(expr(n) * unit) for n in bounds] for bounds in ends]
                pair = [emit(aten.slice.Tensor, known, axis.dim, *bounds) for emit, bounds in zip(in_half, at)]
            self.cuts[known, axis] = pair[0], pair[1]
        return self.cuts[known, axis][half]

    def _join(self, old: Node) -> Node:
        """All of a value."""
        known = self.env[old]
        if not isinstance(known, Halves):
            return known
        axes = known.axis if isinstance(known.axis, tuple) else (known.axis,)
        if old not in self.joined and any(axis.order for axis in axes):
            self._need_in_order(known.axis, "what comes behind the last site needs its rows in one order")
            self.joined[old] = self.emit.graph.node_copy(old, self._join)  # the halves have other orders
        if old not in self.joined:
            self.joined[old] = whole = self.emit(aten.cat.default, list(known.nodes), known.axis.dim)
            self.cuts[whole, known.axis] = known.nodes  # a later cut takes the halves
        return self.joined[old]

    def _need_in_order(self, axis: Any, reason: str) -> None:
        """Note why experts' rows are needed in the order of all tokens. Their counts are counted again."""
        for order in experts.orders_of(axis):
            if order.what not in (experts.COUNTS, experts.ENDS):
                self.unroutable.setdefault(order.sort, reason)
