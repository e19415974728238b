"""Token-axis rules of quantised linears: 8-bit and 4-bit GEMMs, grouped GEMMs, and the ops that quantise their inputs.

The rows of the activations are tokens. A scale of the activations is cut with its rows, unless it is one number for all of them. A
scale of the weight, a bias and a zero point are whole. A scale for blocks of tokens is only cut between two blocks.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch.fx import Node

from ...compat import OpOverload
from ..graph_utils import aten, calls, is_one, is_view, prims, same_size, source_of, value
from .token_axis import _RULES, Axes, Split, TokenAxis, expr, expr_of, is_pointwise, places, register_token_rule, same_axis

# Rows that one scale, or one tile of swizzled scales, is for.
_BLOCK = 128
# The dtypes of scales for 16 or 32 channels of a row. They are swizzled: _BLOCK rows × 4 scales lie together.
_SWIZZLED = (torch.float8_e8m0fnu, torch.float8_e4m3fn)


@dataclass(frozen=True)
class _Linear:
    """The rule of an op whose first argument are activations [..., K]. The result, or each of them, has the same rows.

    scales: the places of the scales of the rows
    """

    scales: tuple = ()

    def __call__(self, node: Node, axes: Mapping[Node, TokenAxis]) -> Split | None:
        rows, others = node.args[0], dict(places(node))
        axis, slices = axes.get(rows), {}
        if axis is None or axis.dim == value(rows).dim() - 1 or [*others.values()].count(rows) > 1:
            return None
        for place in self.scales:
            scale = others.get(place)
            if scale is None or all(map(is_one, value(scale).shape)):
                continue
            own = _axis_of_scale(scale, rows, axis)
            if own is None or (scale in axes and not same_axis(axes[scale], own)) or not (scale in axes or value(scale).is_contiguous()):
                return None
            if scale not in axes:
                slices[place] = own
        if any(a in axes for place, a in others.items() if place != 0 and place not in self.scales):
            return None
        results = value(node)
        return Split(axis if isinstance(results, torch.Tensor) else (axis,) * len(results), slices=slices)


def _axis_of_scale(scale: Node, rows: Node, axis: TokenAxis) -> TokenAxis | None:
    """The token axis of a scale that is not one number; None if it is unknown. axis: that of the rows"""
    theirs, ours = value(rows).shape, value(scale).shape
    if value(scale).dtype in _SWIZZLED:
        tokens, blocks = expr(theirs[0]), _BLOCK * -(-expr(theirs[0]) // _BLOCK)
        return TokenAxis(0, expr_of(axis.unit) * expr(ours[0]) / blocks) if tokens == blocks else None
    if axis.dim < len(ours) and same_size(ours[axis.dim], theirs[axis.dim]):
        return axis
    is_blocks = axis.dim < len(ours) and expr(ours[axis.dim]) * _BLOCK == expr(theirs[axis.dim])
    return TokenAxis(axis.dim, expr_of(axis.unit) / _BLOCK) if is_blocks else None


register_token_rule(
    aten._int_mm.default, aten._weight_int8pack_mm.default, aten._weight_int4pack_mm.default, aten._weight_int4pack_mm_for_cpu.default,
    aten._weight_int4pack_mm_with_scales_and_zeros.default, aten._dyn_quant_matmul_4bit.default,
)(_Linear())  # fmt: skip
register_token_rule(aten._scaled_mm.default)(_Linear((2,)))
register_token_rule(aten._scaled_mm_v2.default)(_Linear(((2, 0), (2, 1))))

# Ops of other libraries: the rules are for whichever of them is loaded.
register_token_rule(
    "mslk::bf16i4bf16_rowwise", "mslk::bf16i4bf16_shuffled", "fbgemm::bf16i4bf16_rowwise", "fbgemm::bf16i4bf16_shuffled",
    "torchao::int_matmul", "triton::quantize_fp8_row", "mslk::quantize_fp8_per_row", "fbgemm::quantize_fp8_per_row",
)(_Linear())  # fmt: skip
register_token_rule(
    "torchao::float8_linear_cpu", "torchao::rowwise_scaled_linear_sparse_cutlass_f8f8", "ao::blockwise_fp8_gemm",
    "torchao::quantize_affine_float8_non_decomposed", "torchao::dequantize_affine_float8_non_decomposed",
)(_Linear((1,)))  # fmt: skip
register_token_rule(
    "mslk::f8f8bf16_rowwise", "mslk::f8i4bf16_rowwise", "mslk::f8i4bf16_shuffled", "torchao::int_scaled_matmul",
    "fbgemm::f8f8bf16_rowwise", "fbgemm::f8i4bf16_rowwise", "fbgemm::f8i4bf16_shuffled",
)(_Linear((2,)))  # fmt: skip
register_token_rule("torchao::da8w4_linear_cpu")(_Linear((1, 2)))


def scales_of(node: Node) -> tuple | None:
    """The places of the scales of the rows in a call of an op above, which reads its inputs from memory; None for another call."""
    name = node.target.name() if isinstance(node.target, OpOverload) else None
    rule = _RULES.get(node.target) or _RULES.get(name)
    return rule.scales if isinstance(rule, _Linear) else None


def is_gemm(node: Node) -> bool:
    """Whether a call is of an op above."""
    return scales_of(node) is not None


@register_token_rule(aten._grouped_mm.default, aten._scaled_grouped_mm.default)
def _grouped(node: Node, axes: Axes) -> Split | str | None:
    """Groups of rows [M, K] × [G, K, N] are of all tokens: they cannot be cut. Otherwise the tokens are rows of each group.

    [G, M, K] × [G, K, N] -> [G, M, N];  [G, M, K] × [K, groups of N] -> [M, N];  [M, groups of K] × [groups of K, N] -> [G, M, N]
    """
    rows, weight = node.args[:2]
    axis = axes.get(rows)
    scaled = calls(node, aten._scaled_grouped_mm.default)
    scale = node.args[2] if scaled else None
    if axis is None or any(a in axes for a in node.all_input_nodes if a not in (rows, scale)) or weight is rows:
        return None
    batched, of_weight = value(rows).dim() == 3, value(weight).dim() == 3
    if batched and axis.dim == 0:
        if not of_weight:
            return None
        slices = {i: axis for i in ((1, 2, 3) if scaled else (1,)) if node.args[i] not in axes}
        return Split(axis, slices=slices) if not scaled or axes.get(scale, axis) == axis else None
    if axis.dim != value(rows).dim() - 2 or (not batched and (of_weight or scaled)):
        return None
    if scaled and (value(scale).dim() != 2 or axes.get(scale, axis) != axis):
        return None
    slices = {2: axis} if scaled and scale not in axes else {}
    return Split(axis if of_weight else TokenAxis(0 if batched else 1, axis.unit), slices=slices)


# --- one scale for all tokens ----------------------------------------------------------------------------------------

_REDUCTIONS = (aten.amax.default, aten.amin.default, aten.max.default, aten.min.default)
_EIGHT_BITS = (torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, torch.uint8)


def one_scale(unsplit: Iterable[Node]) -> str | None:
    """Why a graph is not woven whose quantisation has one scale for all tokens, which each half would wait for; None if none has.

    unsplit: the calls that need both halves
    """
    for node in unsplit:
        if calls(node, *_REDUCTIONS) and _quantises(node):
            return (
                f"a quantisation has one scale for all tokens ({source_of(node) or node}), so that no half could go on before the other "
                "one: a scale for each token can be cut"
            )
    return None


def _quantises(reduced: Node) -> bool:
    """Whether pointwise calls alone lead from a value to one of 8 bits."""
    seen, left = {reduced}, [reduced]
    while left:
        for user in left.pop().users:
            if user in seen or user.op != "call_function":
                continue
            result = value(user)
            if isinstance(result, torch.Tensor) and result.dtype in _EIGHT_BITS:
                return True
            cast = calls(user, prims.convert_element_type.default)
            if cast or is_pointwise(user.target) or is_view(user.target):
                seen.add(user)
                left.append(user)
    return False
