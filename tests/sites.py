"""All-reduce, residual add and norm, in the ways that people write them: the parts of the graphs in the tests."""

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


def t5_norm(x, weight):
    """What is multiplied is not cast."""
    return weight * (x * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-5)).to(x.dtype)


def sum_norm(x, weight):
    """A sum in place of a mean, and no last dimension until it is needed."""
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).sum(-1) / x.shape[-1] + 1e-5).unsqueeze(-1)).to(x.dtype)


def narrow_norm(x, weight):
    """In the dtype of the model."""
    return x * torch.rsqrt(x.pow(2).mean(-1).unsqueeze(-1) + 1e-5) * weight


def layer_norm(x, weight=None, bias=None):
    return F.layer_norm(x, (x.shape[-1],), weight, bias, 1e-5)


def layer_norm_by_hand(x, weight, bias):
    wide = x.float()
    wide = wide - wide.mean(-1, keepdim=True)
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)).to(x.dtype) + bias


def layer_norm_by_variance(x, weight, bias):
    """Each time that it reads x, it casts it."""
    mean, variance = x.float().mean(-1, keepdim=True), x.float().var(-1, keepdim=True, unbiased=False)
    return ((x.float() - mean) / torch.sqrt(variance + 1e-5) * weight.float() + bias.float()).to(x.dtype)


def layer_norm_by_var_mean(x, weight, bias):
    variance, mean = torch.var_mean(x.float(), -1, keepdim=True, correction=0)
    return ((x.float() - mean) * (variance + 1e-5) ** -0.5).to(x.dtype) * weight + bias


def cohere_norm(x, weight, bias):
    """Computes x - mean(x) twice; without a bias."""
    wide = x.float()
    variance = (wide - wide.mean(-1, keepdim=True)).pow(2).mean(-1, keepdim=True)
    return (weight.float() * ((wide - wide.mean(-1, keepdim=True)) * torch.rsqrt(variance + 1e-5))).to(x.dtype)


LAYER_NORMS = {  # name -> f(x, weight, bias)
    "torch": layer_norm,
    "torch, no bias": lambda x, weight, bias: layer_norm(x, weight),
    "torch, no weight": lambda x, weight, bias: layer_norm(x, None, bias),
    "torch, neither": lambda x, weight, bias: layer_norm(x),
    "nemotron": lambda x, weight, bias: layer_norm(x, weight + 1, bias),
    "by hand": layer_norm_by_hand,
    "by variance": layer_norm_by_variance,
    "by var_mean": layer_norm_by_var_mean,
    "cohere": cohere_norm,
}
NORMS = {
    "hf": hf_norm, "torch": torch_norm, "gemma": gemma_norm, "without a weight": plain_norm, "t5": t5_norm, "sum": sum_norm,
    "narrow": narrow_norm,
}  # fmt: skip


def values(*shape, dtype=torch.float32):
    return torch.randn(*shape, dtype=dtype)
