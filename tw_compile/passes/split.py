"""Fused graph -> the same graph with everything between its first and its last site done twice, once for each half.

Each node of a half carries ``meta["half"]``. Values are cut where a site first needs half of them, and joined again where
an op without a token-axis rule needs them whole, or after the last site.
"""

import operator
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch.fx import Graph, Node

from .. import ops
from ..compat import detect_fake_mode, free_unbacked_symbols, statically_known_true
from ..report import UnsplitOp
from .cut import Cut
from .emit import Emitter
from .find import collectives, communicates
from .graph_utils import WAIT, Ancestors, arguments, aten, calls, in_order, same_shape, source_of, value
from .rules import attention
from .rules.cache import Write, put_entries, view_of, write_of
from .rules.gather import GATHER, gather_along, side_by_side
from .rules.token_axis import Split, TokenAxis, equal, expr, expr_of, map_places, same_axis, split_rule


@dataclass(frozen=True)
class Halves:
    """A value that exists as two nodes, to be joined along ``axis``; of a tuple of values, a tuple of axes."""

    nodes: tuple[Node, Node]
    axis: TokenAxis | tuple


_NOT_HIDDEN = "no mask is known to hide what the second half writes from the first half"


def split(
    graph: Graph, sites: list[Node], cut: Cut, keep_whole: Mapping[Node, str] | None = None
) -> tuple[Graph, list[Node], list[UnsplitOp], dict[Node, str]]:
    """Cut the region between the first and the last of ``sites`` (``fused`` calls).

    keep_whole: calls that are not made for each half, although a rule may allow it -> why
    Returns (new graph, the sites that were cut, what had to be joined between the first and the last of them, what was done
    with each collective that is no site: ``cut`` or ``whole``). All collectives are in the order of ``graph``, the first half
    of each before its second.
    """
    return _Splitter(graph, sites, cut, keep_whole or {}).run()


def _chain(sites: list[Node], before: Ancestors) -> list[Node]:
    """The sites of which each depends on the one before it, so that a half has one of them under way at a time."""
    chain = sites[:1]
    for site in sites[1:]:
        if before(chain[-1], site):
            chain.append(site)
    return chain


def _may_be_zero(length) -> bool:
    """Of a cut's half. One that is made of the sizes of a graph's inputs never is; one that data decides may be."""
    return length == 0 if isinstance(length, int) else bool(free_unbacked_symbols(length))


