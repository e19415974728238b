"""graph -> the same graph, with sequence-parallel sites in the form that ``find`` knows.

A sequence-parallel site has two collectives. Add and norm run on this rank's rows only, a *shard*::

    reduce_scatter(x) -> [reshape, bias, scale] -> [+ shard of the residual] -> norm -> all_gather

It becomes a site on all rows, the *whole*::

    all_reduce(x) -> [reshape, bias, scale] -> [+ residual] -> norm

The residual is the whole total of the site before. If no site makes the residual, it is gathered. Other calls that read a shard get a
slice of the whole. Only complete sites are rewritten: without fusion each rank would do the add and the norm of all rows.
"""

import operator
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple

import sympy
import torch
from torch.fx import Graph, Node
from torch.fx.node import map_arg

from ..compat import OpOverload, detect_fake_mode, resolve_process_group
from ..report import Refusal
from .emit import Emitter
from .find import AllReduce, collectives, match_site, overtaken, stays
from .graph_utils import (
    RESHAPES,
    WAIT,
    Ancestors,
    aten,
    c10d,
    calls,
    is_one,
    same_shape,
    same_size,
    sort_and_clean,
    source_of,
    subgraphs,
    value,
)
from .rules.gather import GATHER, gather_along
from .rules.token_axis import Split, TokenAxis, expr, map_places, split_rule

SCATTER = c10d.reduce_scatter_tensor.default
_REFUSED = {c10d.reduce_scatter_tensor_coalesced.default: "reduce_scatter_tensor_coalesced reduces several tensors at once"}


class _Step(NamedTuple):
    """A call of a site, on a shard.

    axis: the dimension of the result along which its rows are
    rule: how the call is made on the whole
    """

    axis: TokenAxis
    rule: Split


@dataclass(frozen=True)
class _Site:
    """A sequence-parallel site.

    scatter:  the reduce-scatter, along the first dimension
    x:        the value that it scatters, with the rows in order
    steps:    the reduce-scatter, the calls on its result up to the norm, and the norm's reshapes -> their steps
    gathered: the values that have all rows of the norm -> the step whose result they gather
    gathers:  the all-gathers and their waits, which the site replaces
    """

    scatter: Node
    x: Node
    steps: dict[Node, _Step]
    gathered: dict[Node, Node]
    gathers: frozenset[Node]

    @property
    def ranks(self) -> int:
        return self.scatter.args[2]

    @property
    def group(self) -> str:
        return self.scatter.args[3]


def unshard(graph: Graph, refused: Mapping[str, str] = MappingProxyType({})) -> tuple[Graph, list[Refusal]]:
    """Rewrite the sequence-parallel sites of a post-grad graph with all-reduces. ``graph`` is not changed.

    refused: names of reduce-scatters that some rank refuses -> the reason
    Returns (the new graph, or ``graph`` itself if it has no such site; a Refusal for each other reduce-scatter).
    """
    kinds = (SCATTER, *_REFUSED)
    scatters = [node for node in graph.nodes if calls(node, *kinds)]
    order = collectives(graph) if scatters else []
    before = Ancestors(graph if scatters else Graph())
    sites, refusals = [], []
    for node in scatters:
        site = refused.get(node.name) or _site(node, order, before)
        if isinstance(site, _Site):
            sites.append(site)
        else:
            refusals.append(Refusal(str(node), source_of(node), site))
    for name, inner in subgraphs(graph):
        reason = f"inside {name}, the graph of a higher-order op"
        refusals += [Refusal(str(node), source_of(node), reason) for node in inner.nodes if calls(node, *kinds)]
    return _Unsharder(graph, sites).run() if sites else graph, refusals


# --- recognising a site ----------------------------------------------------------------------------------------------


