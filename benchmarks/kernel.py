"""All-reduce, residual add, RMSNorm: the fused kernel against NCCL or PyTorch's symmetric memory with Inductor's add and norm.

    torchrun --nproc-per-node 8 benchmarks/kernel.py --tokens 1 16 64 256 1024 4096 --hidden 8192 --ctas 8 16

All sides run in one process, each as a CUDA graph of several calls, in turns. A time is the median over samples of the slowest rank.
The ceiling is the throughput of a kernel that only moves the same bytes in the same pattern (wire.py). The fused kernel has its input
where the GEMM before it writes it, and keeps the residual sharded and in float32, as in a compiled model.

Writes benchmarks/results/kernel-*.json, one row for each size and number of CTAs, with

    tokens, hidden, ranks, dtype, transport, kernel, ctas, l2, us, baseline_us (NCCL and add+norm), ratio (us / baseline_us),
    gbps (GB/s over NVLink in each direction), ceiling_gbps, torch_one_shot_us, torch_two_shot_us
"""

import argparse
import functools
import itertools
import os
import sys

import result_file
import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory as symm_mem
import wire
from timing import times_of

from tw_compile.site import Site, add_norm
from tw_compile.transports.symmetric.transport import Symmetric
from tw_compile.transports.symmetric.tuning import LEAST_ROWS, Tuning, by_rule

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
SLOT = 2
KERNELS = ("auto", "one_shot", "two_shot")
NUMERICS = None, 1e-5, 1.0, 0.0, False  # shift, eps, scale, offset, center


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 4, 16, 64, 256, 1024, 2048, 4096, 16384, 32768])
    parser.add_argument("--hidden", type=int, nargs="+", default=[8192])
    parser.add_argument("--dtype", choices=DTYPES, nargs="+", default=["bf16"])
    parser.add_argument("--ctas", type=int, nargs="+", default=[4, 8, 16, 32], help="0: as many as it is tuned to take")
    parser.add_argument("--l2", choices=("warm", "cold"), nargs="+", default=["warm"], help="is the input in L2 before a call")
    parser.add_argument("--kernels", choices=KERNELS, nargs="+", default=["auto"], help="auto: the one for so many tokens")
    parser.add_argument("--no-torch", dest="torch", action="store_false", help="leave out torch's one-shot and two-shot")
    parser.add_argument("--samples", type=int, default=15)
    args = parser.parse_args()

    rank = int(os.environ["LOCAL_RANK"])
    torch.cuda.set_device(rank)
    device = torch.device("cuda", rank)
    dist.init_process_group("nccl", device_id=device)
    if reason := Symmetric.unavailable(dist.group.WORLD.group_name, device, multicast=False):
        sys.exit(f"peer transport: {reason}")

    with torch.inference_mode():
        ours = {name: with_kernel(name, device) for name in args.kernels}
        ceiling = wire.ceiling(device)
        say(f"ceiling: {ceiling:.0f} GB/s in each direction")
        rows = []
        for dtype in args.dtype:
            for hidden in args.hidden:
                torch._dynamo.reset()  # the hidden size stays a constant of the compiled kernel; the tokens become dynamic
                compiled = torch.compile(rounded_add_norm)
                for tokens in args.tokens:
                    rows += measure(ours, compiled, device, dtype, hidden, tokens, ceiling, args)
    note = "in CUDA graphs; the fused side without copies and with a sharded residual; medians of the slowest rank"
    dtypes = "" if args.dtype == ["bf16"] else "".join(f"-{dtype}" for dtype in args.dtype)
    result_file.write(f"kernel{dtypes}-tp{dist.get_world_size()}", device, note, rows)
    dist.destroy_process_group()


def with_kernel(name, device):
    """A Symmetric with its own tuning ("auto"), or one that uses a kernel for all sizes that the kernel supports."""
    rows = {"one_shot": LEAST_ROWS - 1, "two_shot": 0}
    tuning = None if name == "auto" else Tuning(rows[name], by_rule(dist.get_world_size()).ctas)
    return Symmetric(dist.group.WORLD.group_name, device, multicast=False, timeout_s=30.0, tuning=tuning)


