"""In which dtype and in which memory the values around a site are.

fp32_residual     The residual goes from site to site in float32. Only the slot's next site reads it.

Over symmetric memory a site reads its input and writes its norm in the workspace of its slot. Without this pass the input is
copied in, and the norm is copied out. The pass finds, by the graph alone, where a copy is not needed:

linear            The row-parallel GEMM writes to the workspace. Only the site reads the result, and the GEMM runs after the
                  slot's previous site. A GEMM that adds to the result of another one adds in the workspace. Scales may follow a GEMM
                  of 8 bits: then the last of the ops that Inductor compiles into one kernel is ``placed``, which writes there.
in_workspace      The norm stays in the workspace, and so do the quantised norm and its scale. Only GEMMs read them, or what quantises
                  the norm for them, and all of them run before the next write to the slot.
sharded_residual  A float32 residual stays in the workspace. Each rank has its own rows.
quantise          A quantised norm has the place in the workspace where a residual would be that is whole. So the graph quantises the norm
                  of a site whose residual is not sharded.

"Before" and "after" are by data flow, so they hold in any order that Inductor may choose.
"""

import itertools
import operator
from collections.abc import Collection, Iterator

import torch
from torch.fx import Graph, Node

from .. import ops
from .emit import keep_strides
from .graph_utils import (
    RESHAPES,
    Ancestors,
    arguments,
    aten,
    calls,
    in_order,
    is_view,
    keeps_rows,
    positional,
    prims,
    same_shape,
    value,
)
from .quantise import NORM, QUANTISED, RESIDUAL, SCALE, in_graph
from .rules.quantised import is_gemm
from .rules.token_axis import is_pointwise

_GEMMS = (aten.mm.default, aten.addmm.default, aten.bmm.default, ops.linear, ops.scaled_linear, ops.scaled_linear_v2)
_SCALED = {aten._scaled_mm.default: ops.scaled_linear, aten._scaled_mm_v2.default: ops.scaled_linear_v2}
# Reductions that Inductor computes in a kernel, once, and does not compute again where they are read. With fewer elements it does.
_REDUCTIONS = (aten.amax.default, aten.amin.default, aten.sum.dim_IntList, aten.mean.dim)
_REDUCED = 16


def place(graph: Graph, workspace: bool, gathered: Collection[int] = (), sharded: bool = False) -> list[int]:
    """Set the flags of all sites, and let what they reduce be written in the workspace, where this is safe. In place.

    Returns the numbers of the sites that a workspace cannot carry: their residual is in float32 by itself, and is read elsewhere, too.

    workspace: whether there may be a workspace; without one only ``fp32_residual`` is set
    gathered:  numbers of the sites whose residual must be whole, as another rank needs it
    sharded:   whether residuals may be sharded without a workspace, as with a wire of 8 bits or less
    """
    sites = [_Site(n) for n in graph.nodes if calls(n, ops.fused, ops.start)]
    slots: dict[tuple, list[_Site]] = {}
    for site in sites:
        slots.setdefault((site.group, site.slot), []).append(site)
    before = Ancestors(graph)
    for chain in slots.values():
        if not all(before(site.done, following.node) for site, following in itertools.pairwise(chain)):
            continue  # sites that may run in either order would overwrite each other's values in the slot
        if workspace:
            for previous, site in zip([None, *chain], chain):
                _use_workspace(graph, previous, site, before)
        for site, following in zip(chain, [*chain[1:], None]):
            fp32 = site.number not in gathered and _only_carried(site, following)
            may_stay = workspace and _can_stay(site, following, before)
            site.set_flags(fp32 or site.fp32_residual, (workspace or sharded) and fp32, may_stay)
    for site in sites if workspace else ():
        given = arguments(site.node)
        if given["quantise"] and not given["sharded_residual"]:
            in_graph(graph, site.node, site.done)
    graph.lint()
    return _lost(sites) if workspace else []


