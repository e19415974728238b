"""All-reduce, residual add and RMSNorm, in the ways that people write them: the parts of the graphs in the tests."""

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
import torch.nn.functional as F

H, INNER = 16, 24  # a model's own sizes: static, also where the number of tokens is not


def all_reduce(x, op="sum", group=None):
    return funcol.all_reduce(x, op, group or dist.group.WORLD)


def in_place(x):
    x = x.clone()
    dist.all_reduce(x)
    return x


def hf_norm(x, weight):
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)).to(x.dtype)


def torch_norm(x, weight):
    return F.rms_norm(x, (x.shape[-1],), weight, 1e-5)


def gemma_norm(x, weight):
    wide = x.float()
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5) * (1.0 + weight.float())).to(x.dtype)


def plain_norm(x, weight):
    """No weight at all."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)).to(x.dtype)


NORMS = {"hf": hf_norm, "torch": torch_norm, "gemma": gemma_norm, "without a weight": plain_norm}


def values(*shape, dtype=torch.float32):
    return torch.randn(*shape, dtype=dtype)