def _site(node: Node, order: list[Node], before: Ancestors) -> _Site | str:
    if node.target in _REFUSED:
        return _REFUSED[node.target]
    scattered, reduce_op, ranks, group = node.args
    if not isinstance(group, str):
        return "compile_on_one_rank: the graph would contain the rows of one rank, and all ranks run it"
    match = match_site(node, AllReduce(scattered, reduce_op, group))
    if isinstance(match, Refusal):
        return match.reason
    if late := overtaken(match, order, before):
        return late
    x, dim = _unscattered(scattered, ranks)
    if dim == value(x).dim() - 1:
        return f"it scatters dimension {dim}, which the norm reduces"
    if value(x).shape[dim] % ranks != 0 or _is_padded(x):
        return f"its number of rows is not a multiple of the number of ranks, {ranks}"

    norm = match.norm.output
    outputs = [norm, *(user for user in norm.users if calls(user, *RESHAPES))]
    steps = _steps(node, TokenAxis(dim), outputs, before)
    if isinstance(steps, str):
        return steps
    gathered: dict[Node, Node] = {}
    gathers: set[Node] = set()
    for output in (o for o in outputs if o in steps):
        for gather in (user for user in output.users if calls(user, GATHER)):
            if gather.args[2] != group:
                return f"the sum is scattered over group {group}, the norm gathered over group {gather.args[2]}"
            wholes = _gathered(gather, steps[output].axis.dim)
            if None in wholes:
                return f"the norm is not gathered along the dimension that is scattered, {steps[output].axis.dim}"
            gathered |= dict.fromkeys(wholes, output)
            gathers |= {gather, *(user for user in gather.users if calls(user, WAIT))}
    if not gathered:
        return "no all-gather of the norm follows"
    return _Site(node, x, steps, gathered, frozenset(gathers))


def _unscattered(x: Node, ranks: int) -> tuple[Node, int]:
    """(the value that a reduce-scatter of ``x`` along the first dimension scatters, its dimension that is scattered).

    If ``x`` has the equal parts of another value one after the other, one for each rank, it is that value; otherwise ``x``.
    """
    if calls(x, aten.cat.default) and _cat_dim(x) == 0 and len(x.args[0]) == ranks:
        return _cut_evenly(x.args[0]) or (x, 0)
    return x, 0


def _cut_evenly(nodes: list[Node]) -> tuple[Node, int] | None:
    """(the value of which ``nodes`` are all parts, in order and of equal length, the dimension of the cuts); None if there is none."""
    parts = [part for node in nodes if (part := _part(node))]
    if len(parts) < len(nodes) or len({part[:2] for part in parts}) > 1:
        return None
    whole, dim, _ = parts[0]
    length, count = value(whole).shape[dim], len(nodes)
    for i, (node, (_, _, first)) in enumerate(zip(nodes, parts)):
        if first * count != i * length or value(node).shape[dim] * count != length:
            return None
    return whole, dim


def _part(node: Node) -> tuple[Node, int, Any] | None:
    """(a value, a dimension, its entry with which the part ``node`` begins); None if ``node`` is not a part of a value."""
    if calls(node, operator.getitem) and calls(node.args[0], aten.split.Tensor):
        whole, step, *dim = node.args[0].args
        return whole, dim[0] % value(whole).dim() if dim else 0, _number(step) * node.args[1]
    if calls(node, aten.slice.Tensor) and len(node.args) == 4:
        whole, dim, first, _ = node.args
        return whole, dim % value(whole).dim(), _number(first)
    return None


def _number(argument: Any) -> Any:
    """The value of an argument that is a size, or a node of one."""
    return value(argument) if isinstance(argument, Node) else argument


def _cat_dim(cat: Node) -> int:
    return cat.args[1] % value(cat).dim() if len(cat.args) > 1 else 0


def _is_padded(x: Node) -> bool:
    """Whether rows are added to make equal parts.

    Only the graphs of the last ranks remove these rows again, and all ranks must decide alike.
    """
    parts = x.args[0] if calls(x, aten.cat.default) else [x]
    return any(calls(part, aten.constant_pad_nd.default) for part in parts)


