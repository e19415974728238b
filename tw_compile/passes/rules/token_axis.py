"""The token axis of a value, and token-axis rules: one for each family of ops. Rules make no nodes.

A rule gets a call and the token axes of its inputs that are cut. It returns how to make the call once for each half, and the token axis
of the result. It returns None if half of the result needs more than half of the inputs: the call is then made on all tokens, and the
report lists it.

``split`` checks each answer: it compares the shapes and dtypes of the halves with those of the whole.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch.fx import Node

from ...compat import OpOverload
from ..graph_utils import RESHAPES, aten, check_function, check_ops, is_one, is_tensor, prims, value

c10d = torch.ops._c10d_functional


@dataclass(frozen=True)
class TokenAxis:
    """Where the tokens of a value are.

    dim:   the dimension of the tokens, from 0 on
    unit:  entries of this dimension for each entry of the axis that is cut: an int, a SymInt or a sympy expression
    order: None if the entries are in the order of the tokens. Rules that users register get and return no others: see experts.py

    For example, if a batch of B sequences of T tokens is cut between sequences, [B, T, H] has TokenAxis(0, 1), and [B·T, H] has
    TokenAxis(0, T).
    """

    dim: int
    unit: Any = 1
    order: Any = field(default=None, repr=False)


# The order of a value of which each half takes the first entries, as many as it has, such as 0, 1, 2, ...
FROM_START = "start"


@dataclass(frozen=True)
class Split:
    """How a call is made once for each half.

    axis:   the TokenAxis of the result; for several results a tuple, with one for each
    whole:  the inputs that are cut, and that both halves need whole, such as keys and values of an attention
    slices: input -> its TokenAxis, for inputs that are not cut: each half takes its slice
    args:   the positional arguments, if they differ from those of the call, as the sizes of a reshape; None if they do not
    target: the op to call, if it is another one; None if it is not
    kwargs: as ``args``, the keyword arguments. Both may contain ``PerHalf`` (per_half.py)
    agrees: the op takes only vectors that have an entry for each token, so that the size of one need not be known

    ``whole`` and ``slices`` name an input by its place in the call: a position; (position, index) in a list; a keyword; or
    (keyword, index). A node names all places that it has. Use a node only if all of these places have the same meaning: one tensor may
    be both query and key.

    The halves together must have the shape and the dtype of the result. Otherwise the call is made on all tokens, and the report gives
    the reason.
    """

    axis: TokenAxis | tuple[TokenAxis, ...]
    whole: frozenset[Any] = frozenset()
    slices: Mapping[Any, TokenAxis] = field(default_factory=dict)
    args: tuple | None = None
    target: Callable | None = None
    kwargs: dict[str, Any] | None = None
    agrees: bool = False

    def arguments(self, node: Node) -> tuple[tuple, dict[str, Any]]:
        """The positional and the keyword arguments of the call for a half, before each input is replaced by what the half takes."""
        return node.args if self.args is None else self.args, node.kwargs if self.kwargs is None else self.kwargs

    def takes_whole(self, place: object, node: Node) -> bool:
        """Whether both halves need the input ``node`` at this place whole."""
        return place in self.whole or node in self.whole

    def slice_of(self, place: object, node: Node) -> TokenAxis | None:
        """The axis along which each half takes a slice of the input ``node`` at this place; None if it takes no slice."""
        return self.slices.get(place, self.slices.get(node))


Axes = Mapping[Node, TokenAxis]  # input that is cut -> its TokenAxis
Rule = Callable[[Node, Axes], Split | str | None]
_RULES: dict[object, Rule] = {}


def register_token_rule(*targets: Any) -> Callable[[Rule], Rule]:
    """Register the token-axis rule of ops. A decorator of a function ``rule(node, axes) -> Split | str | None``.

    targets: the ops, as OpOverloads; or names such as "mslk::f8f8bf16_rowwise", for ops that may be loaded later
    node:    the call, an fx node. ``node.meta["val"]`` is the fake tensor of the result for all tokens, with its shape and dtype. Inputs
             have one too
    axes:    input that is cut -> its TokenAxis

    The rule returns None, or the reason, if half of the result needs more than half of the inputs. It replaces an earlier rule of the op.
    A call runs on all tokens, and the report gives the reason, if the rule returns None, raises an exception, or returns a ``Split``
    whose halves do not have the shapes and dtypes of the result. All ranks must register the same rules: otherwise TokenWeaveError is
    raised on all ranks. Raises TokenWeaveError for targets that are no ops, and for a rule that is no function.
    """
    check_ops(targets)

    def register(rule: Rule) -> Rule:
        check_function(rule, "register_token_rule decorates a function rule(node, axes)")
        _RULES.update(dict.fromkeys(targets, rule))
        return rule

    return register


def registered_rules() -> list[str]:
    """The names of the ops whose rule is a user's or a library's: it is from elsewhere, or was made for the op in a function."""
    places = {op: (getattr(rule, "__module__", "") or "", getattr(rule, "__qualname__", "")) for op, rule in _RULES.items()}
    return [str(op) for op, (module, name) in places.items() if not module.startswith(__package__) or "<locals>" in name]


def split_rule(node: Node, axes: Mapping[Node, TokenAxis]) -> Split | str:
    """How a call is made for each half, or why it cannot be. axes: input that is cut -> its TokenAxis"""
    name = node.target.name() if isinstance(node.target, OpOverload) else None
    rule = _RULES.get(node.target) or _RULES.get(name) or (pointwise if is_pointwise(node.target) else None)
    if rule is None:
        return "no token-axis rule for this op"
    try:
        answer = rule(node, axes)
    except Exception as error:  # a user's rule must not break the compilation
        return f"its token-axis rule raises {type(error).__name__}: {error}"
    if answer is None or isinstance(answer, (Split, str)):
        return answer or "its token-axis rule does not cover this use"
    return f"its token-axis rule returns {answer!r}, which is not a Split"


def is_pointwise(op: Any) -> bool:
    """Whether an op is pointwise, writes to no input, and draws no random numbers, which would differ in two calls."""
    tags = getattr(op, "tags", ())
    return torch.Tag.pointwise in tags and torch.Tag.nondeterministic_seeded not in tags and not op._schema.is_mutable


def places(node: Node) -> Iterator[tuple[object, Node]]:
    """(place as in ``Split``, node) for each input of a call."""
    found: list[tuple[object, Any]] = []
    map_places(lambda place, a: found.append((place, a)), node.args, node.kwargs)
    return ((place, a) for place, a in found if isinstance(a, Node))


def map_places(change: Callable[[Any, Any], Any], args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """Replace each argument of a call that is not a list or tuple, also inside of these, by change(place, argument)."""

    def walk(place: Any, a: Any) -> Any:
        if not isinstance(a, (list, tuple)):
            return change(place, a)
        at = place if isinstance(place, tuple) else (place,)
        inner = [walk((*at, i), item) for i, item in enumerate(a)]
        return inner if isinstance(a, list) else tuple(inner)

    return tuple(walk(i, a) for i, a in enumerate(args)), {name: walk(name, a) for name, a in kwargs.items()}


# --- sizes -----------------------------------------------------------------------------------------------------------


def expr(size: int | torch.SymInt) -> sympy.Expr:
    """A size as a sympy expression."""
    return size.node.expr if isinstance(size, torch.SymInt) else sympy.Integer(size)


def equal(a: sympy.Expr, b: sympy.Expr) -> bool:
    """Whether two sympy expressions are equal for all values of their symbols. Tries values if sympy cannot simplify the difference."""
    difference = sympy.expand(a - b)
    if difference == 0:
        return True
    symbols = sorted(difference.free_symbols, key=str)
    if not symbols:
        return False
    # Sympy does not simplify rounded quotients, for example.
    return all(difference.subs({s: start + step * i for i, s in enumerate(symbols)}) == 0 for start, step in _TRIALS)


_TRIALS = ((2, 1), (7, 4), (64, 31), (331, 18), (1024, 105))


def product(sizes: Iterable[int | torch.SymInt]) -> sympy.Expr:
    return sympy.Mul(*(expr(s) for s in sizes))  # sympy.prod of none is an int


def same_axis(a: TokenAxis, b: TokenAxis) -> bool:
    return (a.dim, a.order) == (b.dim, b.order) and (a.unit is b.unit or equal(expr_of(a.unit), expr_of(b.unit)))


def expr_of(unit: int | torch.SymInt | sympy.Expr) -> sympy.Expr:
    return unit if isinstance(unit, sympy.Basic) else expr(unit)


def _dim(node: Node, position: int, default: int, rank: int) -> int:
    return (node.args[position] if len(node.args) > position else default) % rank


# --- op families -----------------------------------------------------------------------------------------------------


@register_token_rule(
    prims.convert_element_type.default, aten.clone.default, aten.alias.default, aten.where.self, aten.detach.default,
    c10d.all_reduce.default, c10d.wait_tensor.default,
)  # fmt: skip
def pointwise(node: Node, axes: Axes) -> Split | str | None:
    """All inputs are broadcast to the result. The all-reduces of both halves give that of the whole."""
    results = value(node)
    rank = (results if isinstance(results, torch.Tensor) else results[0]).dim()
    found = [TokenAxis(rank - value(a).dim() + axis.dim, axis.unit) for a, axis in axes.items()]
    if not all(same_axis(found[0], other) for other in found):
        return None
    axis, slices = found[0], {}
    for place, a in places(node):
        if a in axes or not is_tensor(a):
            continue
        dim = axis.dim - (rank - value(a).dim())
        if dim >= 0 and not is_one(value(a).shape[dim]):
            slices[place] = TokenAxis(dim, axis.unit)
    return Split(axis if isinstance(results, torch.Tensor) else (axis,) * len(results), slices=slices)


@register_token_rule(aten.mm.default)
def _mm(node: Node, axes: Axes) -> Split | str | None:
    a, b = node.args[:2]
    if a in axes and b not in axes:
        return Split(axes[a]) if axes[a].dim == 0 else None
    if b in axes and a not in axes:
        return Split(axes[b]) if axes[b].dim == 1 else None
    return None


@register_token_rule(aten.addmm.default)
def _addmm(node: Node, axes: Axes) -> Split | str | None:
    bias, a, b = node.args[:3]
    if b in axes or a not in axes or axes[a].dim != 0 or (bias in axes and not same_axis(axes[bias], axes[a])):
        return None
    if value(bias).dim() == 2 and not is_one(value(bias).shape[0]):
        return Split(axes[a], slices={0: axes[a]})
    return None if bias in axes else Split(axes[a])


@register_token_rule(aten.bmm.default)
def _bmm(node: Node, axes: Axes) -> Split | str | None:
    """The tokens are the batch, the rows of a, or the columns of b.

    If both a and b are cut, and the tokens are the rows of a, this is the scores or the weighted sum of an attention. Each query needs
    all keys, so b is taken whole.
    """
    a, b = node.args[:2]
    if a in axes and b in axes:
        if axes[a].dim == axes[b].dim == 0:
            return Split(axes[a])
        return Split(axes[a], whole=frozenset([1])) if axes[a].dim == 1 and axes[b].dim != 0 else None
    if a in axes:
        batch = axes[a].dim == 0
        return Split(axes[a], slices={1: axes[a]} if batch else {}) if axes[a].dim in (0, 1) else None
    batch = axes[b].dim == 0
    return Split(axes[b], slices={0: axes[b]} if batch else {}) if axes[b].dim in (0, 2) else None


@register_token_rule(*RESHAPES)
def _reshape(node: Node, axes: Axes) -> Split | str | None:
    """The token dimension of the result has as many entries before it as that of the input. A step must stay a number of its entries."""
    source, sizes = node.args[0], list(node.args[1])
    axis, before, after = axes[source], value(source).shape, value(node).shape
    outer = product(before[: axis.dim])
    inner = expr_of(axis.unit) * product(before[axis.dim + 1 :])
    for dim, size in enumerate(after):
        if is_one(size) or sympy.simplify(product(after[:dim]) - outer) != 0:
            continue
        unit = sympy.simplify(inner / product(after[dim + 1 :]))
        if unit.is_integer is False or unit.as_numer_denom()[1] != 1:
            return None
        # Each half has its own length there. All other sizes stay.
        sizes = [after[i] if isinstance(s, int) and s == -1 else s for i, s in enumerate(sizes)]
        sizes[dim] = -1
        return Split(TokenAxis(dim, unit), args=(source, sizes))
    return None


@register_token_rule(aten.permute.default)
def _permute(node: Node, axes: Axes) -> Split | str | None:
    source, order = node.args
    axis, rank = axes[source], value(node).dim()
    return Split(TokenAxis([d % rank for d in order].index(axis.dim), axis.unit))


@register_token_rule(aten.transpose.int)
def _transpose(node: Node, axes: Axes) -> Split | str | None:
    source, a, b = node.args
    axis, rank = axes[source], value(node).dim()
    swap = {a % rank: b % rank, b % rank: a % rank}
    return Split(TokenAxis(swap.get(axis.dim, axis.dim), axis.unit))


@register_token_rule(aten.unsqueeze.default)
def _unsqueeze(node: Node, axes: Axes) -> Split | str | None:
    source, at = node.args
    axis = axes[source]
    return Split(TokenAxis(axis.dim + (at % value(node).dim() <= axis.dim), axis.unit))


@register_token_rule(aten.squeeze.dim, aten.squeeze.dims, aten.squeeze.default)
def _squeeze(node: Node, axes: Axes) -> Split | str | None:
    """The squeezed dimensions are named: a half may have a single token, and its token dimension must stay."""
    source, *dims = node.args
    axis, shape = axes[source], value(source).shape
    dims = range(len(shape)) if not dims else [dims[0]] if isinstance(dims[0], int) else dims[0]
    gone = sorted({d % len(shape) for d in dims if is_one(shape[d])})
    if axis.dim in gone:
        return None
    axis = TokenAxis(axis.dim - sum(d < axis.dim for d in gone), axis.unit)
    if not gone:
        return Split(axis, args=(source,), target=aten.alias.default)
    return Split(axis, args=(source, gone), target=aten.squeeze.dims)


@register_token_rule(aten.expand.default)
def _expand(node: Node, axes: Axes) -> Split | str | None:
    source, sizes = node.args[0], list(node.args[1])
    axis = axes[source]
    dim = axis.dim + value(node).dim() - value(source).dim()
    sizes[dim] = -1
    return Split(TokenAxis(dim, axis.unit), args=(source, sizes))


@register_token_rule(aten.slice.Tensor, aten._softmax.default, aten.cumsum.default, aten.flip.default, aten.topk.default,
                     aten.sort.default, aten.split.Tensor, aten.split_with_sizes.default, aten.glu.default)  # fmt: skip
def _along_another_dim(node: Node, axes: Axes) -> Split | str | None:
    """Ops along a dimension that is not the token dimension. All results keep the axis."""
    source, rank = node.args[0], value(node.args[0]).dim()
    position, default = {
        aten.slice.Tensor: (1, 0), aten.split.Tensor: (2, 0), aten.split_with_sizes.default: (2, 0),
        aten.topk.default: (2, -1), aten.glu.default: (1, -1), aten.sort.default: (1, -1),
    }.get(node.target, (1, 0))  # fmt: skip
    dims = node.args[position] if len(node.args) > position else default
    dims = dims if isinstance(dims, (list, tuple)) else [dims]
    axis = axes.get(source)
    if axis is None or any(d % rank == axis.dim for d in dims):
        return None
    outputs = value(node)
    return Split(axis if isinstance(outputs, torch.Tensor) else (axis,) * len(outputs))


@register_token_rule(aten.select.int)
def _select(node: Node, axes: Axes) -> Split | str | None:
    source, dim, _ = node.args
    axis, dim = axes[source], dim % value(source).dim()
    return None if dim == axis.dim else Split(TokenAxis(axis.dim - (dim < axis.dim), axis.unit))


@register_token_rule(aten.cat.default)
def _cat(node: Node, axes: Axes) -> Split | str | None:
    inputs, dim = node.args[0], _dim(node, 1, 0, value(node).dim())
    axis = next(iter(axes.values()))
    if dim == axis.dim or not all(same_axis(axis, other) for other in axes.values()):
        return None
    return Split(axis, slices={(0, i): axis for i, a in enumerate(inputs) if a not in axes})


@register_token_rule(
    aten.sum.dim_IntList, aten.mean.dim, aten.amax.default, aten.amin.default, aten.prod.dim_int, aten.any.dim,
    aten.any.dims, aten.argmax.default, aten.max.dim, aten.min.dim, aten.var.correction, aten.var_mean.correction,
)  # fmt: skip
def _reduction(node: Node, axes: Axes) -> Split | str | None:
    source, rank = node.args[0], value(node.args[0]).dim()
    dims = node.args[1] if len(node.args) > 1 else None
    if dims is None:
        return None
    dims = {d % rank for d in (dims if isinstance(dims, (list, tuple)) else [dims])}
    axis = axes[source]
    if not dims or axis.dim in dims:
        return None
    outputs = value(node) if isinstance(value(node), (list, tuple)) else (value(node),)
    gone = 0 if outputs[0].dim() == rank else sum(d < axis.dim for d in dims)
    axis = TokenAxis(axis.dim - gone, axis.unit)
    return Split(axis if isinstance(value(node), torch.Tensor) else (axis,) * len(outputs))


@register_token_rule(aten.constant_pad_nd.default)
def _pad(node: Node, axes: Axes) -> Split | str | None:
    source, pads = node.args[:2]
    axis, rank = axes[source], value(node).dim()
    own = pads[2 * (rank - 1 - axis.dim) :][:2]
    return Split(axis) if all(isinstance(p, int) and p == 0 for p in own) else None


@register_token_rule(c10d.all_gather_into_tensor.default)
def _all_gather(node: Node, axes: Axes) -> Split | str | None:
    """It gathers along dimension 0, so tokens must be along another one."""
    axis = axes[node.args[0]]
    return Split(axis) if axis.dim != 0 else None