def measure(ours, compiled, device, dtype_name, hidden, tokens, ceiling, args):
    dtype, world, group = DTYPES[dtype_name], dist.get_world_size(), dist.group.WORLD.group_name
    torch.manual_seed(0)
    weight, residual = torch.randn(hidden, device=device).to(dtype), torch.randn(tokens, hidden, device=device).to(dtype)
    torch.manual_seed(1 + dist.get_rank())
    a = torch.randn(tokens, 64, device=device).to(dtype)
    b = torch.randn(64, hidden, device=device).to(dtype) / 8
    x = torch.mm(a, b)
    total = x.float()
    dist.all_reduce(total)
    wanted, _ = add_norm(total, residual, weight, None, *NUMERICS)

    # Zeros, as the sum of zeros in place is zeros again.
    zeros = torch.zeros_like(x)
    sides: dict = {"baseline_us": lambda: compiled(reduced(zeros), residual, weight)}
    if args.torch and dtype is not torch.float16:  # PyTorch 2.11 has no float16 kernels
        symmetric = symm_mem.empty(tokens, hidden, dtype=dtype, device=device).zero_()
        symm_mem.rendezvous(symmetric, group)
        one_shot, two_shot = torch.ops.symm_mem.one_shot_all_reduce, torch.ops.symm_mem.two_shot_all_reduce_
        if tokens <= 1024:
            sides["torch_one_shot_us"] = lambda: compiled(one_shot(symmetric, "sum", group), residual, weight)
        sides["torch_two_shot_us"] = lambda: compiled(two_shot(symmetric, "sum", group), residual, weight)

    kernels = {}
    for name, ctas in itertools.product(ours, args.ctas):
        if name == "one_shot" and tokens >= LEAST_ROWS:
            continue
        kernels[name, ctas] = kernel = ours[name]._call(SLOT, dtype, x.shape).kernel
        in_workspace = ours[name].linear(a, b, None, SLOT)
        given = dict(weight=weight, ctas=ctas, slot=SLOT, fp32_residual=True, sharded_residual=True)
        norm, kept = ours[name].fused(Site(in_workspace, residual, **given), True)
        worst = (norm.float() - wanted).abs().max().item()
        assert worst <= 0.02 * wanted.abs().max().item(), f"{tokens} tokens, {kernel}: wrong by {worst}"  # a wrong kernel is not measured
        sides[name, ctas] = functools.partial(ours[name].fused, Site(in_workspace, kept, **given), True)

    rows = []
    for l2 in args.l2:
        times = times_of(sides, l2, args.samples, device)
        baseline_us = times["baseline_us"]
        torchs = {side: round(us, 2) for side, us in times.items() if side in ("torch_one_shot_us", "torch_two_shot_us")}
        for (name, ctas), kernel in kernels.items():
            us = times[name, ctas]
            # one_shot reads all rows of all peers. two_shot reads and sends its own rows.
            share = 2 / world if kernel == "two_shot" else 1
            gbps = (world - 1) * share * tokens * hidden * dtype.itemsize / us / 1e3
            rows.append(
                {
                    "tokens": tokens, "hidden": hidden, "ranks": world, "dtype": dtype_name, "transport": ours[name].name,
                    "kernel": kernel, "ctas": ctas, "l2": l2, "us": round(us, 2), "baseline_us": round(baseline_us, 2),
                    "ratio": round(us / baseline_us, 3), "gbps": round(gbps, 1), "ceiling_gbps": round(ceiling, 1), **torchs,
                }
            )  # fmt: skip
            shown = ("tokens", "hidden", "dtype", "kernel", "ctas", "l2", "us", "baseline_us", "ratio", "gbps")
            say("  ".join(f"{key} {rows[-1][key]}" for key in shown))
    return rows


def rounded_add_norm(x, residual, weight):
    norm, new_residual = add_norm(x, residual, weight, None, *NUMERICS)
    return norm.to(x.dtype), new_residual.to(x.dtype)


def reduced(x):
    dist.all_reduce(x)
    return x


def say(message):
    if dist.get_rank() == 0:
        print(message, flush=True)


if __name__ == "__main__":
    main()
