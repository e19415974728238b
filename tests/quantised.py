"""Quantised linears: samples of their ops for test_rules.py, and layers for graphs.

This machine may not have an op's kernel: ``EMULATED`` computes the same row for row. The ops of other libraries are ``STAND_INS``.
"""

import torch

from tw_compile.passes.graph_utils import prims, value
from tw_compile.passes.rules import token_axis

aten = torch.ops.aten
FP8 = torch.float8_e4m3fn

# (what the op of a library takes and returns, the names of the ops whose rule is this one's)
_SHAPES = {
    "by_rows": ("Tensor x, Tensor w", ("mslk::bf16i4bf16_rowwise", "mslk::bf16i4bf16_shuffled", "fbgemm::bf16i4bf16_rowwise",
                                       "fbgemm::bf16i4bf16_shuffled", "torchao::int_matmul")),
    "to_rows": ("Tensor x", ("triton::quantize_fp8_row", "mslk::quantize_fp8_per_row", "fbgemm::quantize_fp8_per_row")),
    "scale_first": ("Tensor x, Tensor scale, Tensor w", ("torchao::float8_linear_cpu", "ao::blockwise_fp8_gemm",
                                                         "torchao::rowwise_scaled_linear_sparse_cutlass_f8f8",
                                                         "torchao::quantize_affine_float8_non_decomposed",
                                                         "torchao::dequantize_affine_float8_non_decomposed")),
    "scale_third": ("Tensor x, Tensor w, Tensor scale", ("mslk::f8f8bf16_rowwise", "mslk::f8i4bf16_rowwise", "mslk::f8i4bf16_shuffled",
                                                         "torchao::int_scaled_matmul", "fbgemm::f8f8bf16_rowwise",
                                                         "fbgemm::f8i4bf16_rowwise", "fbgemm::f8i4bf16_shuffled")),
    "two_scales": ("Tensor x, Tensor scale, Tensor zero, Tensor w", ("torchao::da8w4_linear_cpu",)),
}  # fmt: skip
_lib = torch.library.Library("tw_quantised", "DEF")
for _name, (_takes, _names) in _SHAPES.items():
    _lib.define(f"{_name}({_takes}) -> {'(Tensor, Tensor)' if _name == 'to_rows' else 'Tensor'}")


def _to_rows(x):
    scale = x.float().abs().amax(-1) + 1
    return (x / scale.unsqueeze(-1)).to(x.dtype), scale


def _implement(name, run):
    _lib.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"tw_quantised::{name}", run, lib=_lib)


_implement("by_rows", lambda x, w: x @ w)
_implement("to_rows", _to_rows)
_implement("scale_first", lambda x, scale, w: (x * scale) @ w)
_implement("scale_third", lambda x, w, scale: (x @ w) * scale)
_implement("two_scales", lambda x, scale, zero, w: (x * scale + zero) @ w)

NAMES = {name for _, names in _SHAPES.values() for name in names}


def rules_of_stand_ins():
    """The name of each stand-in -> the rule of the ops that it stands for, which is one rule."""
    found = {}
    for of, (_, names) in _SHAPES.items():
        (found[f"tw_quantised::{of}"],) = {token_axis._RULES[name] for name in names}
    return found


def _scaled_mm(a, b, scale_a, scale_b, bias=None, scale_result=None, dtype=None, fast=False):
    if scale_a.dtype != torch.float32:  # of 128 rows
        scale_a = scale_a.float().reshape(-1, _BLOCK, 4).mean(-1).reshape(-1, 1)
    if scale_a.numel() > 1 and scale_a.shape[0] != a.shape[0]:
        scale_a = scale_a.repeat_interleave(_BLOCK, 0)
    out = (a.float() * scale_a) @ (b.float() * (scale_b if scale_b.dtype == torch.float32 else 1.0))
    return (out if bias is None else out + bias).to(dtype or a.dtype)


_BLOCK = 128


def _scaled_mm_v2(a, b, scale_a, recipe_a, swizzle_a, scale_b, recipe_b, swizzle_b, bias=None, dtype=None, *others):
    return _scaled_mm(a, b, scale_a[0], scale_b[0].reshape(1, -1), bias, None, dtype)


def _int4(x, w, *others):
    return (x.float().cumsum(-1)[:, :1] * torch.ones(16)).to(x.dtype)


def _grouped(a, b, offs=None, *others):
    return torch.bmm(a.float(), b.float()).to(a.dtype) if a.dim() == b.dim() == 3 else torch.zeros(a.shape[-2], b.shape[-1]).to(a.dtype)


