"""Rules and decompositions of vLLM's custom ops. Not every build has all of them."""

from typing import Any

import torch
from torch.fx import Node

from ...compat import OpOverload
from ...passes.emit import Emit
from ...passes.graph_utils import aten, prims, value
from ...passes.plain import register_decomposition
from ...passes.rules.functional import rows, written
from ...passes.rules.token_axis import Rule, register_token_rule

# Ops that compute row by row -> their inputs that have a row for each token. What they write to has, too.
ROWS = {
    "_C.rotary_embedding": ("positions",),
    "_C.silu_and_mul": ("input",),
    "_C.mul_and_silu": ("input",),
    "_C.gelu_and_mul": ("input",),
    "_C.gelu_tanh_and_mul": ("input",),
    "_C.fatrelu_and_mul": ("input",),
    "_C.swigluoai_and_mul": ("input",),
    "_C.gelu_new": ("input",),
    "_C.gelu_fast": ("input",),
    "_C.gelu_quick": ("input",),
    "_C.gelu_tanh": ("input",),
    "_C.relu_squared": ("input",),
    "_C.rms_norm": ("input",),
    "_C.fused_add_rms_norm": (),
    "_C.rms_norm_static_fp8_quant": ("input",),
    "_C.rms_norm_dynamic_per_token_quant": ("input",),
    "_C.silu_and_mul_quant": ("input",),
    "_C.static_scaled_fp8_quant": ("input",),
    "_C.dynamic_per_token_scaled_fp8_quant": ("input",),
    "_C.static_scaled_int8_quant": ("input",),
    "_C.dynamic_scaled_int8_quant": ("input",),
    "_C.cutlass_scaled_mm": ("a", "a_scales"),
    "_C.cutlass_scaled_mm_azp": ("a", "a_scales", "azp"),
    "_C.onednn_mm": ("a",),
    "_C.onednn_scaled_mm": ("a", "a_scales", "azp"),
    "_C.cpu_fused_moe": ("input", "topk_weights", "topk_id"),
    "vllm.all_reduce": ("tensor",),
}

# Ops that run on all tokens of a step -> why. vLLM defines some of them later.
_EXPERTS = "vLLM's experts take the tokens of a whole step: how many each rank has is set for the step"
_LATENT = "the metadata of latent attention (MLA) cannot be cut"
WHOLE = {
    "vllm::moe_forward": _EXPERTS,
    "vllm::moe_forward_shared": _EXPERTS,
    "vllm::unified_mla_kv_cache_update": _LATENT,
    "vllm::unified_mla_attention_with_output": _LATENT,
}


def register() -> None:
    """Register the rules and decompositions of those ops that this build of vLLM has."""
    for name, inputs in ROWS.items():
        if (op := op_of(name)) is not None:
            register_token_rule(op)(rows(*inputs, *written(op)))
    for name, reason in WHOLE.items():
        register_token_rule(name)(whole(reason))
    for name, decomposition in DECOMPOSITIONS.items():
        if (op := op_of(name)) is not None:
            register_decomposition(op, decomposition)


def whole(reason: str) -> Rule:
    """The rule of an op that runs on all tokens."""
    return lambda node, axes: reason


def op_of(name: str) -> OpOverload | None:
    """``namespace.op`` -> the op; None if it is not there, or has no single schema."""
    namespace, op = name.split(".")
    packet = getattr(getattr(torch.ops, namespace), op, None)
    return getattr(packet, "default", None)


def _rms_norm(emit: Emit, given: dict[str, Any]) -> dict[str | int, Node]:
    return {"out" if "out" in given else "result": _norm(emit, given["input"], given)}


def _fused_add_rms_norm(emit: Emit, given: dict[str, Any]) -> dict[str | int, Node]:
    total = emit(aten.add.Tensor, given["input"], given["residual"])
    return {"input": _norm(emit, total, given), "residual": total}


def _ir_rms_norm(emit: Emit, given: dict[str, Any]) -> dict[str | int, Node] | None:
    return {0: _norm(emit, given["x"], given)} if given.get("variance_size") is None else None


def _ir_fused_add_rms_norm(emit: Emit, given: dict[str, Any]) -> dict[str | int, Node] | None:
    if given.get("variance_size") is not None:
        return None
    total = emit(aten.add.Tensor, given["x"], given["x_residual"])
    return {0: _norm(emit, total, given), 1: total}


def _norm(emit: Emit, x: Node, given: dict[str, Any]) -> Node:
    """vLLM's RMSNorm, as its op ``vllm_ir.rms_norm`` has it."""
    dtype, weight = value(x).dtype, given.get("weight")
    fp32 = emit(prims.convert_element_type.default, x, torch.float32)
    mean = emit(aten.mean.dim, emit(aten.pow.Tensor_Scalar, fp32, 2), [-1], True)
    normed = emit(aten.mul.Tensor, fp32, emit(aten.rsqrt.default, emit(aten.add.Tensor, mean, given["epsilon"])))
    if weight is not None:
        normed = emit(aten.mul.Tensor, emit(prims.convert_element_type.default, normed, value(weight).dtype), weight)
    return emit(prims.convert_element_type.default, normed, dtype) if value(normed).dtype != dtype else normed


DECOMPOSITIONS = {
    "_C.rms_norm": _rms_norm,
    "_C.fused_add_rms_norm": _fused_add_rms_norm,
    "vllm_ir.rms_norm": _ir_rms_norm,
    "vllm_ir.fused_add_rms_norm": _ir_fused_add_rms_norm,
}
