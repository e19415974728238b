"""graph -> [Match | Refusal]: each all-reduce, as a site that can be fused or with the reason why not. The graph is not changed.

A site in post-grad ATen, where all ways to write a tensor-parallel model look the same::

    all_reduce(x, "sum", group) -> wait_tensor -> [reshape] -> [+ bias] -> [cast] -> [* scale] -> [+ residual] -> norm

The cast is to float32, of a model whose residual is in float32 and whose layers are not, as under autocast.
A reshape, or a product with a scalar tensor, gives the same on each rank's part of the sum: it is moved before the all-reduce.
``unshard`` gives sequence-parallel sites this form.

The residual may be either operand of the add. There may be no residual, as in the norm after a vocabulary-parallel embedding. norms.py
recognises the norms. Where no norm follows that it knows, the site may end at the residual: where the graph does, as a layer that is
compiled alone, or before a norm of another kind.
"""

import operator
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
import torch.distributed as dist
from torch.fx import Graph, GraphModule, Node

from .. import ops
from ..compat import OpOverload, resolve_process_group, statically_known_true
from ..options import TokenWeaveError
from ..report import Refusal
from .graph_utils import (
    RESHAPES,
    WAIT,
    Ancestors,
    aten,
    c10d,
    calls,
    check_function,
    is_tensor,
    keeps_rows,
    other_operand,
    prims,
    source_of,
    subgraphs,
    value,
)
from .norms import NO_NORM, Norm, has_row_length, is_number, is_read_by_rows, match_norm, without_norm

# Limits of the kernels.
MAX_HIDDEN = 32768
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
LEAVES = "the graph returns the sum with its residual before a norm: compile the whole model instead of each layer"


@dataclass(frozen=True)
class AllReduce:
    """The arguments of a call of an all-reduce.

    x:         the node of this rank's partial sum, [..., H]; bfloat16, float16 and float32 can be fused
    reduce_op: the reduce op; only ``"sum"`` can be fused
    group:     the name of the process group (``ProcessGroup.group_name``)
    """

    x: Node
    reduce_op: str
    group: str


def _functional(node: Node) -> AllReduce:
    return AllReduce(*node.args[:3])


# All-reduce ops -> how to read the arguments of a call. Inductor's own passes make the in-place op.
_ALL_REDUCES: dict[OpOverload, Callable[[Node], AllReduce]] = {
    c10d.all_reduce.default: _functional,
    c10d.all_reduce_.default: _functional,
}
# All-reduce ops that cannot be sites -> the reason.
_REFUSED = {c10d.all_reduce_coalesced.default: "all_reduce_coalesced reduces several tensors at once"}


def register_all_reduce(op: OpOverload, read: Callable[[Node], AllReduce]) -> None:
    """Register a custom op as an all-reduce, so that its sites are found. All ranks must register the same ops.

    op:   an OpOverload. It returns the sum over the ranks of a group, in the shape and dtype of this rank's partial sum. It does not
          change the partial sum.
    read: the node of a call -> its ``AllReduce(x, reduce_op, group)``

    Raises TokenWeaveError for other arguments. It is raised on all ranks, at the first graph, if they have registered different ops.
    """
    if not isinstance(op, OpOverload):
        raise TokenWeaveError(f"register_all_reduce takes an OpOverload, such as torch.ops.library.op.default, not {op!r:.200}")
    check_function(read, "register_all_reduce takes a function that returns an AllReduce")
    _ALL_REDUCES[op] = read


# Other collectives of libraries -> how to read the name of the group of a call. They keep their order, and are no sites.
_OTHERS: dict[OpOverload, Callable[[Node], str]] = {}


def register_collective(op: OpOverload, group_of: Callable[[Node], str]) -> None:
    """Register a custom op as a collective other than an all-reduce. group_of: the node of a call -> the name of its group"""
    _OTHERS[op] = group_of


def is_sum(node: Node) -> bool:
    """Whether a value is the result of an all-reduce."""
    return calls(node.args[0] if calls(node, WAIT) else node, *_ALL_REDUCES)


_COLLECTIVES = ("_c10d_functional", "_c10d_functional_autograd", "c10d_functional")  # the namespaces of torch's collectives
_LOCAL = ("wait_tensor", "_wrap_tensor_autograd")  # ops in these namespaces that do not communicate


def communicates(node: Node) -> bool:
    """Whether a call communicates with other ranks.

    These are torch's functional collectives, registered all-reduces, our sites, and calls of graphs that contain one of them: of
    higher-order ops and of layers. ``wait_tensor`` and the ``wait`` of a site do not communicate.
    """
    if node.op != "call_function":
        return False
    op = node.target
    if isinstance(op, OpOverload):
        return op in (ops.fused, ops.start, *_ALL_REDUCES, *_OTHERS) or (op.namespace in _COLLECTIVES and op._opname not in _LOCAL)
    return any(communicates(inner) for graph in _inside(node) for inner in graph.nodes)