class _Splitter:
    def __init__(self, graph: Graph, sites: list[Node], cut: Cut, keep_whole: Mapping[Node, str]):
        shape = value(sites[0].args[0]).shape
        self.old, self.cut, self.keep_whole = graph, cut, keep_whole
        self.before = Ancestors(graph)
        self.sites = _chain([s for s in sites if same_shape(value(s.args[0]).shape[:-1], shape[:-1])], self.before)
        self.emit = Emitter(Graph(graph.owning_module), detect_fake_mode([value(sites[0].args[0])]))
        self.env: dict[Node, Node | Halves] = {}
        self.joined: dict[Node, Node] = {}  # a value that is cut -> its whole
        self.cuts: dict[tuple[Node, TokenAxis], tuple[Node, Node]] = {}  # a whole and an axis -> its halves
        self.written: dict[Node, Write] = {}  # a whole, to which each half's rows are written in turn
        self.firsts: dict[Node, Node] = {}  # such a whole -> what it is before the second half's are
        self.unsplit_ops: list[UnsplitOp] = []
        self.done: dict[Node, str] = {node: "whole" for node in collectives(graph) if not calls(node, ops.fused)}

    def run(self):
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
                self._inside(node)
            else:
                self._whole(node)
                self._follow(node)
        self.emit.graph.lint()
        return self.emit.graph, self.sites, self.unsplit_ops, self.done

    def _region(self) -> set[Node]:
        """The nodes that the last site needs, or a collective in front of it that nobody reads and that is made all the same."""
        nodes = list(self.old.nodes)
        ends = [node for node in nodes[: nodes.index(self.sites[-1])] if communicates(node)]
        ends += [user for node in ends for user in node.users if calls(user, WAIT)] + [self.sites[-1]]
        needed = 0
        for end in ends:
            needed |= self.before.of[end] | self.before.bit[end]
        return {node for node in nodes if needed & self.before.bit[node]}

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
        if calls(node, operator.getitem):
            parent = self.env[node.args[0]]
            parts = [self._in_half(h, operator.getitem, n, node.args[1]) for h, n in enumerate(parent.nodes)]
            self.env[node] = Halves(tuple(parts), parent.axis[node.args[1]])
        elif calls(node, aten.sym_size.int):
            self._whole(node)
        elif reason := self.keep_whole.get(node) or self._attempt(node):
            self.unsplit_ops.append(UnsplitOp(str(node.target), source_of(node), reason))
            self._whole(node)
        elif node in self.done:
            self.done[node] = "cut"

    def _attempt(self, node: Node) -> str | None:
        """Make a call once for each half; or leave everything as it was, and return why that cannot be."""
        last, known = next(iter(reversed(self.emit.graph.nodes))), (self.env, self.joined, self.cuts, self.firsts, self.emit.sizes)
        lengths, written, unsplit_ops = [len(k) for k in known], dict(self.written), len(self.unsplit_ops)
        try:
            reason = self._in_halves(node)
        except Exception as error:  # a graph must not break for a call that is only made right as a whole
            reason = f"it cannot be made for a half: {type(error).__name__}: {error}".splitlines()[0]
        if reason is None:
            return None
        for entries, length in zip(known, lengths):
            while len(entries) > length:
                entries.popitem()  # the newest: entries are only added
        self.written, self.emit.half = written, None
        del self.unsplit_ops[unsplit_ops:]
        while (made := next(iter(reversed(self.emit.graph.nodes)))) is not last:
            self.emit.graph.erase_node(made)
        return reason

    def _in_halves(self, node: Node) -> str | None:
        """Make a call once for each half, or return why that cannot be."""
        axes = self._cut_inputs(node)
        if calls(node, GATHER) and axes[node.args[0]].dim == 0 and (found := side_by_side(node)):
            self._gather(node, *found)
            return self._fault(found[0], self.env[found[0]])
        if write := write_of(node, axes):
            return self._write(node, write)
        if node.target in attention.SIGNATURES and any(map(_may_be_zero, self.cut.halves)):
            return "a half may be without tokens, of which there is no attention"
        rule = split_rule(node, axes)
        if isinstance(rule, str):
            return rule
        for axis, a in self._sliced(node, rule):
            needed = expr(self.cut.length) * expr_of(axis.unit)
            if not self._is(value(a).shape[axis.dim], needed):
                return f"an input has {value(a).shape[axis.dim]} entries along the token axis, not {needed}"
        if attention.is_cut_causally(node, axes, self._rows):
            return self._causal_attention(node, rule)
        self._follow(node)

        def of_input(half):
            def convert(place, a):
                return self._join(a) if rule.takes_whole(place, a) else self._half(a, half, rule.slice_of(place, a))

            return convert

        made = Halves(tuple(self._again(node, rule, half, of_input(half)) for half in (0, 1)), rule.axis)
        self.env[node] = made
        return self._fault(node, made)

    def _is(self, size, wanted) -> bool:
        """Whether a size is known to be what an expression says, by the guards that there are, too."""
        if equal(expr(size), wanted):
            return True
        env = self.emit.fake_mode.shape_env
        if env is None or (wanted.is_number and isinstance(size, int)) or not wanted.is_integer:
            return False
        return statically_known_true(size == (int(wanted) if wanted.is_number else env.create_symintnode(wanted, hint=None)))

    def _again(self, node: Node, rule: Split, half: int, of_input) -> Node:
        """The call that ``rule`` makes of ``node`` for a half. of_input: (place, node of the old graph) -> its argument"""

        def convert(place, a):
            if isinstance(a, torch.SymInt):
                return self.emit.size(a)
            return of_input(place, a) if isinstance(a, Node) else a

        args, kwargs = map_places(convert, node.args if rule.args is None else rule.args, node.kwargs)
        return self._in_half(half, rule.target or node.target, *args, **kwargs)

    def _sliced(self, node: Node, rule: Split) -> list[tuple[TokenAxis, Node]]:
        """What a rule slices of the inputs of a call that are not cut."""
        found = []

        def look(place, a):
            axis = rule.slice_of(place, a) if isinstance(a, Node) else None
            if axis is not None and not isinstance(self.env[a], Halves):
                found.append((axis, a))

        map_places(look, node.args if rule.args is None else rule.args, node.kwargs)
        return found

    def _fault(self, node: Node, made: Halves) -> str | None:
        """What is wrong with the halves that a rule made of a call, if they do not make up its result."""
        whole, parts = value(node), [value(part) for part in made.nodes]
        if isinstance(whole, torch.Tensor):
            return self._misfit(whole, parts, made.axis)
        if not isinstance(whole, (tuple, list)) or not isinstance(made.axis, tuple) or not all(calls(u, operator.getitem) for u in node.users):
            return "its token-axis rule does not say where the tokens of each result are"
        if any(len(results) != len(whole) for results in (made.axis, *parts)):
            return f"its token-axis rule gives another number of results than {len(whole)}"
        used = {user.args[1] for user in node.users}
        faults = (self._misfit(whole[i], [part[i] for part in parts], made.axis[i]) for i in sorted(used))
        return next(filter(None, faults), None)

    def _misfit(self, whole, parts, axis) -> str | None:
        """The same of a single result."""
        if not isinstance(axis, TokenAxis) or not 0 <= axis.dim < whole.dim():
            return f"its token-axis rule answers {axis!r}, which is no axis of the result"
        unit, shape = expr_of(axis.unit), [expr(size) for size in whole.shape]
        lengths = [expr(n) * unit for n in (self.cut.length, *self.cut.halves)]
        for tensor, length in zip((whole, *parts), lengths):
            wanted = [*shape[: axis.dim], length, *shape[axis.dim + 1 :]]
            if not isinstance(tensor, torch.Tensor) or tensor.dtype != whole.dtype or tensor.dim() != len(wanted):
                return "its token-axis rule gives halves of another kind than the result"
            if not all(map(self._is, tensor.shape, wanted)):
                return f"its token-axis rule gives a part of shape {list(tensor.shape)}, not {wanted}"
        return None

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

    def _causal_attention(self, node: Node, rule: Split) -> str | None:
        queries, mask = self.env[node.args[0]].nodes, attention.attention_mask(node)
        emit = lambda half: partial(self._in_half, half)
        if mask is None:
            keys, values = (self.env[a].nodes for a in node.args[1:3])
            results = attention.causal_halves(emit, node, queries, keys, values)
        else:
            keys, values = map(self._seen, node.args[1:3])
            of_mask = rule.slice_of(attention.SIGNATURES[node.target].mask, mask)
            rows = [self._half(mask, half, of_mask) for half in (0, 1)]
            results = attention.masked_halves(emit, node, queries, keys, values, rows)
        made = Halves(results, self.env[node.args[0]].axis)
        self.env |= dict.fromkeys(node.users, made)  # only the result itself, by the rule
        return self._misfit(value(node)[0], [value(result) for result in results], made.axis)

    # --- what is written to a cache ----------------------------------------------------------------------------------

    def _write(self, node: Node, write: Write) -> str | None:
        before, rows = [self._join(a) for a in write.before], self.env[write.rows].nodes
        if write.axis.dim != write.dim:
            self._write_entries(node, write, *before)
            return self._fault(node, self.env[node])
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
        return None

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
                self.unsplit_ops.append(UnsplitOp(str(write.call.target), source_of(write.call), _NOT_HIDDEN))
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
                self.firsts[old] = self._again(old, rule, 0, lambda _, a: self._first(a) if a is source else self._join(a))
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
        """One half of a value, along ``axis`` if that is given; of a value that is not cut and without an axis, all of it."""
        known = self.env[old]
        if isinstance(known, Halves) and (axis is None or same_axis(known.axis, axis)):
            return known.nodes[half]
        if axis is None:
            return known
        known = self._join(old)
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
