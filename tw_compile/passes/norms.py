"""Recognises norms over the last dimension.

An RMSNorm has one of these forms, where r32 is the residual in float32:

    (r32 * rsqrt(mean(r32²) + eps)).to(dtype) * weight            Hugging Face
    (r32 * rsqrt(mean(r32²) + eps) * weight).to(dtype)            torch.nn.RMSNorm
    (r32 * rsqrt(mean(r32²) + eps) * (1 + weight)).to(dtype)      Gemma

A LayerNorm is the same of r32 - mean(r32). It may have a bias, which is added last: the *shift*.

The mean may be a sum that is divided by H, it may lack the last dimension until a later ``unsqueeze``, and r may be multiplied as it is
(T5). A norm that the model computes in its own dtype is computed in float32.
"""

import operator
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch.fx import Node

from ..site import WITHOUT_NORM
from .graph_utils import RESHAPES, aten, calls, is_one, is_tensor, keeps_rows, other_operand, prims, same_shape, same_size, value

NO_NORM = "no RMSNorm or LayerNorm follows"


@dataclass(frozen=True)
class Norm:
    """A norm: ``output = row * rsqrt(mean(row²) + eps) * (weight + offset) + shift``.

    weight: None for ones
    shift:  None for zeros
    center: it is a LayerNorm, where row is r - mean(r); otherwise an RMSNorm, where row is r and there is no shift
    lacking: of a site that ends before its norm, why: what ``match_norm`` says
    """

    output: Node
    weight: Node | None
    shift: Node | None
    eps: float
    offset: float
    center: bool
    lacking: str = ""

    @property
    def kind(self) -> str:
        return "" if self.eps == WITHOUT_NORM else "LayerNorm" if self.center else "RMSNorm"


def without_norm(total: Node, lacking: str) -> Norm:
    """What stands for the norm of a residual where a site ends before its norm. lacking: why"""
    return Norm(total, None, None, WITHOUT_NORM, 0.0, False, lacking)


def is_read_by_rows(total: Node) -> bool:
    """Whether something is computed of each row of ``total`` as a whole: a norm of any kind."""
    rows = [total]
    for row in rows:
        for user in row.users:
            if calls(user, *_REDUCTIONS) and _of_rows(user):
                return True
            if user not in rows and (calls(user, *_OF_ENTRIES) or (calls(user, *RESHAPES) and keeps_rows(user))):
                rows.append(user)
    return False


# Of rows, and of each entry of a row alone.
_REDUCTIONS = (
    aten.sum.dim_IntList, aten.mean.dim, aten.var.correction, aten.var_mean.correction, aten.amax.default,
    aten.linalg_vector_norm.default,
)  # fmt: skip
_OF_ENTRIES = (prims.convert_element_type.default, aten.pow.Tensor_Scalar, aten.mul.Tensor, aten.mul.Scalar, aten.abs.default)


def match_norm(total: Node, dtype: torch.dtype | None = None) -> Norm | str:
    """The norm that reads ``total``, directly or through a reshape; or why there is none that can be fused.

    dtype: that of the norm's result, where ``total`` is in float32 and the model is not; None for that of ``total``
    """
    reason, dtype = NO_NORM, dtype or value(total).dtype
    for start in (total, *(u for u in total.users if calls(u, *RESHAPES) and keeps_rows(u))):
        rows = [start, *_casts(start, torch.float32)]  # a model may cast the value each time that it reads it
        for norm in (*_rms_norms(rows, total, dtype), *_layer_norms(rows, total, dtype)):
            if isinstance(norm, Norm):
                return norm
            reason = norm
    return reason


def _casts(node: Node, dtype: torch.dtype) -> list[Node]:
    return [u for u in node.users if calls(u, prims.convert_element_type.default) and u.args[1] == dtype]


def _rms_norms(rows: list[Node], total: Node, dtype: torch.dtype) -> Iterator[Norm | str]:
    """For each mean of squares: the norm that it is a part of, or why that cannot be fused."""
    for square in _squares(rows):
        yield _normalised(rows, square, "mean of squares", total, dtype, center=False)
    lengths = [r for r in rows for square in r.users for sum_ in square.users if calls(sum_, aten.sum.dim_IntList) for r in sum_.users]
    if any(_one(length, aten.clamp_min.default) for length in lengths):
        yield "the value is divided by its length (F.normalize), not by the root of mean of squares + eps"


