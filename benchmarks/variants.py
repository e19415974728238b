"""The models that are measured, and variants of them: without all-reduces, and with PyTorch's symmetric memory.

Inductor itself uses symmetric memory (``_inductor.config._collective.auto_select``) only up to 128 KiB, and only with static shapes. So
the variant here uses PyTorch's ops by hand: the GEMM writes into symmetric memory, and the sum is read from there, without copies. It
does not use multicast.
"""

import copy
import sys
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory as symm_mem
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
import llama

MODELS = {
    **llama.SIZES,
    # A Llama, except for the biases of its q, k and v.
    "Qwen2.5-72B": replace(llama.SIZES["70B"], intermediate=29568, vocab=152064, eps=1e-6, rope_theta=1e6),
}
QKV_BIAS = {"Qwen2.5-72B"}


def build(name, layers, device, make=llama.Llama):
    """(``make(config, group)``, its config): a model with random weights and the shapes of MODELS[name]."""
    config = replace(MODELS[name], layers=layers)
    with torch.device("meta"):
        model = make(config, dist.group.WORLD)
        for path, module in model.named_modules():
            if name in QKV_BIAS and path.endswith(("q_proj", "k_proj", "v_proj")):
                module.bias = nn.Parameter(torch.empty(module.out_features))
        model = model.to(torch.bfloat16 if device.type == "cuda" else torch.float32).eval()
    llama.fill(model, config, device, None)
    return model, config


def twin(model):
    """A copy of a model that shares its weights, buffers and process group."""
    shared = [*model.parameters(), *model.buffers(), dist.group.WORLD]
    return copy.deepcopy(model, {id(thing): thing for thing in shared})


def without_all_reduces(model):
    """A copy with the same shapes and no all-reduces. Its results are wrong; its time is a bound."""
    model = twin(model)
    for module in model.modules():
        if isinstance(module, (llama.Row, llama.Embedding)):
            module.tp = None
    return model


# --- PyTorch's symmetric memory --------------------------------------------------------------------------------------

ONE_SHOT_BYTES = 128 * 1024  # as in Inductor

buffers = {}  # (group, dtype, elements) -> tensor


def with_symmetric_rows(model):
    """A copy whose row-parallel layers reduce over symmetric memory. The embedding still uses NCCL."""
    model = twin(model)
    for module in model.modules():
        if isinstance(module, llama.Row):
            module.__class__, module.group = SymmetricRow, module.tp.group_name
    return model


class SymmetricRow(llama.Row):
    def forward(self, x):
        return linear_all_reduce(x, self.weight, self.group)


@torch.library.custom_op("benchmarks::linear_all_reduce", mutates_args=())
def linear_all_reduce(x: torch.Tensor, weight: torch.Tensor, group: str) -> torch.Tensor:
    shape = torch.Size((*x.shape[:-1], weight.shape[0]))
    partial = symmetric_memory(group, x.dtype, shape.numel(), x.device).view(-1, weight.shape[0])
    torch.mm(x.reshape(-1, x.shape[-1]), weight.t(), out=partial)
    if partial.nbytes <= ONE_SHOT_BYTES:
        total = torch.ops.symm_mem.one_shot_all_reduce(partial, "sum", group)
    else:
        total = torch.empty_like(partial)
        torch.ops.symm_mem.two_shot_all_reduce_out(partial, "sum", group, total)
    return total.view(shape)


@linear_all_reduce.register_fake
def _(x, weight, group):
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def symmetric_memory(group, dtype, elements, device):
    """[elements] of symmetric memory. Calls with the same group, dtype and power of two share it. A collective on first use."""
    key = group, dtype, 1 << (elements - 1).bit_length()
    if key not in buffers:
        buffers[key] = symm_mem.empty(key[-1], dtype=dtype, device=device)
        symm_mem.rendezvous(buffers[key], group)
    return buffers[key][:elements]
