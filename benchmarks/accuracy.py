"""What a wire of fewer bits costs in accuracy: perplexity and top-1 agreement of a small Llama that has learnt Python.

    torchrun --nproc-per-node 1 benchmarks/accuracy.py

It trains a Llama on bytes of the standard library's sources and of Python's documentation, which come with Python, from fixed seeds; on a
GPU one of 26 million parameters for minutes, on a CPU a tiny one for seconds. Then it reads files that it was not trained on. The ranks'
partial sums are computed in one process and go through what the ranks themselves run: ``codec.py``, on a GPU ``kernels.py``.
tests/test_low_bit_ranks.py compares the two bit by bit. Writes benchmarks/results/accuracy-*.json, one row for each number of ranks and
wire, with

    ranks, wire              wire: bits; 16 is the model's dtype, bfloat16; "fp8": 8 bits as e4m3 in place of whole numbers, which the
                             package does not have, with the same groups and scales
    perplexity               of a byte
    change_percent           of the perplexity, against 16 bits
    top1_agreement_percent   of bytes for which the same byte is the most likely as with 16 bits
    top1_percent             of bytes for which the most likely byte is the right one
"""

import argparse
import hashlib
import math
import platform
import sysconfig
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import result_file
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from tw_compile.site import Site, all_reduce_add_norm
from tw_compile.transports.low_bit import codec

HEAD, EPS, BYTES = 64, 1e-5, 256
FP8 = "fp8"
HELD_OUT = 20  # one of so many files is not trained on


@dataclass(frozen=True)
class Size:
    """hidden, inner, layers: of the model; context, batch, steps: of the training; read: sequences that are read afterwards"""

    hidden: int
    inner: int
    layers: int
    context: int
    batch: int
    steps: int
    read: int


SIZES = {"cuda": Size(512, 1408, 8, 512, 64, 3000, 256), "cpu": Size(256, 512, 2, 64, 8, 200, 32)}


# --- the text --------------------------------------------------------------------------------------------------------


def text():
    """(bytes to train on, bytes of other files), as tensors; and a digest of both."""
    library = Path(sysconfig.get_path("stdlib"))
    paths = [path for path in library.rglob("*") if path.suffix in (".py", ".txt") and "site-packages" not in path.parts]
    parts = {False: [], True: []}
    for number, path in enumerate(sorted(paths, key=lambda path: path.relative_to(library).as_posix())):
        parts[number % HELD_OUT == 0].append(path.read_bytes())
    train, held_out = (b"\n".join(parts[which]) for which in (False, True))
    digest = hashlib.sha256(train + held_out).hexdigest()[:12]
    return *(torch.frombuffer(bytearray(part), dtype=torch.uint8).long() for part in (train, held_out)), digest


def windows(data, length, number, generator):
    """[number, length + 1] bytes from random places."""
    begins = torch.randint(len(data) - length - 1, (number, 1), generator=generator)
    return data[begins + torch.arange(length + 1)]


# --- the model -------------------------------------------------------------------------------------------------------


class Llama(nn.Module):
    """A decoder whose sites are functions of the ranks' partial sums.

    forward(ids, ranks, site): logits as ``ranks`` ranks compute them. site: (their partial sums, each [T, H]; residual, [T, H]; the norm's
    weight) -> (norm, new residual)
    """

    def __init__(self, size):
        super().__init__()
        hidden = size.hidden

        def weight(rows, columns):
            return nn.Parameter(torch.randn(rows, columns) * columns**-0.5)

        self.embedding, self.head = nn.Parameter(torch.randn(BYTES, hidden)), weight(BYTES, hidden)
        self.norms = nn.ParameterList(torch.ones(hidden) for _ in range(2 * size.layers + 1))
        self.qkv = nn.ParameterList(weight(3 * hidden, hidden) for _ in range(size.layers))
        self.o = nn.ParameterList(weight(hidden, hidden) for _ in range(size.layers))
        self.up = nn.ParameterList(weight(2 * size.inner, hidden) for _ in range(size.layers))
        self.down = nn.ParameterList(weight(hidden, size.inner) for _ in range(size.layers))

    def forward(self, ids, ranks, site):
        batch, tokens = ids.shape
        residual = self.embedding[ids].view(batch * tokens, -1)
        norm = F.rms_norm(residual, residual.shape[1:], self.norms[0], EPS)
        rope = rotary(tokens, ids.device, residual.dtype)
        for i in range(len(self.qkv)):
            q, k, v = F.linear(norm, self.qkv[i]).view(batch, tokens, 3, -1, HEAD).permute(2, 0, 3, 1, 4)
            out = F.scaled_dot_product_attention(rotate(q, rope), rotate(k, rope), v, is_causal=True)
            out = out.transpose(1, 2).reshape(batch * tokens, -1)
            norm, residual = site(partial_sums(out, self.o[i], ranks), residual, self.norms[2 * i + 1])
            gate, up = F.linear(norm, self.up[i]).chunk(2, -1)
            norm, residual = site(partial_sums(F.silu(gate) * up, self.down[i], ranks), residual, self.norms[2 * i + 2])
        return F.linear(norm, self.head).view(batch, tokens, BYTES)


def partial_sums(x, weight, ranks):
    """What each rank of a row-parallel layer computes."""
    return [F.linear(part, columns) for part, columns in zip(x.chunk(ranks, -1), weight.chunk(ranks, -1))]