def _inside(call: Node) -> list[Graph]:
    """The graphs among the arguments of a call."""
    names = [a.target for a in call.all_input_nodes if a.op == "get_attr"]
    modules = [operator.attrgetter(name)(call.graph.owning_module) for name in names]
    return [module.graph for module in modules if isinstance(module, GraphModule)]


def collectives(graph: Graph) -> list[Node]:
    """The calls of a graph that communicate, in program order. All ranks must make them in this order."""
    return [node for node in graph.nodes if communicates(node)]


def stays(node: Node) -> bool:
    """Whether a call without users is kept, as it communicates or has side effects."""
    return node.is_impure() or communicates(node)


def all_reduce_of(node: Node) -> AllReduce | None:
    """The arguments of a call of an all-reduce; None for other nodes."""
    return _ALL_REDUCES[node.target](node) if calls(node, *_ALL_REDUCES) else None


def registered_all_reduces() -> list[str]:
    """The names of the ops that users have registered as collectives."""
    return [str(op) for op in (*_ALL_REDUCES, *_OTHERS) if op.namespace not in _COLLECTIVES]


def collective_group(node: Node) -> str:
    """The name of a collective's group; '' if its arguments do not give one."""
    group: Any = None
    if node.target in _ALL_REDUCES:
        group = _ALL_REDUCES[node.target](node).group
    elif node.target in _OTHERS:
        group = _OTHERS[node.target](node)
    elif isinstance(node.target, OpOverload):
        named = {a.name: given for a, given in zip(node.target._schema.arguments, node.args)} | dict(node.kwargs)
        group = named.get("group", named.get("group_name"))
    try:
        return _name_of(group) if isinstance(group, (str, Node)) else ""
    except _Refused:
        return ""