EMULATED = {
    aten._scaled_mm.default: _scaled_mm,
    aten._scaled_mm_v2.default: _scaled_mm_v2,
    aten._int_mm.default: lambda a, b: (a.float() @ b.float()).to(torch.int32),
    aten._weight_int4pack_mm.default: _int4,
    aten._weight_int4pack_mm_for_cpu.default: _int4,
    aten._weight_int4pack_mm_with_scales_and_zeros.default: _int4,
    aten._dyn_quant_matmul_4bit.default: _int4,
    aten._scaled_grouped_mm.default: lambda a, b, sa, sb, *others: (
        torch.bmm(a.float() * sa.unsqueeze(-1), b.float() * sb.unsqueeze(-2)).to(torch.bfloat16)
    ),
}


def cast(u, x, dtype):
    """x in another dtype; small whole numbers, so that 8 bits have them exactly."""
    return u(prims.convert_element_type.default, u(aten.round.default, u(aten.mul.Tensor, x, 2.0)), dtype)


def positive(u, x):
    return u(aten.add.Scalar, u(aten.abs.default, x), 0.5)


def scales(u, x):
    """[rows, 1] of x, in float32."""
    return positive(u, u(aten.amax.default, x, [-1], True))


def fp8(u):
    """Rows, their scales, other rows' scales, one scale, a weight [H, H], its scales [1, H]."""
    one = u(aten.full.default, [1, 1], 0.5)
    of_weight = u(aten.unsqueeze.default, positive(u, u.v), 0)
    weight = u(aten.permute.default, cast(u, u.m, FP8), [1, 0])
    return cast(u, u.rows, FP8), scales(u, u.rows), scales(u, u.same_rows), one, weight, of_weight


def scaled_mm(u):
    rows, own, other, one, w, of_w = fp8(u)
    op, end = aten._scaled_mm.default, (None, torch.bfloat16, True)
    for scale in (own, other):
        yield u(op, rows, w, scale, of_w, None, *end)
    yield u(op, rows, w, one, one, cast(u, u.v, torch.bfloat16), *end)
    if u.tokens == u.shape[-1]:  # the tokens are the columns, too
        yield u(op, cast(u, u.m, FP8), u(aten.permute.default, rows, [1, 0]), other, of_w, None, *end)
        yield u(op, rows, u(aten.permute.default, rows, [1, 0]), own, of_w, None, *end)


def scaled_mm_v2(u):
    rows, own, other, _, w, of_w = fp8(u)
    of_w = u(aten.unsqueeze.default, positive(u, u.v), 1)
    for scale in (own, other):
        yield u(aten._scaled_mm_v2.default, rows, w, [scale], [1], [0], [of_w], [1], [0], None, torch.bfloat16)


def int_mm(u):
    rows, w = cast(u, u.rows, torch.int8), cast(u, u.m, torch.int8)
    yield u(aten._int_mm.default, rows, w)
    if u.tokens == u.shape[-1]:
        yield u(aten._int_mm.default, rows, rows)
        yield u(aten._int_mm.default, w, rows)


def int8pack(u):
    yield u(aten._weight_int8pack_mm.default, cast(u, u.rows, torch.bfloat16), cast(u, u.m, torch.int8), cast(u, u.v, torch.bfloat16))


def int4(op, dtype, *shape):
    def sample(u):
        weight, more = u(aten.full.default, shape, 1, dtype=dtype), u(aten.full.default, [1, 16, 2], 1.0, dtype=torch.bfloat16)
        yield u(op, u.rows, weight, 16, more, *([more] if "zeros" in str(op) else []))

    return sample


