"""Fused graph -> the same graph, in which a site ends in the quantisation of its norm.

A quantisation of a norm y has this form, with a scale for each row, for each GROUP channels of a row, or a given one::

    scale = f(amax(abs(y)))                        f: max and +, each with a number, then / number, then max, in this order
    q = clamp(round(y / scale)).to(8 bits)         or y * (1 / scale); of a given scale also y * scale

In f any step may be missing but the division, and all may be in the dtype of the norm, or all in float32. ``max(-min(amin(y), 0),
max(amax(y), 0))`` stands for ``amax(abs(y))``. A model may quantise a norm once for each linear that reads it: equal ones become one.

The site returns q, the scale, and the norm if it has other readers. A scale for all tokens that depends on them stays with the graph:
no rank has all rows when it could quantise the first one.
"""

import operator
from collections.abc import Collection, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch.fx import Graph, Node

from .. import ops
from ..compat import detect_fake_mode
from ..quantise import DIVIDE, DTYPES, GROUP, INVERSE, MULTIPLY, Quantise, read
from ..site import empty_results
from .emit import Emitter, size_of
from .find import communicates, stays
from .graph_utils import (
    RESHAPES,
    arguments,
    aten,
    calls,
    in_order,
    is_one,
    is_tensor,
    keeps_order,
    other_operand,
    prims,
    same_shape,
    same_size,
    sort_and_clean,
    value,
)
from .norms import is_number

# The results of a site.
NORM, RESIDUAL, QUANTISED, SCALE = range(4)

_NAMES = {dtype: name for name, (dtype, _) in DTYPES.items()}
_LIMITS = {"fp8": (-448.0, 448.0), "int8": (-128.0, 127.0)}
_CAST = prims.convert_element_type.default


class _Found(NamedTuple):
    """A quantisation in the graph.

    q:     the norm in 8 bits
    scale: the scale, in float32
    how:   with ``keeps_norm`` unset
    """

    q: Node
    scale: Node
    how: Quantise


def quantise(graph: Graph, sites: list[Node], plain: Collection[int] = ()) -> None:
    """Let sites, ``fused`` calls, end in a quantisation of their norms, in place.

    plain: numbers of the sites that do not, as those of another rank do not
    """
    for site in sites:
        is_narrow = value(site.args[0]).dtype in (torch.bfloat16, torch.float16)
        found = list(_quantisations(norm)) if is_narrow and arguments(site)["site"] not in plain and (norm := _norm(site)) else []
        if found:
            most = max(found, key=lambda one: sum(_is_same(one, other) for other in found))
            _replace(graph, site, [each for each in found if _is_same(each, most)])
    changed = [site for site in sites if arguments(site)["quantise"]]
    if changed:
        sort_and_clean(graph, stays)
    for site in changed:
        given = arguments(site)
        _set(site, read(given["quantise"])._replace(keeps_norm=_norm(site) is not None), given["static_scale"])


def _norm(site: Node) -> Node | None:
    return next((user for user in site.users if user.args[1] == NORM), None)


def _is_same(one: _Found, other: _Found) -> bool:
    return one.how == other.how and (one.how.per_token or one.scale is other.scale)


# --- recognising -----------------------------------------------------------------------------------------------------


def _quantisations(norm: Node) -> Iterator[_Found]:
    """The quantisations of a norm, in the order of the graph."""
    views = [norm]  # the norm, in other shapes and in float32
    for view in views:
        views += [u for u in view.users if u not in views and (_is_cast(u, torch.float32) or (calls(u, *RESHAPES) and _keeps(u, norm)))]
    rows = [view for view in views if not _in_groups(view, norm)]
    groups = [view for view in views if view not in rows]
    for view in views:
        for quotient in view.users:
            if calls(quotient, aten.div.Tensor, aten.mul.Tensor) and value(quotient).dtype == torch.float32 and not quotient.kwargs:
                found = _quantisation(quotient, view, rows, groups)
                if found is not None:
                    yield found


def _keeps(view: Node, norm: Node) -> bool:
    """Whether the last dimension of a view is a row of the norm, or a group of one."""
    return same_size(value(view).shape[-1], value(norm).shape[-1]) or _in_groups(view, norm)


def _in_groups(view: Node, norm: Node) -> bool:
    """Whether the last dimension of a view is a group of a row."""
    hidden = value(norm).shape[-1]
    return isinstance(hidden, int) and hidden % GROUP == 0 and hidden > GROUP and value(view).shape[-1] == GROUP