def _layer_norms(rows: list[Node], total: Node, dtype: torch.dtype) -> Iterator[Norm | str]:
    """The same for each variance: ``var``, ``var_mean``, or the mean of squares of x - mean(x)."""
    both = [u for r in rows for u in r.users if calls(u, aten.var_mean.correction)]
    means = [u for r in rows for u in _means([r]) if _of_rows(u)] + _items(filter(_of_rows, both), 1)
    centered = [u for r in rows for u in r.users if calls(u, aten.sub.Tensor) and u.args[1] in means and not u.kwargs]
    variances = [u for r in rows for u in r.users if calls(u, aten.var.correction)]
    for variance in (*_items(both, 0), *variances, *_squares(centered)):
        yield _normalised(centered, variance, "variance", total, dtype, center=True)


def _items(pairs: Iterable[Node], index: int) -> list[Node]:
    return [u for pair in pairs for u in pair.users if calls(u, operator.getitem) and u.args[1] == index]


def _squares(nodes: list[Node]) -> list[Node]:
    """The means of the squares of ``nodes``."""
    squares = [
        u for node in nodes for u in node.users
        if (calls(u, aten.pow.Tensor_Scalar) and u.args[1] == 2) or (calls(u, aten.mul.Tensor) and u.args == (node, node))
    ]  # fmt: skip
    return _means(squares)


def _means(nodes: list[Node]) -> list[Node]:
    """The means of ``nodes``, and the sums that are divided by the length of the rows."""
    readers = [u for node in nodes for u in node.users]
    sums = [(u, value(u.args[0]).shape[-1]) for u in readers if calls(u, aten.sum.dim_IntList)]
    quotients = [q for u, length in sums for q in u.users if calls(q, aten.div.Tensor, aten.mul.Tensor) and _divides(q, u, length)]
    return [u for u in readers if calls(u, aten.mean.dim)] + quotients


def _divides(quotient: Node, total: Node, length: object) -> bool:
    """Whether a call divides ``total`` by ``length``, which is a number."""
    by = quotient.args[1]
    if quotient.args[0] is not total or not is_number(by) or not isinstance(length, int):
        return False
    return by == length if calls(quotient, aten.div.Tensor) else by == 1 / length


def _dims(reduction: Node) -> list[int]:
    return list(reduction.args[1] if len(reduction.args) > 1 and reduction.args[1] else range(value(reduction.args[0]).dim()))


def _of_rows(reduction: Node) -> bool:
    """Whether it is over the last dimension."""
    reduction = _reduction(reduction)
    rank = value(reduction.args[0]).dim()
    return [d % rank for d in _dims(reduction)] == [rank - 1]


def _reduction(result: Node) -> Node:
    """The reduction of which ``result`` is one of several results, or the mean."""
    return result.args[0] if calls(result, operator.getitem, aten.div.Tensor, aten.mul.Tensor) else result


def _as_column(node: Node) -> list[Node]:
    """``node``, and itself with a last dimension of one entry."""
    column = (*value(node).shape, 1)
    return [node, *(u for u in node.users if calls(u, aten.unsqueeze.default, *RESHAPES) and same_shape(value(u).shape, column))]


def _normalised(rows: list[Node], spread: Node, what: str, total: Node, dtype: torch.dtype, center: bool) -> Norm | str:
    """The norm that divides one of ``rows`` by sqrt(spread + eps), or why it cannot be fused. what: its name in messages"""
    reduction = _reduction(spread)
    if not _of_rows(reduction):
        return f"the {what} is over dimensions {_dims(reduction)}, not the last one"
    if calls(reduction, aten.var.correction, aten.var_mean.correction) and reduction.kwargs.get("correction") != 0:
        return "the variance is divided by H - 1, not by H (unbiased=False)"
    shifted = next((u for column in _as_column(spread) if (u := _one(column, aten.add.Tensor, aten.add.Scalar))), None)
    if not shifted or not is_number(shifted.args[1]) or shifted.args[1] < 0 or shifted.kwargs:
        return f"the {what} is not followed by + eps"
    for scaled in _divided(rows, shifted):
        return _weighted(scaled, None, float(shifted.args[1]), total, dtype, center)
    for row in rows:
        for product in row.users:  # a weight that comes before
            weight = other_operand(product, row) if calls(product, aten.mul.Tensor) else None
            if _is_vector(weight, total):
                for scaled in _divided([product], shifted):
                    return _weighted(scaled, weight, float(shifted.args[1]), total, dtype, center)
    return f"no x * rsqrt({what} + eps) follows"


def _one(node: Node, *targets: object) -> Node | None:
    return next((u for u in node.users if calls(u, *targets)), None)


