"""graph -> [Match | Refusal]: every all-reduce, as a site that can be fused or with the reason why not. Changes nothing.

A site, in post-grad ATen, where every way of writing a tensor-parallel model looks alike::

    all_reduce(x, "sum", group) -> wait_tensor -> [reshape] -> [+ bias] -> [* scale] -> [+ residual] -> norm

A reshape, or a factor that is a tensor of one number, may as well be applied to each rank's part of the sum: it is moved there.
Sequence-parallel sites get this form from ``unshard``.

The residual comes in either order, or not at all (the norm after a vocabulary-parallel embedding). What a norm is: ``norms``.
"""

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
import torch.distributed as dist
from torch.fx import Graph, GraphModule, Node

from .. import ops
from ..compat import OpOverload, resolve_process_group, statically_known_true
from ..report import Refusal
from .graph_utils import (
    RESHAPES,
    WAIT,
    Ancestors,
    aten,
    c10d,
    calls,
    is_tensor,
    keeps_rows,
    other_operand,
    prims,
    source_of,
    subgraphs,
    value,
)
from .norms import NO_NORM, Norm, has_row_length, is_number, match_norm

# What the kernels take.
MAX_HIDDEN = 32768
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class AllReduce:
    """The arguments of an all-reduce: the node of the partial sum, the reduce op, the name of the process group."""

    x: Node
    reduce_op: str
    group: str


def _functional(node: Node) -> AllReduce:
    return AllReduce(*node.args[:3])


# How to read each op that is an all-reduce. The in-place form of the op appears where Inductor's own passes made it.
_ALL_REDUCES: dict[object, Callable[[Node], AllReduce]] = {
    c10d.all_reduce.default: _functional,
    c10d.all_reduce_.default: _functional,
}
# All-reduces of a form that no site can have, with the reason.
_REFUSED = {c10d.all_reduce_coalesced.default: "all_reduce_coalesced reduces several tensors at once"}


def register_all_reduce(op, read: Callable[[Node], AllReduce]) -> None:
    """Name a custom op as an all-reduce, so that its sites are found.

    op:   an OpOverload that returns the sum over the ranks of a group, and takes the partial sum unchanged
    read: a call's node -> AllReduce(x, reduce_op, group); the group's name as ``ProcessGroup.group_name`` gives it
    """
    _ALL_REDUCES[op] = read


_COLLECTIVES = ("_c10d_functional", "_c10d_functional_autograd", "c10d_functional")  # namespaces of torch's
_LOCAL = ("wait_tensor", "_wrap_tensor_autograd")  # ops there that ask nothing of another rank


def communicates(node: Node) -> bool:
    """Whether a call needs the other ranks: torch's functional collectives, registered all-reduces, our sites, and the calls of
    higher-order ops and of layers that have one of these inside. Not ``wait_tensor``, nor the ``wait`` of a site."""
    if node.op != "call_function":
        return False
    op = node.target
    if isinstance(op, OpOverload):
        return op in (ops.fused, ops.start, *_ALL_REDUCES) or (op.namespace in _COLLECTIVES and op._opname not in _LOCAL)
    return any(communicates(inner) for graph in _inside(node) for inner in graph.nodes)


def _inside(call: Node) -> list[Graph]:
    """The graphs that a call is given."""
    names = [a.target for a in call.all_input_nodes if a.op == "get_attr"]
    modules = [operator.attrgetter(name)(call.graph.owning_module) for name in names]
    return [module.graph for module in modules if isinstance(module, GraphModule)]


def collectives(graph: Graph) -> list[Node]:
    """All calls of a graph that communicate, in program order: that in which every rank has to make them."""
    return [node for node in graph.nodes if communicates(node)]


def stays(node: Node) -> bool:
    """Whether a call is kept although nobody reads its result: the other ranks make it, too, or it does more than return."""
    return node.is_impure() or communicates(node)


def registered_all_reduces() -> list[str]:
    """The ops that were registered as all-reduces."""
    return [str(op) for op in _ALL_REDUCES if op.namespace not in _COLLECTIVES]