def _quantisation(quotient: Node, view: Node, rows: list[Node], groups: list[Node]) -> _Found | None:
    """rows, groups: the views of the norm whose last dimension is a row, or a group"""
    by, divides = other_operand(quotient, view), calls(quotient, aten.div.Tensor)
    end = _rounded(quotient)
    if not is_tensor(by) or by in (*rows, *groups) or end is None or (divides and quotient.args[0] is not view):
        return None
    q, rounds, *limits = end
    name = _NAMES[value(q).dtype]
    low, high = (own if given is None else sorted((own, given, 0.0))[1] for own, given in zip(_LIMITS[name], limits))
    if rounds is not (name == "int8"):
        return None
    if rounds and not (float(low).is_integer() and float(high).is_integer()):
        return None  # what is rounded first and limited then is no whole number
    if all(map(is_one, value(by).shape)) and value(by).dtype == torch.float32 and _is_given(by):
        if None in limits:
            return None  # values that are too large would become NaN, and not the largest one
        return _Found(q, by, Quantise(name, False, DIVIDE if divides else MULTIPLY, low=low, high=high))
    of, by = (groups, by) if view in groups else (rows, by)
    if view in rows and (expanded := _expanded(by, view)) is not None:
        of, by = groups, expanded
    elif not same_shape(value(by).shape, (*value(view).shape[:-1], 1)):
        return None
    inverted = by if divides else _inverted(by)
    scale = _scale(_without_views(inverted), of, value(rows[0]).dtype) if inverted is not None else None
    if scale is None:
        return None
    how = DIVIDE if divides else INVERSE
    return _Found(q, scale[0], Quantise(name, True, how, *scale[1:6], low, high, scale[6], GROUP if of is groups else 0))


def _expanded(by: Node, row: Node) -> Node | None:
    """The scales of groups that ``by`` has for each channel of ``row``, as repeat_interleave gives them; None if it is something else."""
    if not (calls(by, *RESHAPES) and same_shape(value(by).shape, value(row).shape)):
        return None
    node = by.args[0]
    node = node.args[0] if calls(node, aten.clone.default) else node
    if not calls(node, aten.expand.default) or value(node).shape[-1] != GROUP or not is_one(value(node.args[0]).shape[-1]):
        return None
    return node.args[0] if same_shape(value(node).shape[:-1], value(node.args[0]).shape[:-1]) else None


def _rounded(node: Node) -> tuple[Node, bool, float | None, float | None] | None:
    """(what a value becomes in 8 bits, whether it is rounded before, the limits of its clamp); None if it does not become that."""
    rounds, low, high = False, None, None
    while len(node.users) == 1:
        user = next(iter(node.users))
        if calls(user, aten.round.default) and low is high is None:
            rounds = True
        elif calls(user, aten.clamp.default, aten.clamp_min.default, aten.clamp_max.default):
            least, most = _limits(user)
            low, high = (low if least is None else least), (high if most is None else most)
        elif calls(user, _CAST) and user.args[1] in _NAMES:
            return user, rounds, low, high
        elif not calls(user, *RESHAPES):
            return None
        node = user
    return None


def _limits(clamp: Node) -> tuple[Any, Any]:
    given = [*clamp.args[1:], None, None][:2]
    if calls(clamp, aten.clamp_max.default):
        given = [None, given[0]]
    low, high = (clamp.kwargs.get(name, by_place) for name, by_place in zip(("min", "max"), given))
    return (float(low) if is_number(low) else low), (float(high) if is_number(high) else high)


def _is_given(scale: Node) -> bool:
    """Whether a scale is computed of inputs of the graph alone, without another rank."""
    seen, left = {scale}, [scale]
    while left:
        node = left.pop()
        if communicates(node) or calls(node, ops.fused):
            return False
        left += [a for a in node.all_input_nodes if a not in seen]
        seen.update(node.all_input_nodes)
    return True


def _inverted(node: Node) -> Node | None:
    """x, if ``node`` is 1 / x."""
    node = _without_views(node)
    if calls(node, aten.mul.Tensor) and node.args[1] in (1, 1.0):
        node = node.args[0]
    return node.args[0] if calls(node, aten.reciprocal.default) else None


def _scale(scale: Node, rows: list[Node], dtype: torch.dtype) -> tuple[Node, bool, float, float, float, float, float] | None:
    """(the scale of each row or group in float32, narrow, added, least, most, floor, zero), as a ``Quantise`` has them; or None.

    rows:  the views of the norm whose last dimension is what has a scale
    dtype: of the norm
    """
    if value(scale).dtype != torch.float32:
        return None
    rounded: list[tuple[set[torch.dtype], float | None]] = []  # the dtypes to which each step is rounded, and the limit of a clamp
    floor, node = _number(scale, rounded, aten.clamp_min.default, aten.clamp.default)
    quotient, dtypes = _without_casts(node)
    if not calls(quotient, aten.div.Tensor) or not is_number(quotient.args[1]) or quotient.kwargs:
        return None
    least, node = _number(quotient.args[0], rounded, aten.clamp_min.default, aten.clamp.default)
    added, node = _number(node, rounded, aten.add.Tensor)
    zero, node = _of_zeros(node)
    largest, of_largest = _without_casts(node)
    if not dtypes | of_largest <= {dtype} or not _is_largest(largest, rows):
        return None
    if not all(_rounds_alike(step, limit, dtypes) for step, limit in rounded):
        return None
    return scale, bool(dtypes), added, least, float(quotient.args[1]), floor, zero