def _lost(sites: list["_Site"]) -> list[int]:
    """The numbers of the sites whose residual is in float32 by itself and must be whole, and of those that lead to them."""
    lost: set[int] = set()
    for site in reversed(sites):
        given, users = arguments(site.node), site.done.users if site.fp32_residual else ()
        readers = {arguments(reader)["site"] for user in users for reader in user.users if calls(reader, ops.fused, ops.start)}
        if site.fp32_residual and (not given["sharded_residual"] or readers & lost):
            lost.add(given["site"])
    return sorted(lost)


class _Site:
    """A ``fused`` call, or a ``start`` with its ``wait``."""

    def __init__(self, node: Node):
        self.node = node
        self.done = node if calls(node, ops.fused) else next(u for u in node.users if calls(u, ops.wait) and u.args[0] is node)
        self.group, self.transport, self.slot, self.number = map(arguments(node).get, ("group", "transport", "slot", "site"))
        self.fp32_residual = arguments(node)["fp32_residual"]  # as the model has it, before this pass sets the flag
        # The first to write to the slot: the site, which copies its input; its linear; or a GEMM before what is placed.
        self.writer = node

    def result(self, index: int) -> Node | None:
        return next((u for u in self.done.users if calls(u, operator.getitem) and u.args[1] == index), None)

    @property
    def shape(self) -> torch.Size:
        return value(self.node.args[0]).shape

    @property
    def dtype(self) -> torch.dtype:
        return value(self.node.args[0]).dtype

    def set_flags(self, fp32_residual: bool, sharded_residual: bool, in_workspace: bool) -> None:
        for node in {self.node, self.done}:
            flags = {"fp32_residual": fp32_residual, "sharded_residual": sharded_residual, "in_workspace": in_workspace}
            node.args = in_order(node.target, arguments(node) | flags)
        norm, residual, *others = value(self.done)
        if fp32_residual:
            residual = residual.float()
            self.done.meta["val"] = norm, residual, *others
            if (result := self.result(RESIDUAL)) is not None:
                result.meta["val"] = residual


def _use_workspace(graph: Graph, previous: _Site | None, site: _Site, before: Ancestors) -> None:
    """Let the GEMM before a site, or the ops behind it, write to the slot's workspace, if that is safe."""
    last = site.node.args[0]
    if not _only_read_by(last, site) or last is site.node.args[1]:
        return
    while calls(last, *RESHAPES) and keeps_rows(last) and len(last.args[0].users) == 1:
        last = last.args[0]

    def is_later(node: Node) -> bool:
        return previous is None or before(previous.done, node)

    if not is_later(last):
        return
    if calls(last, *_SCALED):
        _made_scaled_linear(graph, last, site, before)
        return
    if not _is_linear(last):
        gemm = max(filter(is_later, _gemms_behind(last)), key=before.bit.__getitem__, default=None)  # as many as possible run before
        if gemm not in (None, last) and not is_view(last.target):
            _place(graph, last, site, before)
            site.writer = gemm
        return
    linear = _made_linear(graph, last, site, before)
    # A GEMM that another one accumulates writes there first, unless the norm of the previous site would have to leave the workspace.
    onto = linear.args[2]
    first = calls(onto, aten.mm.default, aten.addmm.default) and _is_linear(onto) and len(onto.users) == 1
    if first and is_later(onto):
        stays = previous is not None and _can_stay(previous, site, before)
        site.writer = onto
        if previous is not None and stays and not _can_stay(previous, site, before):
            site.writer = linear
        else:
            _made_linear(graph, onto, site, before)


def _is_linear(gemm: Node) -> bool:
    """Whether ``linear`` can do a GEMM: it may have a bias, or add to the result of another one."""
    if not calls(gemm, aten.mm.default, aten.addmm.default) or gemm.kwargs:
        return False
    added = value(gemm.args[0])
    return len(gemm.args) == 2 or added.dim() == 1 or same_shape(added.shape, value(gemm).shape)


def _made_linear(graph: Graph, gemm: Node, site: _Site, before: Ancestors) -> Node:
    *bias, a, b = gemm.args
    with graph.inserting_before(gemm):
        linear = graph.call_function(ops.linear, (a, b, *(bias or [None]), site.slot, site.group, site.transport))
    linear.meta = dict(gemm.meta)
    _take_the_place(graph, gemm, linear, site, before)
    return linear


