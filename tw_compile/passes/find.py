"""graph -> [Match | Refusal]: every all-reduce, as a site that can be fused or with the reason why not. Changes nothing.

A site, in post-grad ATen, where every way of writing a tensor-parallel model looks alike::

    all_reduce(x, "sum", group) -> wait_tensor -> [reshape] -> [+ bias] -> [* scale] -> [+ residual] -> norm

A reshape, or a factor that is a tensor of one number, may as well be applied to each rank's part of the sum: it is moved there.
Sequence-parallel sites get this form from ``unshard``.

The residual comes in either order, or not at all (the norm after a vocabulary-parallel embedding). The norm is an RMSNorm, any of

    (r32 * rsqrt(mean(r32²) + eps)).to(dtype) * weight            Hugging Face
    (r32 * rsqrt(mean(r32²) + eps) * weight).to(dtype)            torch.nn.RMSNorm
    (r32 * rsqrt(mean(r32²) + eps) * (1 + weight)).to(dtype)      Gemma

or a LayerNorm, which is the same of r32 - mean(r32), and may have a bias of its own, added last: the *shift*.
"""

import operator
from collections.abc import Callable, Iterable, Iterator, Mapping
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
    same_size,
    source_of,
    subgraphs,
    value,
)

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
class Norm:
    """A norm: its result, and what it is, ``row * rsqrt(mean(row²) + eps) * (weight + offset) + shift``.

    center: LayerNorm, whose row is r - mean(r); otherwise RMSNorm, whose row is r, and which has no shift
    """

    output: Node
    weight: Node | None
    shift: Node | None
    eps: float
    offset: float
    center: bool

    @property
    def kind(self) -> str:
        return "LayerNorm" if self.center else "RMSNorm"


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


_NO_NORM = "no RMSNorm or LayerNorm follows"


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
        if residual is not None or norm is not _NO_NORM:
            raise _Refused(norm)
        user = _sole_user(total, "reduced value")
        if (calls(user, *RESHAPES) and keeps_rows(user) or _factor(user, total)) and bias is None and scale == 1.0:
            linear.append(user)
        elif calls(user, aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar) and _number(user.args[1]):
            factor = float(user.args[1])
            scale *= factor if calls(user, aten.mul.Tensor, aten.mul.Scalar) else 1.0 / factor
        elif calls(user, aten.add.Tensor) and user.kwargs.get("alpha", 1) == 1 and is_tensor(other_operand(user, total)):
            other = other_operand(user, total)
            if other is total:
                raise _Refused("the reduced value is added to itself")
            is_vector = value(other).dim() == 1 < value(total).dim()
            if is_vector and bias is None and scale == 1.0 and _rows_of(other, total):
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


def _number(argument) -> bool:
    return isinstance(argument, (int, float)) and not isinstance(argument, bool)


def _rows_of(vector: Node, total: Node) -> bool:
    return same_size(value(vector).shape[0], value(total).shape[-1])


def _checked_residual(residual: Node, total: Node) -> Node:
    theirs, ours = value(residual), value(total)
    if theirs.dtype != ours.dtype:
        raise _Refused(f"the residual is {theirs.dtype}, the reduced value {ours.dtype}")
    if not (theirs.dim() == ours.dim() and all(statically_known_true(a == b) for a, b in zip(theirs.shape, ours.shape))):
        raise _Refused(f"the residual has shape {list(theirs.shape)}, the reduced value {list(ours.shape)}")
    return residual


def match_norm(total: Node) -> Norm | str:
    """The norm over the last dimension that reads ``total``, perhaps through a reshape; or the reason why none was found."""
    reason = _NO_NORM
    for start in (total, *(u for u in total.users if calls(u, *RESHAPES) and keeps_rows(u))):
        # A model may cast the value anew for each time that it reads it.
        rows = [r for r in (start, *_casts(start, torch.float32)) if value(r).dtype == torch.float32]
        for norm in (*_rms_norms(rows, total), *_layer_norms(rows, total)):
            if isinstance(norm, Norm):
                return norm
            reason = norm
    return reason


def _casts(node: Node, dtype) -> list[Node]:
    return [u for u in node.users if calls(u, prims.convert_element_type.default) and u.args[1] == dtype]


def _rms_norms(rows: list[Node], total: Node) -> Iterator[Norm | str]:
    """Whatever starts with the mean of squares: a norm, or the reason why it cannot be fused."""
    for square in _squares(rows):
        yield _normalised(rows, square, "mean of squares", total, center=False)


def _layer_norms(rows: list[Node], total: Node) -> Iterator[Norm | str]:
    """Whatever starts with a variance: ``var``, ``var_mean``, or the mean of squares of x - mean(x)."""
    both = [u for r in rows for u in r.users if calls(u, aten.var_mean.correction)]
    means = [u for r in rows for u in r.users if calls(u, aten.mean.dim) and _of_rows(u)] + _items(filter(_of_rows, both), 1)
    centered = [u for r in rows for u in r.users if calls(u, aten.sub.Tensor) and u.args[1] in means and not u.kwargs]
    variances = [u for r in rows for u in r.users if calls(u, aten.var.correction)]
    for variance in (*_items(both, 0), *variances, *_squares(centered)):
        yield _normalised(centered, variance, "variance", total, center=True)


def _items(pairs: Iterable[Node], index: int) -> list[Node]:
    return [u for pair in pairs for u in pair.users if calls(u, operator.getitem) and u.args[1] == index]