def _rounds_alike(step: set[torch.dtype], limit: float | None, dtypes: set[torch.dtype]) -> bool:
    """Whether a step that is rounded to ``step`` has the bits that it has where it is rounded to ``dtypes``, as its input is.

    Inductor of PyTorch 2.11 and 2.12 drops the rounding of a clamp. Nothing is to be rounded if the limit is a number of these dtypes.
    """
    return step == dtypes or (not step and limit is not None and all(torch.tensor(limit, dtype=dtype).item() == limit for dtype in dtypes))


def _number(node: Node, rounded: list[tuple[set[torch.dtype], float | None]], *targets: Any) -> tuple[float, Node]:
    """(c, x) if ``node`` is one of ``targets`` of x and a number c > 0, which adds to ``rounded``; (0.0, node) if it is not."""
    step, dtypes = _without_casts(node)
    if not calls(step, *targets) or (calls(step, aten.add.Tensor) and step.kwargs):
        return 0.0, node
    low, high = (step.args[1], None) if calls(step, aten.add.Tensor) else _limits(step)
    if not is_number(low) or low <= 0 or high is not None:
        return 0.0, node
    rounded.append((dtypes, None if calls(step, aten.add.Tensor) else float(low)))
    return float(low), step.args[0]


def _of_zeros(node: Node) -> tuple[float, Node]:
    """(c, x) if ``node`` is x where x > 0, and elsewhere a number c > 0; (0.0, node) if it is not."""
    where, dtypes = _without_casts(node)
    if not calls(where, aten.where.self) or dtypes or not calls(where.args[0], aten.gt.Scalar):
        return 0.0, node
    (x, bound), given, otherwise = where.args[0].args, where.args[1], where.args[2]
    number: Any = otherwise.args[1] if calls(otherwise, aten.full.default) else None
    return (float(number), x) if x is given and bound == 0 and is_number(number) and number > 0 else (0.0, node)


def _without_views(node: Node) -> Node:
    """A value with one entry for each row, before the views that keep the entries and their order."""
    while keeps_order(node):
        node = node.args[0]
    return node


def _without_casts(node: Node) -> tuple[Node, set[torch.dtype]]:
    """(a value before its views and casts, the dtypes other than float32 that it has there and behind them)."""
    dtypes = {value(node).dtype}
    while keeps_order(node) or calls(node, _CAST):
        node = node.args[0]
        dtypes.add(value(node).dtype)
    return node, dtypes - {torch.float32}


def _is_cast(node: Node, dtype: torch.dtype) -> bool:
    return calls(node, _CAST) and node.args[1] == dtype


def _is_largest(node: Node, rows: list[Node]) -> bool:
    """Whether it is the largest magnitude of each row or group."""
    if calls(node, aten.maximum.default):
        below, above = node.args
        below = below.args[0] if calls(below, aten.neg.default) else None
        low = _bounded(below, aten.minimum.default, aten.clamp_max.default)
        high = _bounded(above, aten.maximum.default, aten.clamp_min.default)
        return all(calls(a, op) and a.args[0] in rows and _of_rows(a) for a, op in ((low, aten.amin.default), (high, aten.amax.default)))
    if not calls(node, aten.amax.default) or not _of_rows(node):
        return False
    magnitude = node.args[0].args[0] if _is_cast(node.args[0], torch.float32) else node.args[0]
    return calls(magnitude, aten.abs.default) and magnitude.args[0] in rows


def _bounded(node: Node | None, *targets: Any) -> Node | None:
    """x, if ``node`` is one of ``targets`` of x and 0."""
    if not calls(node, *targets):
        return None
    assert node is not None
    zero = node.args[1]
    return node.args[0] if zero in (0, 0.0) or (calls(zero, aten.full.default) and zero.args[1] in (0, 0.0)) else None


def _of_rows(reduction: Node) -> bool:
    dims, rank = reduction.args[1], value(reduction.args[0]).dim()
    return [dim % rank for dim in dims] == [rank - 1]


# --- rewriting -------------------------------------------------------------------------------------------------------