def grouped_mm(u):
    x, w = cast(u, u.batched, torch.bfloat16), cast(u, u.m, torch.bfloat16)
    groups = value(x).shape[0]
    same = u(aten.expand.default, u(aten.unsqueeze.default, w, 0), [groups, -1, -1])
    yield u(aten._grouped_mm.default, x, same)
    yield u(aten._grouped_mm.default, u(aten.unsqueeze.default, cast(u, u.rows, torch.bfloat16), 0), u(aten.unsqueeze.default, w, 0))
    ends = u(aten.full.default, [groups], u.tokens // groups, dtype=torch.int32)
    yield u(aten._grouped_mm.default, cast(u, u.rows, torch.bfloat16), same, u(aten.cumsum.default, ends, 0, dtype=torch.int32))


def scaled_grouped_mm(u):
    rows, own, _, _, w, of_w = fp8(u)
    one = lambda x: u(aten.unsqueeze.default, x, 0)  # noqa: E731
    flat = u(aten.squeeze.dims, own, [1])
    yield u(aten._scaled_grouped_mm.default, one(rows), one(w), one(flat), of_w, None, None, None, torch.bfloat16)
    other = u(aten.full.default, [1, u.tokens], 0.5)
    yield u(aten._scaled_grouped_mm.default, one(rows), one(w), other, of_w, None, None, None, torch.bfloat16)


def stand_in(name):
    """A sample of a stand-in, with scales of rows that are cut, and of rows that are not."""
    op = getattr(torch.ops.tw_quantised, name).default

    def sample(u):
        one, other = scales(u, u.rows), scales(u, u.same_rows)
        for scale, zero in ((one, other), (other, one)):
            given = {"x": u.rows, "w": u.m, "scale": scale, "zero": zero}
            yield u(op, *[given[a.name] for a in op._schema.arguments])

    return sample


SAMPLES = {
    aten._scaled_mm.default: scaled_mm,
    aten._scaled_mm_v2.default: scaled_mm_v2,
    aten._int_mm.default: int_mm,
    aten._weight_int8pack_mm.default: int8pack,
    aten._weight_int4pack_mm.default: int4(aten._weight_int4pack_mm.default, torch.int32, 2, 1, 32, 4),
    aten._weight_int4pack_mm_for_cpu.default: int4(aten._weight_int4pack_mm_for_cpu.default, torch.uint8, 16, 8),
    aten._weight_int4pack_mm_with_scales_and_zeros.default: int4(
        aten._weight_int4pack_mm_with_scales_and_zeros.default, torch.int32, 16, 2
    ),
    aten._dyn_quant_matmul_4bit.default: lambda u: [
        u(aten._dyn_quant_matmul_4bit.default, u.rows, u(aten.full.default, [64], 1, dtype=torch.uint8), 16, 16, 16)
    ],
    aten._grouped_mm.default: grouped_mm,
    aten._scaled_grouped_mm.default: scaled_grouped_mm,
    **{getattr(torch.ops.tw_quantised, of).default: stand_in(of) for of in _SHAPES},
}


# --- linears of graphs: (x, weight [out, in]) -> y --------------------------------------------------------------------


def _of_rows(x, most):
    """(rows of x, one scale for each of them)"""
    rows = x.reshape(-1, x.shape[-1])
    return rows, (rows.abs().amax(-1, keepdim=True).float() + 1e-6) / most


def _of_tensor(x, most):
    rows = x.reshape(-1, x.shape[-1])
    return rows, (rows.abs().amax().float() + 1e-6) / most


def _fp8_linear(scale_of):
    def linear(x, weight):
        rows, scale = scale_of(x, 448.0)
        weight, of_weight = scale_of(weight, 448.0)
        quantised = ((t / s).to(FP8) for t, s in ((rows, scale), (weight, of_weight)))
        a, b = quantised
        y = torch._scaled_mm(a, b.t(), scale, of_weight.t() if of_weight.dim() else of_weight, out_dtype=torch.bfloat16)
        return y.to(x.dtype).view(*x.shape[:-1], -1)

    return linear


def _int8_linear(scale_of):
    def linear(x, weight):
        rows, scale = scale_of(x, 127.0)
        weight, of_weight = _of_rows(weight, 127.0)
        a, b = ((t / s).round().clamp(-127, 127).to(torch.int8) for t, s in ((rows, scale), (weight, of_weight)))
        y = (torch._int_mm(a, b.t()).float() * scale).to(x.dtype) * of_weight.t().to(x.dtype)
        return y.view(*x.shape[:-1], -1)

    return linear


def _int8_weight_only(x, weight):
    weight, scale = _of_rows(weight, 127.0)
    # In float32, as without code generation Inductor's own pass for this pattern leaves a graph that does not run.
    return ((x @ (weight / scale).round().to(torch.int8).to(x.dtype).t()).float() * scale.t()).to(x.dtype)


LINEARS = {
    "int8 row": _int8_linear(_of_rows),
    "int8 tensor": _int8_linear(_of_tensor),
    "int8 weight": _int8_weight_only,
    "fp8 tensor": _fp8_linear(_of_tensor),
    "fp8 row": _fp8_linear(_of_rows),
}
if torch.__version__ < "2.12":  # its CPU kernel has no scales for rows
    LINEARS.pop("fp8 row")