def _squares(nodes: list[Node]) -> list[Node]:
    """The means of the squares of ``nodes``."""
    squares = [
        u for node in nodes for u in node.users
        if (calls(u, aten.pow.Tensor_Scalar) and u.args[1] == 2) or (calls(u, aten.mul.Tensor) and u.args == (node, node))
    ]  # fmt: skip
    return [u for square in squares for u in square.users if calls(u, aten.mean.dim)]


def _dims(reduction: Node) -> list[int]:
    return list(reduction.args[1] if len(reduction.args) > 1 and reduction.args[1] else range(value(reduction.args[0]).dim()))


def _of_rows(reduction: Node) -> bool:
    """Whether it is over the last dimension, and keeps it."""
    rank, result = value(reduction.args[0]).dim(), value(reduction)
    result = result if isinstance(result, torch.Tensor) else result[0]
    return [d % rank for d in _dims(reduction)] == [rank - 1] and result.dim() == rank


def _normalised(rows: list[Node], spread: Node, what: str, total: Node, center: bool) -> Norm | str:
    """The norm that divides one of ``rows`` by sqrt(spread + eps), or why it cannot be fused. what: the name of ``spread``."""
    reduction = spread.args[0] if calls(spread, operator.getitem) else spread
    if not _of_rows(reduction):
        return f"the {what} is over dimensions {_dims(reduction)}, not the last one"
    if not calls(reduction, aten.mean.dim) and reduction.kwargs.get("correction") != 0:
        return "the variance is divided by H - 1, not by H (unbiased=False)"
    shifted = _one(spread, aten.add.Tensor, aten.add.Scalar)
    if not shifted or not _number(shifted.args[1]) or shifted.kwargs:
        return f"the {what} is not followed by + eps"
    scaled = _divided(rows, shifted)
    if not scaled:
        return f"x * rsqrt({what} + eps) is not complete"
    return _weighted(scaled, float(shifted.args[1]), total, center)


def _one(node: Node, *targets) -> Node | None:
    return next((u for u in node.users if calls(u, *targets)), None)


def _divided(rows: list[Node], square: Node) -> Node | None:
    """One of ``rows``, divided by the square root of ``square``."""
    for root in square.users:
        power = root.args[1] if calls(root, aten.pow.Tensor_Scalar) else None
        if calls(root, aten.sqrt.default) or power == 0.5:
            quotients = (u for u in root.users if calls(u, aten.div.Tensor) and u.args[0] in rows and u.args[1] is root)
        elif calls(root, aten.rsqrt.default) or power == -0.5:
            quotients = (u for u in root.users if calls(u, aten.mul.Tensor) and other_operand(u, root) in rows)
        else:
            continue
        if found := next(quotients, None):
            return found
    return None


def _weighted(scaled: Node, eps: float, total: Node, center: bool) -> Norm | str:
    """The tail of the norm: a weight, with ``center`` a shift, and a cast back before, between or after them; all optional."""
    dtype, output, weight, offset, shift = value(total).dtype, scaled, None, 0.0, None
    for _ in range(3):
        if len(output.users) != 1:
            break
        user = next(iter(output.users))
        other = other_operand(user, output) if calls(user, aten.mul.Tensor, aten.add.Tensor) else None
        if calls(user, prims.convert_element_type.default) and user.args[1] == dtype and value(output).dtype != dtype:
            output = user
        elif calls(user, aten.mul.Tensor) and weight is None and shift is None and _is_vector(other, total):
            output, (weight, offset) = user, _weight(other, total)
        elif calls(user, aten.add.Tensor) and center and shift is None and _is_vector(other, total) and not user.kwargs:
            output, shift = user, _as_it_was(other, total)
        else:
            break
    if value(output).dtype != dtype:
        return f"the norm of a {dtype} value leaves as {value(output).dtype}" + (
            f" (its weight is {value(weight).dtype})" if weight is not None else ""
        )
    for name, vector in (("weight", weight), ("bias", shift)):
        if vector is not None and value(vector).dtype not in (dtype, torch.float32):
            return f"the norm's {name} is {value(vector).dtype}, its input {dtype}"
    return Norm(output, weight, shift, eps, offset, center)


def _is_vector(operand, total: Node) -> bool:
    """Whether it is [H], and not made of ``total``, which comes out of the op that takes the vector."""
    return is_tensor(operand) and value(operand).dim() == 1 and _rows_of(operand, total) and not _made_of(operand, total)


def _made_of(node: Node, total: Node) -> bool:
    seen, left = set(), [node]
    while left:
        node = left.pop()
        if node is total:
            return True
        left += [a for a in node.all_input_nodes if a not in seen]
        seen.update(node.all_input_nodes)
    return False


def _weight(vector: Node, total: Node) -> tuple[Node, float]:
    """(weight, offset), where the factor is weight + offset."""
    offset = 0.0
    if calls(vector, aten.add.Tensor, aten.add.Scalar) and vector.args[1] in (1, 1.0) and not vector.kwargs:
        vector, offset = vector.args[0], 1.0
    return _as_it_was(vector, total), offset


def _as_it_was(vector: Node, total: Node) -> Node:
    """The parameter behind a cast to float32: the kernel widens it itself, and need not do so for each call."""
    if calls(vector, prims.convert_element_type.default) and vector.args[1] == torch.float32:
        if value(vector.args[0]).dtype == value(total).dtype:
            return vector.args[0]
    return vector
