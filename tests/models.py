"""A small tensor-parallel Llama, written in each of the ways that people write one."""

from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

HIDDEN, HEAD, HEADS, KV_HEADS, INNER, VOCAB, EPS = 64, 16, 4, 2, 128, 64, 1e-5


def functional(x):
    return funcol.all_reduce(x, "sum", dist.group.WORLD)


def scatter(x):
    return funcol.reduce_scatter_tensor(x, "sum", 1, dist.group.WORLD)


def gather(norm, inputs, x):
    """A forward hook of a norm."""
    return all_gather(x, 1, dist.group.WORLD)


def all_gather(x, dim, group):
    if dim == 0 or torch.__version__ >= "2.13":
        return funcol.all_gather_tensor(x, dim, group)
    # Dynamo of 2.11 and 2.12 does not trace into what that does for other dimensions than the first.
    return torch.cat(funcol.all_gather_tensor(x, 0, group).chunk(group.size()), dim)


def in_place(x):
    dist.all_reduce(x)
    return x


def nothing(x):
    """Of a whole model, or one whose modules reduce by themselves."""
    return x


class HFNorm(nn.Module):
    """RMSNorm as Hugging Face writes it: cast back first, then the weight."""

    def __init__(self, hidden, eps=EPS):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(hidden)), eps

    def forward(self, x):
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(x.dtype)


class TorchNorm(nn.RMSNorm):
    """RMSNorm as torch writes it: the weight first, then cast back."""

    def __init__(self, hidden, eps=EPS):
        super().__init__(hidden, eps=eps)


class LayerNorm(nn.LayerNorm):
    def __init__(self, hidden, eps=EPS):
        super().__init__(hidden, eps=eps)


NORMS = {"hf": HFNorm, "torch": TorchNorm, "layer": LayerNorm}


def linear(inner, outer):
    layer = nn.Linear(inner, outer, bias=False)
    nn.init.normal_(layer.weight, std=inner**-0.5)
    return layer


class Attention(nn.Module):
    def __init__(self, reduce):
        super().__init__()
        self.q, self.o = linear(HIDDEN, HEADS * HEAD), linear(HEADS * HEAD, HIDDEN)
        self.k, self.v = linear(HIDDEN, KV_HEADS * HEAD), linear(HIDDEN, KV_HEADS * HEAD)
        self.reduce = reduce

    def forward(self, x, rope):
        batch, tokens, _ = x.shape
        q, k, v = (z.view(batch, tokens, -1, HEAD).transpose(1, 2) for z in (self.q(x), self.k(x), self.v(x)))
        out = F.scaled_dot_product_attention(rotate(q, rope), rotate(k, rope), v, is_causal=True, enable_gqa=True)
        return self.reduce(self.o(out.transpose(1, 2).reshape(batch, tokens, -1)))


class MLP(nn.Module):
    def __init__(self, reduce):
        super().__init__()
        self.gate, self.up, self.down = linear(HIDDEN, INNER), linear(HIDDEN, INNER), linear(INNER, HIDDEN)
        self.reduce = reduce

    def forward(self, x):
        return self.reduce(self.down(F.silu(self.gate(x)) * self.up(x)))


class Block(nn.Module):
    def __init__(self, norm, reduce):
        super().__init__()
        self.attention_norm, self.mlp_norm = norm(HIDDEN), norm(HIDDEN)
        self.attention, self.mlp = Attention(reduce), MLP(reduce)

    def forward(self, x, rope):
        x = x + self.attention(self.attention_norm(x), rope)
        return x + self.mlp(self.mlp_norm(x))


class VocabularyParallel(nn.Embedding):
    """Each rank has its part of the table, and adds nothing for the words of the others."""

    reduce, first = staticmethod(nothing), 0

    def forward(self, ids):
        own = ids - self.first
        elsewhere = (own < 0) | (own >= self.weight.shape[0])
        return self.reduce(super().forward(own.masked_fill(elsewhere, 0)).masked_fill(elsewhere[..., None], 0.0))


class Llama(nn.Module):
    def __init__(self, layers=2, norm="hf", reduce=nothing):
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, HIDDEN)
        self.layers = nn.ModuleList(Block(NORMS[norm], reduce) for _ in range(layers))
        self.norm, self.head = NORMS[norm](HIDDEN), linear(HIDDEN, VOCAB)

    def forward(self, ids):
        x, rope = self.embedding(ids), rotary(ids.shape[1], self.head.weight.dtype)
        for layer in self.layers:
            x = layer(x, rope)
        return self.head(self.norm(x))


