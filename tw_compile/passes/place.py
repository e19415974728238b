"""In which dtype and in which memory the values around a site are.

fp32_residual     The residual goes from site to site in float32. Only the slot's next site reads it.

Over symmetric memory a site reads its input and writes its norm in the workspace of its slot. Without this pass the input is
copied in, and the norm is copied out. The pass finds, by the graph alone, where a copy is not needed:

linear            The row-parallel GEMM writes to the workspace. Only the site reads the result, and the GEMM runs after the
                  slot's previous site. A GEMM that adds to the result of another one adds in the workspace.
in_workspace      The norm stays in the workspace. Only GEMMs read it, and all of them run before the next write to the slot.
sharded_residual  A float32 residual stays in the workspace. Each rank has its own rows.

"Before" and "after" are by data flow, so they hold in any order that Inductor may choose.
"""

import itertools
import operator
from collections.abc import Collection

import torch
from torch.fx import Graph, Node

from .. import ops
from .graph_utils import RESHAPES, Ancestors, arguments, aten, calls, in_order, is_view, keeps_rows, same_shape, value

_GEMMS = (aten.mm.default, aten.addmm.default, aten.bmm.default, ops.linear)


def place(graph: Graph, workspace: bool, gathered: Collection[int] = (), sharded: bool = False) -> None:
    """Set the flags of all sites, and make the GEMMs before them ``linear``, where this is safe. In place.

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
                _use_linear(graph, previous, site, before)
        for site, following in zip(chain, [*chain[1:], None]):
            fp32 = site.number not in gathered and _only_carried(site, following)
            site.set_flags(fp32, (workspace or sharded) and fp32, workspace and _can_stay(site, following, before))
    graph.lint()


class _Site:
    """A ``fused`` call, or a ``start`` with its ``wait``."""

    def __init__(self, node: Node):
        self.node = node
        self.done = node if calls(node, ops.fused) else next(u for u in node.users if calls(u, ops.wait) and u.args[0] is node)
        self.group, self.transport, self.slot, self.number = map(arguments(node).get, ("group", "transport", "slot", "site"))
        self.writer = node  # the first to write to the slot: the site, which copies its input, or its linear

    def result(self, index: int) -> Node | None:
        return next((u for u in self.done.users if calls(u, operator.getitem) and u.args[1] == index), None)

    @property
    def shape(self) -> torch.Size:
        return value(self.node.args[0]).shape

    def set_flags(self, fp32_residual: bool, sharded_residual: bool, in_workspace: bool) -> None:
        for node in {self.node, self.done}:
            flags = {"fp32_residual": fp32_residual, "sharded_residual": sharded_residual, "in_workspace": in_workspace}
            node.args = in_order(node.target, arguments(node) | flags)
        norm, residual = value(self.done)
        if fp32_residual:
            residual = residual.float()
            self.done.meta["val"] = norm, residual
            if (result := self.result(1)) is not None:
                result.meta["val"] = residual


def _use_linear(graph: Graph, previous: _Site | None, site: _Site, before: Ancestors) -> None:
    """Make the GEMM before a site ``linear``, which writes to the slot's workspace, if that is safe."""
    gemm = site.node.args[0]
    if not _only_read_by(gemm, site) or gemm is site.node.args[1]:
        return
    while calls(gemm, *RESHAPES) and keeps_rows(gemm) and len(gemm.args[0].users) == 1:
        gemm = gemm.args[0]
    if not _is_linear(gemm) or (previous is not None and not before(previous.done, gemm)):
        return
    linear = _made_linear(graph, gemm, site, before)
    # A GEMM that another one accumulates writes there first, unless the norm of the previous site would have to leave the workspace.
    onto = linear.args[2]
    first = calls(onto, aten.mm.default, aten.addmm.default) and _is_linear(onto) and len(onto.users) == 1
    if first and (previous is None or before(previous.done, onto)):
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
    before.replace(gemm, linear)
    gemm.replace_all_uses_with(linear)
    graph.erase_node(gemm)
    site.writer = linear
    return linear


def _only_read_by(node: Node, site: _Site) -> bool:
    return all(user in (site.node, site.done) for user in node.users)


def _can_stay(site: _Site, following: _Site | None, before: Ancestors) -> bool:
    """Whether the norm can stay in the workspace."""
    norm = site.result(0)
    readers = list(norm.users) if norm is not None else []
    while readers:
        reader = readers.pop()
        if reader.op == "call_function" and (is_view(reader.target) or reader.target is operator.getitem):
            readers.extend(reader.users)
        elif not calls(reader, *_GEMMS) or not (following is None or before(reader, following.writer)):
            return False
    return True


def _only_carried(site: _Site, following: _Site | None) -> bool:
    """Whether nobody reads the new residual but the slot's next site, as its residual."""
    residual = site.result(1)
    if residual is None or not residual.users:
        return True
    if following is None or not same_shape(site.shape, following.shape):
        return False
    return _only_read_by(residual, following) and following.node.args[1] is residual and following.node.args[0] is not residual
