"""The quantised models that are measured, by the name of --quant.

fp8-row     FP8 weights and inputs, a scale for each row: of a token, of an output channel
fp8-tensor  the same with one scale for a whole weight, and one for the inputs of all tokens: such a graph is fused, not woven
int8        int8 weights and inputs, a scale for each row; the product, in int32, is scaled by Inductor's kernel
"""

import torch
from variants import llama


def tensor_rows(x):
    scale = x.abs().amax().float().clamp_min(1e-12) / torch.finfo(llama.FP8).max
    return (x.float() / scale).to(llama.FP8), scale


def tensor_linear(x, weight, scale):
    rows, of_rows = tensor_rows(x.reshape(-1, x.shape[-1]))
    y = torch._scaled_mm(rows, weight.t(), of_rows, scale, out_dtype=torch.bfloat16, use_fast_accum=x.is_cuda)
    return y.view(*x.shape[:-1], -1).to(x.dtype)


def int8_rows(x):
    scale = x.abs().amax(-1, keepdim=True).float().clamp_min(1e-12) / 127
    return (x.float() / scale).round().to(torch.int8), scale


def int8_linear(x, weight, scale):
    rows, of_rows = int8_rows(x.reshape(-1, x.shape[-1]))
    y = torch._int_mm(rows, weight.t()).float() * of_rows * scale.t()
    return y.to(x.dtype).view(*x.shape[:-1], -1)


# what weights become, and what a linear layer computes
QUANT = {
    "fp8-row": (llama.fp8_rows, llama.fp8_linear),
    "fp8-tensor": (tensor_rows, tensor_linear),
    "int8": (int8_rows, int8_linear),
}


def add_option(parser):
    parser.add_argument("--quant", choices=["none", *QUANT], default="none", help="how the linear layers are quantised")


def quantised(model, quant):
    """A model whose linear layers are quantised, in place."""
    return model if quant == "none" else llama.quantise(model, *QUANT[quant])


def able(sides, quant):
    """The sides that can be measured: the one over torch's symmetric memory has a GEMM of its own, in 16 bits."""
    return [side for side in sides if quant == "none" or side != "inductor-symm"]


def name(what, model, quant, ranks):
    """The name of a result file: what-model-quant-tpN."""
    return "-".join([what, model, *([quant] if quant != "none" else []), f"tp{ranks}"])
