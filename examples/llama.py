"""A tensor-parallel Llama, written by hand, under ``torch.compile(model, backend="tokenweave")``.

    torchrun --nproc-per-node 2 examples/llama.py
    torchrun --nproc-per-node 8 examples/llama.py --size 70B --layers 4 --tokens 4096
    torchrun --nproc-per-node 8 examples/llama.py --weights path/to/Meta-Llama-3-8B
    torchrun --nproc-per-node 2 examples/llama.py --fp8

It runs on as many GPUs as there are ranks, or else on the CPU. It prints the reports of the backend, the errors of the backend and of
Inductor against eager PyTorch, and the times of both. The model is the first part; it does not depend on the backend.
"""

import argparse
import ast
import json
import math
import os
import statistics
import sys
import time
import traceback
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
import torch.nn.functional as F
from torch import nn

import tw_compile

# torch 2.13 has the first name, 2.11 the second.
all_gather = getattr(funcol, "all_gather_single", None) or funcol.all_gather_tensor

# --- the model -------------------------------------------------------------------------------------------------------
#
# ``tp`` is the process group of the ranks that share each layer; None for a model on one device.


@dataclass(frozen=True)
class Config:
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    eps: float = 1e-5
    rope_theta: float = 500_000.0
    rope_scaling: dict | None = None  # Llama 3.1's, with Hugging Face's names


SIZES = {
    "tiny": Config(layers=2, hidden=256, intermediate=768, heads=16, kv_heads=8, head_dim=16, vocab=1024),
    "8B": Config(layers=32, hidden=4096, intermediate=14336, heads=32, kv_heads=8, head_dim=128, vocab=128256),
    "70B": Config(layers=80, hidden=8192, intermediate=28672, heads=64, kv_heads=8, head_dim=128, vocab=128256),
}


class RMSNorm(nn.Module):
    def __init__(self, size, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.empty(size)), eps

    def forward(self, x):
        x32 = x.float()
        x32 = x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * x32.to(x.dtype)