def collective_group(node: Node) -> str:
    """The name of the group that a collective is for; '' where its arguments do not name one."""
    if node.target in _ALL_REDUCES:
        group = _ALL_REDUCES[node.target](node).group
    elif isinstance(node.target, OpOverload):
        named = {a.name: given for a, given in zip(node.target._schema.arguments, node.args)} | dict(node.kwargs)
        group = named.get("group", named.get("group_name"))
    else:
        group = None
    try:
        return _name_of(group) if isinstance(group, (str, Node)) else ""
    except _Refused:
        return ""


@dataclass(frozen=True)
class Match:
    """An all-reduce -> residual add -> norm that one op can replace.

    x, group:   what is reduced, over which process group
    total:      the value that the norm reads and that the next residual is: ``scale * (sum + bias) + residual``
    residual:   None where nothing is added
    linear:     what is done to the sum first and will be done to its parts instead, in order: reshapes, and products with
                a tensor of one number
    """

    all_reduce: Node
    x: Node
    group: str
    linear: tuple[Node, ...]
    bias: Node | None
    scale: float
    residual: Node | None
    total: Node
    norm: Norm

    @property
    def source(self) -> str:
        """The residual add, or the call of the norm where nothing is added."""
        if self.residual is not None:
            return source_of(self.total)
        modules = list((self.norm.output.meta.get("nn_module_stack") or {}).values())
        norm_is_torchs = modules and "torch.nn.modules" in str(modules[-1][1])
        return source_of(self.norm.output, callers=0 if norm_is_torchs else 1)


class _Refused(Exception):
    pass


def find(graph: Graph, refused: Mapping[str, str] = MappingProxyType({})) -> list[Match | Refusal]:
    """Every all-reduce of a post-grad graph, in the order of the graph, as a match or a refusal.

    refused: names of all-reduces that are refused in any case -> the reason
    """
    found, order = [], collectives(graph)
    before = Ancestors(graph) if order else None
    for node in graph.nodes:
        if calls(node, *_ALL_REDUCES, *_REFUSED):
            match = Refusal(str(node), source_of(node), refused[node.name]) if node.name in refused else _match(node)
            if isinstance(match, Match) and (late := overtaken(match, order, before)):
                match = Refusal(str(node), source_of(node), late)
            found.append(match)
    for name, inner in subgraphs(graph):
        for node in inner.nodes:
            if calls(node, *_ALL_REDUCES, *_REFUSED):
                found.append(Refusal(str(node), source_of(node), f"inside {name}, the graph of a higher-order op"))
    return found


def overtaken(match: Match, order: list[Node], before: Ancestors) -> str | None:
    """Why a site cannot keep its place among ``order``, the collectives of its graph, if it is so.

    It begins when it has all that it adds and multiplies. If that hangs on a later collective, it would come after that.
    """
    norm = match.norm
    given = [match.residual, match.bias, norm.weight, norm.shift, *(a for step in match.linear for a in step.all_input_nodes)]
    own = {match.all_reduce, *match.linear, *match.all_reduce.users}
    given = [a for a in given if a is not None and a not in own]
    for later in order[order.index(match.all_reduce) + 1 :]:
        if any(a is later or before(later, a) for a in given):
            return f"its residual add or norm waits for {later}, a later collective"
    return None


def _match(node: Node) -> Match | Refusal:
    if node.target in _REFUSED:
        return Refusal(str(node), source_of(node), _REFUSED[node.target])
    return match_site(node, _ALL_REDUCES[node.target](node))


def match_site(node: Node, call: AllReduce) -> Match | Refusal:
    """What follows a node whose result is a sum over ranks, as ``call`` says: a whole site, or the reason why it is none."""
    try:
        return _site(node, call)
    except _Refused as refused:
        return Refusal(str(node), source_of(node), str(refused))