def _made_scaled_linear(graph: Graph, gemm: Node, site: _Site, before: Ancestors) -> None:
    with graph.inserting_before(gemm):
        linear = graph.call_function(_SCALED[gemm.target], (*positional(gemm), site.slot, site.group, site.transport))
    linear.meta = dict(gemm.meta)
    keep_strides(linear)
    _take_the_place(graph, gemm, linear, site, before)


def _take_the_place(graph: Graph, gemm: Node, linear: Node, site: _Site, before: Ancestors) -> None:
    before.replace(gemm, linear)
    gemm.replace_all_uses_with(linear)
    graph.erase_node(gemm)
    site.writer = linear


def _gemms_behind(last: Node) -> Iterator[Node]:
    """The GEMMs whose results go into a value, where Inductor computes it in a kernel of its own."""
    seen, left = {last}, [last]
    while left:
        node = left.pop()
        if calls(node, *_GEMMS) or is_gemm(node):
            yield node
        elif _is_compiled(node):
            new = [a for a in node.all_input_nodes if a not in seen]
            seen.update(new)
            left += new


def _is_compiled(node: Node) -> bool:
    """Whether Inductor computes a call where its result is read, or in a kernel with other calls."""
    if node.op != "call_function":
        return False
    return calls(node, prims.convert_element_type.default, *_REDUCTIONS) or is_pointwise(node.target) or is_view(node.target)


def _place(graph: Graph, last: Node, site: _Site, before: Ancestors) -> None:
    with graph.inserting_after(last):
        placed = graph.call_function(ops.placed, (last, site.slot, site.group, site.transport))
    placed.meta = dict(last.meta)
    before.replace(last, placed)
    last.replace_all_uses_with(placed, delete_user_cb=lambda user: user is not placed)


def _only_read_by(node: Node, site: _Site) -> bool:
    return all(user in (site.node, site.done) for user in node.users)


def _can_stay(site: _Site, following: _Site | None, before: Ancestors) -> bool:
    """Whether the norm, what it is quantised to, and the scale can stay in the workspace."""
    # Partial sums overwrite the norm. A quantised one lies elsewhere: only the next site overwrites it.
    limits = {NORM: following.writer, QUANTISED: following.node, SCALE: following.node} if following else {}
    results = {index: site.result(index) for index in (NORM, QUANTISED, SCALE)}
    return all(_is_read_before(result, limits.get(i), before) for i, result in results.items() if result is not None)


def _is_read_before(result: Node, limit: Node | None, before: Ancestors) -> bool:
    """Whether all kernels that read a result of a site run before ``limit``."""
    left = list(result.users)
    seen = set(left)
    while left:
        reader = left.pop()
        if calls(reader, *_GEMMS, ops.placed) or is_gemm(reader) or (calls(reader, *_REDUCTIONS) and _is_of_many(reader)):
            if limit is not None and not before(reader, limit):
                return False
        elif calls(reader, operator.getitem) or _is_compiled(reader):
            new = [user for user in reader.users if user not in seen]
            seen.update(new)
            left += new
        else:
            return False
    return True


def _is_of_many(reduction: Node) -> bool:
    """Whether a reduction is of rows with so many elements that Inductor does not compute it again."""
    x, *given = reduction.args
    dims = given[0] if given and given[0] else range(value(x).dim())  # none are all
    sizes = [value(x).shape[dim] for dim in dims]
    return any(isinstance(size, int) and size >= _REDUCED for size in sizes)


def _only_carried(site: _Site, following: _Site | None) -> bool:
    """Whether nobody reads the new residual but the slot's next site, as its residual."""
    residual = site.result(RESIDUAL)
    if residual is None or not residual.users:
        return True
    if following is None or not same_shape(site.shape, following.shape) or site.dtype != following.dtype:
        return False
    return _only_read_by(residual, following) and following.node.args[1] is residual and following.node.args[0] is not residual