def _steps(scatter: Node, axis: TokenAxis, outputs: list[Node], before: Ancestors) -> dict[Node, _Step] | str:
    """The steps from a reduce-scatter to ``outputs``, the norm and its reshapes; or why they cannot be made on the whole."""
    steps, node, left = {scatter: _Step(axis, Split(axis))}, scatter, set(outputs)
    while left:
        node = node.next
        left.discard(node)
        if not before(scatter, node) or not (node in outputs or before(node, outputs[0])):
            continue
        rule = split_rule(node, {a: steps[a].axis for a in node.all_input_nodes if a in steps})
        if isinstance(rule, Split) and isinstance(rule.axis, TokenAxis):
            steps[node] = _Step(rule.axis, rule)
        elif node not in outputs[1:]:
            reason = rule if isinstance(rule, str) else "it has several results"
            return f"{node.target} is between reduce-scatter and all-gather: {reason}"
    return steps


def _gathered(gather: Node, dim: int) -> list[Node | None]:
    """The values with all rows that are made of an all-gather of shards along ``dim``; None for one whose rows are in another order."""
    waits = [user for user in gather.users if calls(user, WAIT)]
    if dim == 0:
        return waits
    return [_in_order(user, wait, dim, gather) for wait in waits for user in wait.users if not _is_size(user)]


def _is_size(node: Node) -> bool:
    return isinstance(value(node), torch.SymInt)


def _in_order(user: Node, wait: Node, dim: int, gather: Node) -> Node | None:
    """The whole along ``dim`` that is made by ``user`` of the shards in ``wait``, which are one after the other along dimension 0."""
    if calls(user, *RESHAPES) and all(map(is_one, value(gather.args[0]).shape[:dim])):
        return user
    parts = user.users if calls(user, aten.split.Tensor) else [user]
    cats = {cat for part in parts for cat in part.users}
    cat = cats.pop() if len(cats) == 1 else None
    if not calls(cat, aten.cat.default) or len(cat.args[0]) != gather.args[1] or _cut_evenly(cat.args[0]) != (wait, 0):
        return None
    return cat if _cat_dim(cat) == dim else None


# --- rewriting -------------------------------------------------------------------------------------------------------