def rotary(tokens, dtype):
    angles = torch.arange(tokens)[:, None] * torch.exp(torch.arange(HEAD // 2) / -2.0)
    angles = torch.cat((angles, angles), -1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x, rope):
    cos, sin = rope
    half = HEAD // 2
    return x * cos + torch.cat((-x[..., half:], x[..., :half]), -1) * sin


@dataclass(frozen=True)
class Style:
    """How a model is made parallel.

    embedding: whether its table is split over the ranks too, so that it is a site
    plan:      for parallelize_module
    sequence:  whether what goes from block to block is split over the ranks
    """

    reduce: object
    embedding: bool
    plan: object = None
    sequence: bool = False


COLUMNS = "attention.q", "attention.k", "attention.v", "mlp.gate", "mlp.up"
ROWS = "attention.o", "mlp.down"


def _replicated():
    """A plan for parallelize_module: what goes from block to block is on all ranks."""
    columns = {f"layers.*.{name}": ColwiseParallel() for name in COLUMNS}
    rows = {f"layers.*.{name}": RowwiseParallel() for name in ROWS}
    return columns | rows | {"embedding": RowwiseParallel(input_layouts=Replicate())}


def _sequence():
    """A plan for parallelize_module, as in torch's tutorial: each rank has its tokens of what goes from block to block."""
    columns = {f"layers.*.{name}": ColwiseParallel() for name in COLUMNS}
    rows = {f"layers.*.{name}": RowwiseParallel(output_layouts=Shard(1)) for name in ROWS}
    norms = {name: SequenceParallel() for name in ("layers.*.attention_norm", "layers.*.mlp_norm", "norm")}
    gathers = {
        "layers.*.attention": PrepareModuleInput(input_layouts=(Shard(1), None), desired_input_layouts=(Replicate(), None)),
        "layers.*.mlp": PrepareModuleInput(input_layouts=(Shard(1),), desired_input_layouts=(Replicate(),)),
    }
    ends = {
        "embedding": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1)),
        "head": ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate()),
    }
    return columns | rows | norms | gathers | ends


STYLES = {
    "functional": Style(functional, embedding=True),
    "in_place": Style(in_place, embedding=False),
    "dtensor": Style(nothing, embedding=True, plan=_replicated),
    "functional_sequence": Style(scatter, embedding=True, sequence=True),
    "dtensor_sequence": Style(nothing, embedding=True, plan=_sequence, sequence=True),
}


def whole(layers=2, norm="hf", dtype=torch.bfloat16) -> Llama:
    """The model on one rank, with seeded weights: what every parallel one must agree with."""
    torch.manual_seed(1)
    model = Llama(layers, norm).eval()
    for name, weight in model.named_parameters():
        if "norm" in name:
            nn.init.normal_(weight, mean=1.0, std=0.2)
    return model.to(dtype)


def parallel(style, layers=2, norm="hf", dtype=torch.bfloat16, mesh=None) -> Llama:
    """The same model, tensor-parallel over the default process group; with DTensor, over another mesh where it is given."""
    model = whole(layers, norm, dtype)
    if STYLES[style].plan is not None:
        mesh = mesh or init_device_mesh("cpu", (dist.get_world_size(),))
        return parallelize_module(model, mesh, STYLES[style].plan())
    rank, world = dist.get_rank(), dist.get_world_size()
    sharded = Llama(layers, norm, STYLES[style].reduce).eval().to(dtype)
    state = {name: _shard(name, value, rank, world) for name, value in model.state_dict().items()}
    if STYLES[style].embedding:
        sharded.embedding = VocabularyParallel(VOCAB // world, HIDDEN, dtype=dtype)
        sharded.embedding.reduce, sharded.embedding.first = STYLES[style].reduce, rank * VOCAB // world
        state["embedding.weight"] = state["embedding.weight"].chunk(world, 0)[rank]
    for name, parameter in sharded.named_parameters():
        parameter.data = state[name].clone()
    for name, module in sharded.named_modules():
        if STYLES[style].sequence and name.endswith("norm"):
            module.register_forward_hook(gather)
    return sharded


def _shard(name, value, rank, world):
    kind = name.split(".")[-2]
    if kind in ("q", "k", "v", "gate", "up"):
        return value.chunk(world, 0)[rank]
    return value.chunk(world, 1)[rank] if kind in ("o", "down") else value