def _divided(rows: list[Node], square: Node) -> Iterator[Node]:
    """Each of ``rows``, divided by the square root of ``square``."""
    roots = [root for column in _as_column(square) for root in column.users]
    divisors = [root for root in roots if calls(root, aten.sqrt.default) or _is_power(root, 0.5)]
    factors = [root for root in roots if calls(root, aten.rsqrt.default) or _is_power(root, -0.5)]
    inverses = [u for root in divisors for column in _as_column(root) for u in column.users if calls(u, aten.reciprocal.default)]
    factors += [*inverses, *(u for inverse in inverses for u in inverse.users if calls(u, aten.mul.Tensor) and u.args[1] == 1)]
    for root in (*factors, *divisors):
        for column in _as_column(root):
            for user in column.users:
                row = other_operand(user, column) if root in factors else user.args[0]
                divides = calls(user, aten.mul.Tensor) if root in factors else calls(user, aten.div.Tensor) and user.args[1] is column
                if divides and row in rows and value(column).dim() == value(row).dim() and is_one(value(column).shape[-1]):
                    yield user


def _is_power(node: Node, exponent: float) -> bool:
    return calls(node, aten.pow.Tensor_Scalar) and node.args[1] == exponent


def _weighted(scaled: Node, weight: Node | None, eps: float, total: Node, dtype: torch.dtype, center: bool) -> Norm | str:
    """The norm, with what follows ``scaled``: a weight, a shift if ``center``, and a cast back at any place. All are optional.

    weight: one that ``scaled`` has already, or None
    """
    output, offset, shift = scaled, 0.0, None
    if weight is not None:
        weight, offset = _weight(weight, dtype)
    for _ in range(3):
        if len(output.users) != 1:
            break
        user = next(iter(output.users))
        other = other_operand(user, output) if calls(user, aten.mul.Tensor, aten.add.Tensor) else None
        if calls(user, prims.convert_element_type.default) and user.args[1] == dtype and value(output).dtype != dtype:
            output = user
        elif calls(user, aten.mul.Tensor) and weight is None and shift is None and _is_vector(other, total):
            output, (weight, offset) = user, _weight(other, dtype)
        elif calls(user, aten.add.Tensor) and center and shift is None and _is_vector(other, total) and not user.kwargs:
            output, shift = user, _before_cast(other, dtype)
        else:
            break
    if value(output).dtype != dtype and value(total).dtype != dtype:
        return f"the norm of a {value(total).dtype} residual is read in that dtype, not only in {dtype}, that of the reduced value"
    if value(output).dtype != dtype:
        of_weight = f" (its weight is {value(weight).dtype})" if weight is not None else ""
        return f"the norm of a {dtype} value is {value(output).dtype}{of_weight}"
    for name, vector in (("weight", weight), ("bias", shift)):
        if vector is not None and value(vector).dtype not in (dtype, torch.float32):
            return f"the norm's {name} is {value(vector).dtype}, its input {dtype}"
    return Norm(output, weight, shift, eps, offset, center)


def _is_vector(operand: object, total: Node) -> bool:
    """Whether it is [H] and does not depend on ``total``, a result of the op that takes the vector."""
    return is_tensor(operand) and value(operand).dim() == 1 and has_row_length(operand, total) and not _depends(operand, total)


def _depends(node: Node, total: Node) -> bool:
    seen: set[Node] = set()
    left = [node]
    while left:
        node = left.pop()
        if node is total:
            return True
        left += [a for a in node.all_input_nodes if a not in seen]
        seen.update(node.all_input_nodes)
    return False


def _weight(vector: Node, dtype: torch.dtype) -> tuple[Node, float]:
    """(weight, offset) of a factor weight + offset."""
    offset = 0.0
    if calls(vector, aten.add.Tensor, aten.add.Scalar) and vector.args[1] in (1, 1.0) and not vector.kwargs:
        vector, offset = vector.args[0], 1.0
    return _before_cast(vector, dtype), offset


def _before_cast(vector: Node, dtype: torch.dtype) -> Node:
    """The parameter that is cast to float32 to make ``vector``, as the kernel casts it itself; otherwise ``vector``."""
    is_cast = calls(vector, prims.convert_element_type.default) and vector.args[1] == torch.float32
    return vector.args[0] if is_cast and value(vector.args[0]).dtype == dtype else vector


def is_number(argument: object) -> bool:
    return isinstance(argument, (int, float)) and not isinstance(argument, bool)


def has_row_length(vector: Node, total: Node) -> bool:
    return same_size(value(vector).shape[0], value(total).shape[-1])