def rotary(tokens, device, dtype):
    angles = torch.arange(tokens, device=device)[:, None] * torch.logspace(0, -4, HEAD // 2, device=device)
    angles = torch.cat((angles, angles), -1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x, rope):
    cos, sin = rope
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin


def trained(size, data, device):
    """A model that has learnt the data, in bfloat16."""
    torch.manual_seed(0)
    model, generator = Llama(size).to(device), torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, size.steps, pct_start=0.05)
    begin = time.perf_counter()
    for step in range(size.steps):
        ids = windows(data, size.context, size.batch, generator).to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            logits = model(ids[:, :-1], 1, whole)
        loss = F.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % (size.steps // 10) == 0 or step == size.steps - 1:
            print(f"step {step:5}: loss {loss.item():.3f}, {time.perf_counter() - begin:.0f} s", flush=True)
    return model.bfloat16().eval()


def whole(partials, residual, weight):
    """The site of one rank, for training."""
    residual = residual + partials[0]
    return F.rms_norm(residual, residual.shape[1:], weight, EPS), residual


# --- the wire --------------------------------------------------------------------------------------------------------


def of_wire(wire):
    """A site as ranks with a wire of so many bits compute it. The residual goes from site to site in float32, as between ranks."""

    def site(partials, residual, weight):
        if wire == 16:
            return all_reduce_add_norm(partials, residual, weight, None, None, EPS, 1.0, 0.0, False)
        if wire == FP8:
            return _site_in_fp8(partials, residual, weight)
        on, trips, world, tokens = codec_of(partials[0].device), codec.TRIPS[wire], len(partials), len(partials[0])
        rows = -(-tokens // world)
        sent = [on.pack(x, world * rows, trips[0]).view(world, rows, -1) for x in partials]
        new = residual.new_empty(world * rows, residual.shape[1], dtype=torch.float32)
        owners = enumerate(zip(*sent))
        norms = [
            on.reduce(torch.stack(received), own, Site(partials[own], residual, weight, eps=EPS), new, trips) for own, received in owners
        ]
        norm = torch.empty_like(partials[0])
        on.unpack(torch.cat(norms), norm, trips[1])
        return norm, new[:tokens]

    return site


def _site_in_fp8(partials, residual, weight):
    """The same in e4m3: the owner of a row has its own partial sum as it is."""
    tokens, world = len(residual), len(partials)
    owner = torch.arange(tokens, device=residual.device) // -(-tokens // world)
    arrived = [torch.where((owner == rank).unsqueeze(-1), x.float(), in_fp8(x)) for rank, x in enumerate(partials)]
    norm, new = all_reduce_add_norm(arrived, residual, weight, None, None, EPS, 1.0, 0.0, False)
    return in_fp8(norm).to(partials[0].dtype), new


def in_fp8(x):
    """The values of rows that were sent as e4m3: [T, H] -> [T, H] in float32."""
    groups, most = x.float().unflatten(-1, (-1, codec.GROUP[8])), torch.finfo(torch.float8_e4m3fn).max
    scales = (groups.abs().amax(-1, keepdim=True).clamp_min(codec.LEAST) * (1.0 / most)).bfloat16().float()
    return ((groups / scales).clamp(-most, most).to(torch.float8_e4m3fn).float() * scales).flatten(-2)


def codec_of(device):
    if device.type != "cuda":
        return codec
    from tw_compile.transports.low_bit import kernels

    return kernels


def read(model, ids, ranks, wire):
    """(mean loss of a byte, the most likely bytes) of a text."""
    losses, best = [], []
    for part in ids.split(16):
        logits = model(part[:, :-1], ranks, of_wire(wire)).float().flatten(0, 1)
        losses.append(F.cross_entropy(logits, part[:, 1:].flatten(), reduction="none"))
        best.append(logits.argmax(-1))
    return torch.cat(losses).double().mean().item(), torch.cat(best)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--wire", nargs="+", choices=("8", "6", "4", FP8), default=["8", "6", "4", FP8])
    parser.add_argument("--steps", type=int, help="of the training")
    args = parser.parse_args()

    dist.init_process_group("gloo")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    size = SIZES[device.type]
    size = Size(**asdict(size) | ({"steps": args.steps} if args.steps else {}))
    train, held_out, digest = text()
    model = trained(size, train, device)
    ids = windows(held_out, size.context, size.read, torch.Generator().manual_seed(1)).to(device)
    right, rows = ids[:, 1:].flatten(), []
    with torch.no_grad():
        for ranks in args.ranks:
            base, usual = read(model, ids, ranks, 16)
            for wire in (16, *(wire if wire == FP8 else int(wire) for wire in args.wire)):
                loss, best = (base, usual) if wire == 16 else read(model, ids, ranks, wire)
                rows.append({
                    "ranks": ranks, "wire": wire, "perplexity": round(math.exp(loss), 5),
                    "change_percent": round(100 * math.expm1(loss - base), 4),
                    "top1_agreement_percent": round(100 * (best == usual).double().mean().item(), 3),
                    "top1_percent": round(100 * (best == right).double().mean().item(), 3),
                })  # fmt: skip
                print(rows[-1], flush=True)
    result_file.write(
        f"accuracy-{device.type}", device, "a Llama trained on Python's own files; ranks in one process, through their codec", rows,
        model={**asdict(size), "parameters": sum(p.numel() for p in model.parameters())},
        text={"python": platform.python_version(), "digest": digest, "bytes": len(train), "held_out_bytes": len(held_out)},
    )  # fmt: skip
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