def _site(node: Node, call: AllReduce) -> Match:
    if call.reduce_op != "sum":
        raise _Refused(f"reduce op {call.reduce_op!r}, not 'sum'")
    group = _name_of(call.group)
    if resolve_process_group(group).size() == 1:
        raise _Refused(f"group {group} has one rank: there is nothing to reduce")
    if value(node).dtype not in DTYPES:
        raise _Refused(f"{value(node).dtype} is reduced; bfloat16, float16 and float32 can be fused")
    hidden = value(node).shape[-1] if value(node).dim() > 1 else None
    if not isinstance(hidden, int) or hidden % 8 or hidden > MAX_HIDDEN:
        raise _Refused(f"shape {list(value(node).shape)}: the last dimension must be a multiple of 8 up to {MAX_HIDDEN}")

    total = _sole_user(node, "sum") if any(calls(user, WAIT) for user in node.users) else node
    linear, bias, scale, residual = [], None, 1.0, None
    while True:
        norm = match_norm(total)
        if isinstance(norm, Norm):
            return Match(node, call.x, group, tuple(linear), bias, scale, residual, total, norm)
        if residual is not None or norm is not NO_NORM:
            raise _Refused(norm)
        user = _sole_user(total, "reduced value")
        if (calls(user, *RESHAPES) and keeps_rows(user) or _factor(user, total)) and bias is None and scale == 1.0:
            linear.append(user)
        elif calls(user, aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar) and is_number(user.args[1]):
            factor = float(user.args[1])
            scale *= factor if calls(user, aten.mul.Tensor, aten.mul.Scalar) else 1.0 / factor
        elif calls(user, aten.add.Tensor) and user.kwargs.get("alpha", 1) == 1 and is_tensor(other_operand(user, total)):
            other = other_operand(user, total)
            if other is total:
                raise _Refused("the reduced value is added to itself")
            is_vector = value(other).dim() == 1 < value(total).dim()
            if is_vector and bias is None and scale == 1.0 and has_row_length(other, total):
                if value(other).dtype != value(total).dtype:
                    raise _Refused(f"the bias is {value(other).dtype}, the reduced value {value(total).dtype}")
                bias = other
            else:
                residual = _checked_residual(other, total)
        elif calls(user, prims.convert_element_type.default):
            raise _Refused(f"a cast to {user.args[1]} stands before the residual add")
        else:
            raise _Refused(f"{norm}; the reduced value goes to {user.target}")
        total = user


def _name_of(group) -> str:
    """The name of a group; of one that the graph takes from a mesh (``compile_on_one_rank``), if it is that of all ranks.

    What one rank compiles then may run on the others, for which a smaller group has another name.
    """
    if isinstance(group, str):
        return group
    known = getattr(group.graph.owning_module, group.target, None) if group.op == "get_attr" else value(group)
    known = getattr(known, "real_obj", known)
    if not isinstance(known, dist.ProcessGroup):
        raise _Refused(f"its group is {group.format_node()}, which is not known before the graph runs")
    if known.size() != dist.get_world_size():
        raise _Refused("compile_on_one_rank: its group is a part of the ranks, and the others run it with theirs")
    return known.group_name


def _sole_user(node: Node, what: str) -> Node:
    users = list(node.users)
    if len(users) != 1:
        raise _Refused(f"the {what} has {len(users)} users ({', '.join(str(u.target) for u in users) or 'none'})")
    if users[0].op == "output":
        raise _Refused(f"the {what} leaves the graph without a norm")
    return users[0]


def _factor(node: Node, total: Node) -> Node | None:
    """The tensor of one number that ``total`` is multiplied with, if that is what ``node`` does."""
    other = other_operand(node, total) if calls(node, aten.mul.Tensor) else None
    return other if is_tensor(other) and value(other).dim() == 0 and value(node).dtype == value(total).dtype else None


def _checked_residual(residual: Node, total: Node) -> Node:
    theirs, ours = value(residual), value(total)
    if theirs.dtype != ours.dtype:
        raise _Refused(f"the residual is {theirs.dtype}, the reduced value {ours.dtype}")
    if not (theirs.dim() == ours.dim() and all(statically_known_true(a == b) for a, b in zip(theirs.shape, ours.shape))):
        raise _Refused(f"the residual has shape {list(theirs.shape)}, the reduced value {list(ours.shape)}")
    return residual