@dataclass(frozen=True)
class Match:
    """An all-reduce -> residual add -> norm that one op can replace.

    x:        this rank's partial sum
    group:    the name of the process group
    linear:   the calls on the sum that are moved before the all-reduce, in order: reshapes, and products with a scalar tensor
    bias:     a vector that is added to the sum, or None
    scale:    factor on the sum, after the bias
    residual: None if nothing is added
    total:    ``scale * (sum + bias) + residual``, the input of the norm and the next residual. It is in the dtype of x; or in float32,
              where the residual is too
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
        """The place in the model of the residual add, or of the call of the norm if nothing is added."""
        if self.residual is not None:
            return source_of(self.total)
        modules = list((self.norm.output.meta.get("nn_module_stack") or {}).values())
        norm_of_torch = modules and "torch.nn.modules" in str(modules[-1][1])
        return source_of(self.norm.output, callers=0 if norm_of_torch else 1)


class _Refused(Exception):
    """An all-reduce cannot be fused, for this reason."""


def find(graph: Graph, refused: Mapping[str, str] = MappingProxyType({})) -> list[Match | Refusal]:
    """Each all-reduce of a post-grad graph, in the order of the graph, as a match or a refusal.

    refused: names of all-reduces that some rank refuses -> the reason
    """
    found: list[Match | Refusal] = []
    totals: set[Node] = set()
    order = collectives(graph)
    before = Ancestors(graph if order else Graph())
    for node in graph.nodes:
        if calls(node, *_ALL_REDUCES, *_REFUSED):
            match = Refusal(str(node), source_of(node), refused[node.name]) if node.name in refused else _match(node, totals)
            if isinstance(match, Match) and (late := overtaken(match, order, before)):
                match = Refusal(str(node), source_of(node), late)
            found.append(match)
            totals |= {match.total} if isinstance(match, Match) else set()
    for name, inner in subgraphs(graph):
        reason = f"inside {name}, the graph of a higher-order op"
        found += [Refusal(str(node), source_of(node), reason) for node in inner.nodes if calls(node, *_ALL_REDUCES, *_REFUSED)]
    return found


def overtaken(match: Match, order: list[Node], before: Ancestors) -> str | None:
    """Why a site cannot keep its place in ``order``, the collectives of its graph; None if it can.

    It cannot if one of its inputs depends on a later collective.
    """
    norm = match.norm
    given = [match.residual, match.bias, norm.weight, norm.shift, *(a for step in match.linear for a in step.all_input_nodes)]
    own = {match.all_reduce, *match.linear, *match.all_reduce.users}
    given = [a for a in given if a is not None and a not in own]
    for later in order[order.index(match.all_reduce) + 1 :]:
        if any(a is later or before(later, a) for a in given):
            return f"its residual add or norm depends on {later}, a later collective"
    return None


def _match(node: Node, totals: Collection[Node]) -> Match | Refusal:
    if node.target in _REFUSED:
        return Refusal(str(node), source_of(node), _REFUSED[node.target])
    return match_site(node, _ALL_REDUCES[node.target](node), totals)


def match_site(node: Node, call: AllReduce, totals: Collection[Node] = ()) -> Match | Refusal:
    """The site that begins with ``node``, the sum over the ranks that ``call`` describes; or why it is not one.

    totals: those of sites before it. A site that ends before its norm adds one of them, as all ranks are known to have the same; or its
            sum is read by rows, as a norm does
    """
    try:
        return _site(node, call, totals)
    except _Refused as refused:
        return Refusal(str(node), source_of(node), str(refused))


def _site(node: Node, call: AllReduce, totals: Collection[Node]) -> Match:
    if call.reduce_op != "sum":
        raise _Refused(f"reduce op {call.reduce_op!r}, not 'sum'")
    group = _name_of(call.group)
    if resolve_process_group(group).size() == 1:
        raise _Refused(f"group {group} has one rank: there is nothing to reduce")
    if value(node).dtype not in DTYPES:
        raise _Refused(f"its dtype is {value(node).dtype}; bfloat16, float16 and float32 can be fused")
    hidden = value(node).shape[-1] if value(node).dim() > 1 else None
    if not isinstance(hidden, int) or hidden % 8 or hidden > MAX_HIDDEN:
        raise _Refused(f"shape {list(value(node).shape)}: the last dimension must be a multiple of 8 up to {MAX_HIDDEN}")

    total = _sole_user(node, "sum") if any(calls(user, WAIT) for user in node.users) else node
    linear: list[Node] = []
    dtype, bias, scale, residual = value(node).dtype, None, 1.0, None
    while True:
        is_cast = value(total).dtype != dtype
        norm = match_norm(total, dtype)
        if isinstance(norm, Norm) and (residual is not None or not is_cast):
            return Match(node, call.x, group, tuple(linear), bias, scale, residual, total, norm)
        if residual is not None and not isinstance(norm, Norm):
            lacking = LEAVES if norm is NO_NORM and any(user.op == "output" for user in total.users) else norm
            if not is_cast and (residual in totals or is_read_by_rows(total)):
                return Match(node, call.x, group, tuple(linear), bias, scale, residual, total, without_norm(total, lacking))
            raise _Refused(lacking)
        if isinstance(norm, Norm):
            raise _Refused(f"a cast to {value(total).dtype} comes before the norm")
        if residual is not None or norm is not NO_NORM:
            raise _Refused(norm)
        user = _sole_user(total, "reduced value")
        if not is_cast and ((calls(user, *RESHAPES) and keeps_rows(user)) or _factor(user, total)) and bias is None and scale == 1.0:
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
                if value(other).dtype != dtype:
                    raise _Refused(f"the bias is {value(other).dtype}, the reduced value {dtype}")
                bias = other
            else:
                residual = _checked_residual(other, total)
        elif calls(user, prims.convert_element_type.default) and user.args[1] == torch.float32 and not is_cast:
            pass
        elif calls(user, prims.convert_element_type.default):
            raise _Refused(f"a cast to {user.args[1]} comes before the residual add")
        else:
            raise _Refused(f"{norm}; the reduced value is the input of {user.target}")
        total = user


def _name_of(group: str | Node) -> str:
    """The name of a group, which is a node if the graph takes it from a mesh (``compile_on_one_rank``).

    Raises _Refused for a node whose group has only some of the ranks. Other ranks run the graph too, and their group has another name.
    """
    if isinstance(group, str):
        return group
    known = getattr(group.graph.owning_module, group.target, None) if group.op == "get_attr" else value(group)
    known = getattr(known, "real_obj", known)
    if not isinstance(known, dist.ProcessGroup):
        raise _Refused(f"its group is {group.format_node()}, which is not known before the graph runs")
    if known.size() != dist.get_world_size():
        raise _Refused("compile_on_one_rank: its group has only some of the ranks, and its name differs between ranks")
    return known.group_name


def _sole_user(node: Node, what: str) -> Node:
    """The only user of a node. Raises _Refused if there is none, or are several. what: its name in messages"""
    users = list(node.users)
    if len(users) != 1:
        raise _Refused(f"the {what} has {len(users)} users ({', '.join(str(u.target) for u in users) or 'none'})")
    if users[0].op == "output":
        raise _Refused(f"the graph returns the {what} before a norm")
    return users[0]


def _factor(node: Node, total: Node) -> Node | None:
    """The scalar tensor that ``node`` multiplies ``total`` with; None if it does something else."""
    other = other_operand(node, total) if calls(node, aten.mul.Tensor) else None
    return other if is_tensor(other) and value(other).dim() == 0 and value(node).dtype == value(total).dtype else None


def _checked_residual(residual: Node, total: Node) -> Node:
    theirs, ours = value(residual), value(total)
    if theirs.dtype not in (ours.dtype, torch.float32):
        raise _Refused(f"the residual is {theirs.dtype}, the reduced value {ours.dtype}")
    if not (theirs.dim() == ours.dim() and all(statically_known_true(a == b) for a, b in zip(theirs.shape, ours.shape))):
        raise _Refused(f"the residual has shape {list(theirs.shape)}, the reduced value {list(ours.shape)}")
    return residual