def _replace(graph: Graph, site: Node, found: list[_Found]) -> None:
    """Let a site return what ``found``, equal quantisations of its norm, compute."""
    how = found[0].how
    replaced = {QUANTISED: [each.q for each in found]} | ({SCALE: [each.scale for each in found]} if how.per_token else {})
    with graph.inserting_before(site.next):
        emit = Emitter(graph, detect_fake_mode([value(site.args[0])]))
        try:
            shapes = {old: _shape(emit, value(old).shape) for olds in replaced.values() for old in olds}
        except KeyError:
            return  # several sizes depend on data
        _set(site, how._replace(keeps_norm=True), None if how.per_token else found[0].scale)
        for index, olds in replaced.items():
            emit.like = olds[0]
            result = emit(operator.getitem, site, index)
            for old in olds:
                is_alike = same_shape(value(result).shape, value(old).shape)
                old.replace_all_uses_with(result if is_alike else emit(aten.reshape.default, result, shapes[old]))


def _shape(emit: Emitter, shape: Sequence[Any]) -> list[Any]:
    """A shape as an argument of a reshape."""
    unknown = [size for size in shape if not isinstance(size, int)]
    return [size if isinstance(size, int) else -1 if len(unknown) == 1 else emit.size(size) for size in shape]


def _set(site: Node, how: Quantise, static_scale: Node | None) -> None:
    site.args = in_order(site.target, arguments(site) | {"quantise": str(how), "static_scale": static_scale})
    site.meta["val"] = empty_results(value(site.args[0]), False, str(how))


def in_graph(graph: Graph, start: Node, done: Node) -> None:
    """Let the graph quantise the norm of a site, in place of the site. done: the ``wait`` of ``start``, or ``fused`` itself"""
    how, scale, x = read(arguments(done)["quantise"]), arguments(done)["static_scale"], value(start.args[0])
    for node in {start, done}:
        node.args = in_order(node.target, arguments(node) | {"quantise": "", "static_scale": None})
    done.meta["val"] = empty_results(x, arguments(done)["fp32_residual"])
    with graph.inserting_before(done.next):
        emit = Emitter(graph, detect_fake_mode([x]))
        emit.like, emit.half = done, done.meta.get("half")
        norm = emit(operator.getitem, done, NORM)
        results = {NORM: norm, **dict(zip((QUANTISED, SCALE), emit_quantised(emit, norm, how, scale)))}
    for old in [user for user in done.users if user is not norm and user.args[1] in results]:
        old.replace_all_uses_with(results[old.args[1]])
        graph.erase_node(old)


def emit_quantised(emit: Emitter, norm: Node, how: Quantise, scale: Node | None) -> tuple[Node, Node]:
    """``quantise.quantised`` as calls of a graph."""
    if how.group:
        *tokens, hidden = value(norm).shape
        sizes = [size_of(emit, norm, dim) for dim in range(len(tokens))]
        groups = emit(aten.reshape.default, norm, [*sizes, hidden // how.group, how.group])
        q, scale = emit_quantised(emit, groups, how._replace(group=0), None)
        return emit(aten.reshape.default, q, [*sizes, hidden]), emit(aten.squeeze.dim, scale, -1)

    def cast(node: Node, to: torch.dtype) -> Node:
        return node if value(node).dtype == to else emit(_CAST, node, to)

    if scale is None:
        largest = emit(aten.amax.default, emit(aten.abs.default, norm), [-1], True)
        largest = largest if how.narrow else cast(largest, torch.float32)
        if how.zero:
            largest = emit(aten.where.ScalarOther, emit(aten.gt.Scalar, largest, 0), largest, how.zero)
        for op, number in ((aten.add.Tensor, how.added), (aten.clamp_min.default, how.least)):
            largest = emit(op, largest, number) if number else largest
        scale = emit(aten.div.Tensor, largest, how.most)
        scale = cast(emit(aten.clamp_min.default, scale, how.floor) if how.floor else scale, torch.float32)
    y = cast(norm, torch.float32)
    if how.how == MULTIPLY:
        y = emit(aten.mul.Tensor, y, scale)
    else:
        divisor = emit(aten.where.ScalarSelf, emit(aten.eq.Scalar, scale, 0), 1.0, scale)
        divides = how.how == DIVIDE
        y = emit(aten.div.Tensor, y, divisor) if divides else emit(aten.mul.Tensor, y, emit(aten.reciprocal.default, divisor))
    y = emit(aten.round.default, y) if how.dtype == "int8" else y
    y = emit(aten.clamp_max.default, emit(aten.clamp_min.default, y, how.low), how.high)
    return cast(y, DTYPES[how.dtype][0]), scale


def outputs(graph: Graph) -> dict[int, str]:
    """Number of a site that ends in a quantisation -> its name in reports."""
    sites = [arguments(node) for node in graph.nodes if calls(node, ops.start, ops.fused)]
    return {given["site"]: read(given["quantise"]).name for given in sites if given["quantise"]}