class Column(nn.Linear):
    """A linear layer of which each rank has a part of the outputs."""

    sharded_dim = 0

    def __init__(self, inputs, outputs, tp):
        super().__init__(inputs, outputs // ranks_of(tp), bias=False)


class Row(nn.Linear):
    """A linear layer of which each rank has a part of the inputs. The result is the sum over the ranks."""

    sharded_dim = 1

    def __init__(self, inputs, outputs, tp):
        super().__init__(inputs // ranks_of(tp), outputs, bias=False)
        self.tp = tp

    def forward(self, x):
        return all_reduce(super().forward(x), self.tp)


class Embedding(nn.Embedding):
    """An embedding of which each rank has a part of the vocabulary. The result is the sum over the ranks: other parts are zeros."""

    sharded_dim = 0

    def __init__(self, vocab, hidden, tp):
        super().__init__(vocab // ranks_of(tp), hidden)
        self.tp = tp

    def forward(self, ids):
        if self.tp is None:
            return super().forward(ids)
        ids = ids - self.tp.rank() * self.num_embeddings
        elsewhere = (ids < 0) | (ids >= self.num_embeddings)
        rows = super().forward(ids.masked_fill(elsewhere, 0))
        return all_reduce(rows.masked_fill(elsewhere[..., None], 0), self.tp)


class Attention(nn.Module):
    def __init__(self, config, tp):
        super().__init__()
        self.head_dim = config.head_dim
        self.q_proj = Column(config.hidden, config.heads * config.head_dim, tp)
        self.k_proj = Column(config.hidden, config.kv_heads * config.head_dim, tp)
        self.v_proj = Column(config.hidden, config.kv_heads * config.head_dim, tp)
        self.o_proj = Row(config.heads * config.head_dim, config.hidden, tp)

    def forward(self, x, cos, sin):
        q, k, v = (
            proj(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.o_proj(out.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, config, tp):
        super().__init__()
        self.gate_proj = Column(config.hidden, config.intermediate, tp)
        self.up_proj = Column(config.hidden, config.intermediate, tp)
        self.down_proj = Row(config.intermediate, config.hidden, tp)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, config, tp):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden, config.eps)
        self.self_attn = Attention(config, tp)
        self.post_attention_layernorm = RMSNorm(config.hidden, config.eps)
        self.mlp = MLP(config, tp)

    def forward(self, x, cos, sin):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))


class Llama(nn.Module):
    """ids [batch, tokens] -> (hidden states [batch, tokens, hidden], logits [batch, vocab] of the next token)."""

    def __init__(self, config, tp=None):
        super().__init__()
        self.tp = tp
        self.embed_tokens = Embedding(config.vocab, config.hidden, tp)
        self.layers = nn.ModuleList(Layer(config, tp) for _ in range(config.layers))
        self.norm = RMSNorm(config.hidden, config.eps)
        self.lm_head = Column(config.hidden, config.vocab, tp)
        self.register_buffer("frequencies", torch.empty(config.head_dim // 2), persistent=False)

    def forward(self, ids):
        x = self.embed_tokens(ids)
        angles = torch.arange(ids.shape[1], device=ids.device)[:, None] * self.frequencies
        angles = torch.cat((angles, angles), -1)
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        for layer in self.layers:
            x = layer(x, cos, sin)
        hidden = self.norm(x)
        logits = self.lm_head(hidden[:, -1])
        return hidden, logits if self.tp is None else all_gather(logits, 1, self.tp)


def ranks_of(tp):
    return 1 if tp is None else tp.size()


def all_reduce(x, tp):
    return x if tp is None else funcol.all_reduce(x, "sum", tp)


def rotate(x, cos, sin):
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat((-b, a), -1) * sin


def rope_frequencies(config):
    """[head_dim / 2] radians per token. Llama 3.1 stretches wavelengths that are longer than its original context."""
    frequencies = config.rope_theta ** (-torch.arange(0, config.head_dim, 2).float() / config.head_dim)
    if config.rope_scaling is None:
        return frequencies
    low, high = config.rope_scaling["low_freq_factor"], config.rope_scaling["high_freq_factor"]
    turns = frequencies * config.rope_scaling["original_max_position_embeddings"] / (2 * math.pi)
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return frequencies * (kept + (1 - kept) / config.rope_scaling["factor"])


# --- 8 bits ----------------------------------------------------------------------------------------------------------

FP8 = torch.float8_e4m3fn


def fp8_rows(x):
    """(x in FP8, scale [..., 1] in float32): each row has its own scale."""
    scale = x.abs().amax(-1, keepdim=True).float().clamp_min(1e-12) / torch.finfo(FP8).max
    return (x.float() / scale).to(FP8), scale


def fp8_linear(x, weight, scale):
    """A linear layer of which weight and input have 8 bits. weight: [outputs, inputs], scale: [outputs, 1], as ``fp8_rows`` makes them"""
    rows, of_rows = fp8_rows(x.reshape(-1, x.shape[-1]))
    y = torch._scaled_mm(rows, weight.t(), of_rows, scale.t(), out_dtype=torch.bfloat16, use_fast_accum=x.is_cuda)
    return y.view(*x.shape[:-1], -1).to(x.dtype)


class QuantisedColumn(Column):
    def forward(self, x):
        return self.linear(x, self.weight, self.scale)


class QuantisedRow(Row):
    def forward(self, x):
        return all_reduce(self.linear(x, self.weight, self.scale), self.tp)


QUANTISED = {Column: QuantisedColumn, Row: QuantisedRow}


def quantise(model, rows=fp8_rows, linear=fp8_linear):
    """Quantise the linear layers of a model's layers, in place. Returns the model.

    rows: a weight -> (the quantised weight, its scale); linear: (x, quantised weight, its scale) -> y
    """
    for module in model.layers.modules():
        if type(module) in QUANTISED:
            weight, scale = rows(module.weight.detach())
            module.weight, module.scale = nn.Parameter(weight, requires_grad=False), nn.Buffer(scale)
            module.__class__, module.linear = QUANTISED[type(module)], linear
    return model


# --- the weights -----------------------------------------------------------------------------------------------------


class Stop(Exception):
    """The user's request is not possible. The message says why."""


def read_config(folder):
    """The Config of a Hugging Face checkpoint. Raises Stop for a model that is not supported."""
    path = folder / "config.json"
    if not path.is_file():
        raise Stop(f"--weights: there is no {path}")
    hf = json.loads(path.read_text())
    rope = hf.get("rope_parameters") or {"rope_theta": hf.get("rope_theta", 10_000.0), **(hf.get("rope_scaling") or {})}
    kind = rope.get("rope_type", "default")
    unsupported = {
        f"model_type {hf['model_type']}": hf["model_type"] != "llama",
        f"hidden_act {hf.get('hidden_act')}": hf.get("hidden_act", "silu") != "silu",
        "attention_bias": hf.get("attention_bias"),
        "mlp_bias": hf.get("mlp_bias"),
        f"rope_type {kind}": kind not in ("default", "llama3"),
    }
    if found := [what for what, there in unsupported.items() if there]:
        raise Stop(f"--weights: this example is of a Llama without {', '.join(found)}")
    return Config(
        layers=hf["num_hidden_layers"],
        hidden=hf["hidden_size"],
        intermediate=hf["intermediate_size"],
        heads=hf["num_attention_heads"],
        kv_heads=hf.get("num_key_value_heads") or hf["num_attention_heads"],
        head_dim=hf.get("head_dim") or hf["hidden_size"] // hf["num_attention_heads"],
        vocab=hf["vocab_size"],
        eps=hf["rms_norm_eps"],
        rope_theta=rope["rope_theta"],
        rope_scaling=rope if kind == "llama3" else None,
    )


def fill(model, config, device, folder):
    """Move a model from the meta device to ``device``. folder: with its weights; None for random weights"""
    model.to_empty(device=device)
    model.frequencies = rope_frequencies(config).to(device)  # in float32, whatever the model's dtype
    read = _random(device) if folder is None else _checkpoint(folder)
    for module_name, module in model.named_modules():
        for name, weight in module.named_parameters(recurse=False):
            local = weight.to_local() if hasattr(weight, "to_local") else weight
            local.copy_(read(f"{module_name}.{name}", local.shape, getattr(module, "sharded_dim", None)))


def _random(device):
    """A reader of random weights. Each rank draws its own shards. The weights of norms, which are not sharded, are ones."""
    generator = torch.Generator(device).manual_seed(dist.get_rank())

    def read(name, shape, sharded_dim):
        if sharded_dim is None:
            return torch.ones(shape, device=device)
        return torch.randn(shape, device=device, generator=generator) * 0.02

    return read


def _checkpoint(folder):
    """A reader of safetensors files with Hugging Face's names. Each rank reads only its own shards."""
    try:
        from safetensors import safe_open
    except ImportError:
        raise Stop("--weights needs the package safetensors: pip install safetensors") from None
    files = [safe_open(path, "pt") for path in sorted(folder.glob("*.safetensors"))]
    if not files:
        raise Stop(f"--weights: there are no *.safetensors files in {folder}")
    file_of = {key: file for file in files for key in file.keys()}  # noqa: SIM118  # not a dict: safetensors' file has no __iter__

    def read(name, shape, sharded_dim):
        key = name if name.startswith("lm_head") else f"model.{name}"
        if key == "lm_head.weight" and key not in file_of:
            key = "model.embed_tokens.weight"  # tied
        if key not in file_of:
            raise Stop(f"--weights: {folder} has no {key}")
        tensor = file_of[key].get_slice(key)
        part = [slice(None)] * len(shape)
        if sharded_dim is not None:
            start = dist.get_rank() * shape[sharded_dim]
            part[sharded_dim] = slice(start, start + shape[sharded_dim])
        return tensor[tuple(part)]

    return read


# --- the comparison --------------------------------------------------------------------------------------------------


def main(build, parser):
    """Read the command line, and compare the backends on the model of ``build(config, device, args)``, which is on the meta device.

    An error on a rank ends the process with a message, and torchrun then ends the other ranks.
    """
    args = arguments(parser)
    if "RANK" not in os.environ:
        sys.exit(f"This runs on several ranks. Start it with: torchrun --nproc-per-node 2 {sys.argv[0]}")
    try:
        with torch.no_grad():
            compare(build, args)
    except Exception as error:
        # Lines are cut, as Inductor's message for an unknown option lists all its options.
        message = cause(error) or "\n".join(line[:300] for line in traceback.format_exc().splitlines())
        print(f"rank {os.environ['RANK']}: {message}\n", end="", file=sys.stderr, flush=True)
        os._exit(1)  # a normal exit could wait for other ranks, which may wait in a collective
    dist.destroy_process_group()


def cause(error):
    """The message of an error that the user can correct, also from within torch.compile; None for other errors."""
    while error is not None:
        if isinstance(error, (Stop, tw_compile.TokenWeaveError)):
            return str(error)
        error = getattr(error, "inner_exception", None) or error.__cause__
    return None


def command_line():
    parser = argparse.ArgumentParser(description='A tensor-parallel Llama, backend="tokenweave" against "inductor".')
    parser.set_defaults(fp8=False)
    parser.add_argument("--size", choices=SIZES, default="tiny", help="shapes of the random weights (default: tiny)")
    parser.add_argument("--weights", type=Path, help="folder with config.json and *.safetensors, instead of random ones")
    parser.add_argument("--layers", type=int, help="so many layers (default: all of the model)")
    parser.add_argument("--tokens", type=int, default=2048, help="tokens of each sequence (default: 2048)")
    parser.add_argument("--batch", type=int, default=1, help="sequences (default: 1)")
    parser.add_argument(
        "--option",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="of torch.compile(options=...), any number of times: tokenweave.mode=fuse, triton.cudagraphs=True",
    )
    return parser


def arguments(parser):
    args = parser.parse_args()
    for option in args.option:
        if "=" not in option:
            parser.error(f"--option {option}: it takes NAME=VALUE")
    for name in ("layers", "tokens", "batch"):
        if (given := getattr(args, name)) is not None and given < 1:
            parser.error(f"--{name} {given}: it takes a whole number from 1 on")
    args.option = {name: literal(value) for name, value in (option.split("=", 1) for option in args.option)}
    return args


def literal(text):
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def compare(build, args):
    device, ranks = start()
    dtype = torch.bfloat16 if device.type == "cuda" or args.fp8 else torch.float32
    config = read_config(args.weights) if args.weights else SIZES[args.size]
    config = replace(config, layers=args.layers or config.layers)
    check(config, ranks, args)
    say(
        f"Llama {args.weights or args.size}, {config.layers} layers, {args.batch} × {args.tokens} tokens, "
        f"{'FP8, ' if args.fp8 else ''}{str(dtype).removeprefix('torch.')}, on {ranks} {'GPUs' if device.type == 'cuda' else 'CPU ranks'}"
    )

    with torch.device("meta"):
        model = build(config, device, args).to(dtype).eval()
    fill(model, config, device, args.weights)
    if args.fp8:
        quantise(model)
    ids = torch.randint(config.vocab, (args.batch, args.tokens), generator=torch.Generator().manual_seed(0)).to(device)

    inductor_options = {name: value for name, value in args.option.items() if not name.startswith("tokenweave.")}
    compiled = {
        "tokenweave": torch.compile(model, backend="tokenweave", options=args.option),
        "inductor": torch.compile(model, backend="inductor", options=inductor_options),
    }
    expected = model(ids)
    errors = {}
    for name, run in compiled.items():
        say(f"compiling with {name} ...")
        errors[name] = [error(result, right) for result, right in zip(run(ids), expected)]
        if name == "tokenweave":
            say("", *tw_compile.reports(), "", sep="\n")

    say("\nerror against eager, |difference| / |eager|:")
    for name, (hidden, logits) in errors.items():
        say(f"  {name:10}  hidden states {hidden:.1e}  logits {logits:.1e}")
    # Inductor rounds in other places than eager mode, and so may the backend. But its error must not be larger.
    limit = 2 * max(errors["inductor"]) + 4 * torch.finfo(dtype).eps
    if not max(errors["tokenweave"]) <= limit:
        raise Stop(f"the results of tokenweave are off by more than {limit:.1e}")

    times = median_times(compiled, ids)
    say(
        f"\ntime: tokenweave is {times['inductor'] / times['tokenweave']:.2f}× as fast as inductor "
        f"({times['tokenweave'] * 1e3:.2f} ms against {times['inductor'] * 1e3:.2f} ms a forward pass)"
    )
    if device.type == "cpu":
        say("  on CPUs the communication runs on the cores that compute: this shows that it works, not what it gains")


def start():
    """Join the other ranks. Returns this rank's device and the number of ranks."""
    local_rank, here = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
    gpus = torch.cuda.device_count()
    device = torch.device("cuda", local_rank) if gpus >= here else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        timeout=timedelta(minutes=10),
        device_id=device if device.type == "cuda" else None,
    )
    if 0 < gpus < here:
        say(f"{here} ranks, {gpus} GPUs: running on the CPU")
    return device, dist.get_world_size()


def check(config, ranks, args):
    if ranks == 1:
        raise Stop("one rank has nothing to reduce; start at least two: torchrun --nproc-per-node 2 ...")
    for name in ("heads", "kv_heads", "intermediate", "vocab"):
        if getattr(config, name) % ranks:
            raise Stop(f"{getattr(config, name)} {name} do not divide by {ranks} ranks")
    if args.batch * args.tokens < 2:
        raise Stop("one token cannot be split in two; give --tokens or --batch")
    if args.fp8 and not torch.cuda.is_available() and torch.__version__ < "2.12":
        raise Stop("--fp8: on CPUs, GEMMs with a scale for each row need PyTorch 2.12")


def error(result, right):
    """|result - right| / |right|: the largest value of all ranks."""
    relative = (result.double() - right.double()).norm() / right.double().norm()
    dist.all_reduce(relative, dist.ReduceOp.MAX)
    return relative.item()


def median_times(runs, ids, samples=11, calls=5):
    """name -> seconds per call: the median over samples of the slowest rank. The runs take turns, so that drift affects all alike."""
    taken = {name: [] for name in runs}
    for sample in range(-2, samples):  # the first two warm up
        for name, run in runs.items():
            seconds = torch.tensor(time_of(run, ids, calls), device=ids.device)
            dist.all_reduce(seconds, dist.ReduceOp.MAX)
            if sample >= 0:
                taken[name].append(seconds.item() / calls)
    return {name: statistics.median(t) for name, t in taken.items()}


def time_of(run, ids, calls):
    """Seconds of ``calls`` calls in a row on this rank. The ranks begin together."""
    dist.barrier()
    if ids.device.type == "cpu":
        begin = time.perf_counter()
        for _ in range(calls):
            run(ids)
        return time.perf_counter() - begin
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    for _ in range(calls):
        run(ids)
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def say(*text, **how):
    if dist.get_rank() == 0:
        print(*text, **how, flush=True)


if __name__ == "__main__":
    parser = command_line()
    parser.add_argument("--fp8", action="store_true", help="weights and inputs of the layers' linears in 8 bits, a scale for each row")
    main(lambda config, device, args: Llama(config, tp=dist.group.WORLD), parser)