class _Unsharder:
    """Copies a graph, with its sites on all rows.

    Sizes are expressed by those of the whole. The length of a shard is a symbol of its own, or a rounded quotient, and other passes
    could not know that the shards' lengths add up to that of the whole.
    """

    def __init__(self, graph: Graph, sites: list[_Site]):
        self.old = graph
        self.emit = Emitter(Graph(graph.owning_module), detect_fake_mode([value(sites[0].x)]))
        self.site_of = {node: site for site in sites for node in site.steps}
        self.gathered = {node: (s, site.steps[s].axis) for site in sites for node, s in site.gathered.items()}
        self.env: dict[Node, Node] = {}
        self.wholes: dict[tuple[Node, TokenAxis], Node] = {}  # (a shard of the old graph, its axis) -> the whole
        self.lengths: dict[sympy.Expr, sympy.Expr] = {}  # length of a shard -> a fraction of the whole's
        self.replaced = {node for site in sites for node in site.gathers}  # their copies have no users
        self.first: dict[Node, list[Node]] = {}  # an all-reduce -> the gathered residuals of its site

    def run(self) -> Graph:
        for node in self.old.nodes:
            self.emit.like = node
            if node in self.site_of:
                self._step(node, self.site_of[node])
            elif node in self.gathered:
                self.env[node] = self._shaped(self.wholes[self.gathered[node]], value(node).shape)
            else:
                self.env[node] = self._copy(node)
        replaced = {self.env[node] for node in self.replaced}
        sort_and_clean(self.emit.graph, lambda node: stays(node) and node not in replaced, self.first)
        return self.emit.graph

    # --- nodes -------------------------------------------------------------------------------------------------------

    def _step(self, node: Node, site: _Site) -> None:
        """Make a step of a site on the whole."""
        step, rule = site.steps[node], site.steps[node].rule
        if node is site.scatter:
            whole = self.emit(c10d.all_reduce.default, self._argument(site.x), "sum", site.group)
            whole._rename(node.name)  # the report names the reduce-scatter
        else:
            axes = {a: site.steps[a].axis for a in node.all_input_nodes if a in site.steps}
            wholes = {a: self.wholes[a, axis] for a, axis in axes.items()}
            length = next(value(wholes[a]).shape[axis.dim] for a, axis in axes.items())

            def convert(place: object, a: Any) -> Any:
                if isinstance(a, torch.SymInt):
                    return self._size(a)
                if not isinstance(a, Node) or a in wholes:
                    return wholes.get(a, a) if isinstance(a, Node) else a
                sliced = rule.slice_of(place, a)
                return self._argument(a) if sliced is None else self._gather(a, sliced, length, site)

            args, kwargs = map_places(convert, node.args if rule.args is None else rule.args, node.kwargs)
            whole = self.emit(rule.target or node.target, *args, **kwargs)
        self.wholes[node, step.axis] = whole
        self._set_length(value(node).shape[step.axis.dim], value(whole).shape[step.axis.dim], site)

    def _gather(self, shard: Node, axis: TokenAxis, length: Any, site: _Site) -> Node:
        """The whole of a shard along ``axis``. length: its number of rows"""
        if (shard, axis) not in self.wholes:
            shape = list(value(shard).shape)
            self._set_length(shape[axis.dim], length, site)
            whole = gather_along(self.emit, self._argument(shard), site.ranks, site.group, axis.dim)
            shape[axis.dim] = length
            self.wholes[shard, axis] = self._shaped(whole, shape)
        # The fused site takes the residual, so it is gathered before the all-reduce.
        self.first.setdefault(self.wholes[site.scatter, site.steps[site.scatter].axis], []).append(self.wholes[shard, axis])
        return self.wholes[shard, axis]

    def _shard(self, node: Node) -> Node:
        """The shard of a step: this rank's rows of the whole."""
        site = self.site_of[node]
        axis, rank = site.steps[node].axis, resolve_process_group(site.group).rank()
        length = expr(value(node).shape[axis.dim])
        first, end = self.emit.size(length * rank), self.emit.size(length * (rank + 1))
        return self.emit(aten.slice.Tensor, self.wholes[node, axis], axis.dim, first, end)

    def _copy(self, node: Node) -> Node:
        resized = any(not _alike(value(a), _number(self._argument(a))) for a in node.all_input_nodes)
        is_call = isinstance(node.target, OpOverload) or node.target is operator.getitem
        if not (resized and is_call) or _is_size(node):
            return self.emit.graph.node_copy(node, self._argument)
        return self.emit(node.target, *map_arg(node.args, self._argument), **map_arg(node.kwargs, self._argument))

    def _argument(self, node: Node) -> Any:
        """A node of the old graph as an argument in the new one."""
        if _is_size(node):
            changes = self._of_whole(value(node)) != expr(value(node))
            return self._size(value(node)) if changes or calls(node, aten.sym_size.int) else self.env[node]
        if node not in self.env:
            self.env[node] = self._shard(node)
        return self.env[node]

    # --- sizes -------------------------------------------------------------------------------------------------------

    def _set_length(self, shard: Any, whole: Any, site: _Site) -> None:
        """Note that ``shard`` is the length of a rank's part of ``whole`` rows."""
        if isinstance(shard, torch.SymInt):
            self.lengths[expr(shard)] = expr(whole) / site.ranks

    def _of_whole(self, size: Any) -> sympy.Expr:
        """A size, with the lengths of shards expressed by those of wholes; unchanged if the result is not an integer."""
        known = sympy.expand(expr(size).xreplace(self.lengths))
        return known if known.is_integer else expr(size)

    def _size(self, size: torch.SymInt) -> Any:
        """A size of the old graph as an argument in the new one."""
        return self.emit.size(self._of_whole(size))

    def _shaped(self, node: Node, shape: Any) -> Node:
        """A whole in a shape of the old graph."""
        shape = [self._of_whole(size) for size in shape]
        if shape == [expr(size) for size in value(node).shape]:
            return node
        return self.emit(aten.reshape.default, node, [self.emit.size(size) for size in shape])


def _alike(a: Any, b: Any) -> bool:
    """Whether two fake values have the same sizes."""
    if isinstance(a, torch.Tensor):
        return same_shape(a.shape, b.shape)
    if isinstance(a, (tuple, list)):
        return all(map(_alike, a, b))
    return not isinstance(a, (int, torch.SymInt)) or same_size(a, b)
