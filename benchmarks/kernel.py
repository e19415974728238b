"""All-reduce, residual add, RMSNorm: the fused kernel against NCCL or torch's symmetric memory and Inductor's add and norm.

    torchrun --nproc-per-node 8 benchmarks/kernel.py --tokens 1 16 64 256 1024 4096 --hidden 8192 --ctas 8 16

All sides run in one process, each as a CUDA graph of several calls; a time is the median over replays of the slowest rank.
The ceiling is what a kernel reaches that moves the same bytes in the same pattern and does nothing else. Our side has its
input where the GEMM before it would write it, and keeps the residual sharded and in float32, as in a compiled model.

Writes benchmarks/results/kernel-*.json, one row for each size and number of CTAs, with

    tokens, hidden, ranks, dtype, transport, ctas, l2, us, baseline_us (NCCL and add+norm), ratio (us over baseline_us),
    gbps (bytes over NVLink, in each direction, a second), ceiling_gbps, torch_one_shot_us, torch_two_shot_us
"""

import argparse
import ctypes
import json
import os
import statistics
import sys
from datetime import date
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory as symm_mem

from tw_compile.ops import nvrtc
from tw_compile.ops.reference import add_norm
from tw_compile.ops.symmetric import TWO_SHOT_ROWS, Symmetric, own_rows

HERE = Path(__file__).parent
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
CALLS = 10  # in a CUDA graph
SLOT = 2
NUMERICS = None, 1e-5, 1.0, 0.0, False  # shift, eps, scale, offset, center

# Every rank reads its own part of each peer's buffer and writes there: the traffic of a two-shot call, and nothing else.
CEILING = r"""
#include "ptx.cuh"
struct Buffers { char* part[TW_WORLD]; u64 bytes; };  // this rank's part, on this rank and from there on round
extern "C" __global__ void __launch_bounds__(512, 1) ceiling(const __grid_constant__ Buffers buffers) {
  constexpr int kPeers = TW_WORLD - 1, kUnroll = TW_WORLD > 4 ? 2 : 4;
  const u64 wide = gridDim.x * 512 * 16ull;
  for (u64 at = (blockIdx.x * 512 + threadIdx.x) * 16ull; at + (kUnroll - 1) * wide < buffers.bytes; at += kUnroll * wide) {
    uint4 v[kUnroll][kPeers];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u)
#pragma unroll
      for (int p = 0; p < kPeers; ++p) v[u][p] = ptx::load_sys(buffers.part[p + 1] + at + u * wide);
#pragma unroll
    for (int u = 0; u < kUnroll; ++u)
#pragma unroll
      for (int p = 0; p < kPeers; ++p) ptx::store_sys(buffers.part[p + 1] + at + u * wide, v[u][p]);
  }
}
"""


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 4, 16, 64, 256, 1024, 2048, 4096, 16384, 32768])
    parser.add_argument("--hidden", type=int, nargs="+", default=[8192])
    parser.add_argument("--dtype", choices=DTYPES, nargs="+", default=["bf16"])
    parser.add_argument("--ctas", type=int, nargs="+", default=[4, 8, 16, 32], help="0: as many as the kernel takes by itself")
    parser.add_argument("--l2", choices=("warm", "cold"), nargs="+", default=["warm"], help="is the input in L2 before a call")
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
        ours = Symmetric(dist.group.WORLD.group_name, device, multicast=False, timeout_s=30.0)
        ceiling = measure_ceiling(device)
        say(f"ceiling: {ceiling:.0f} GB/s in each direction")
        rows = []
        for dtype in args.dtype:
            for hidden in args.hidden:
                torch._dynamo.reset()  # the hidden size stays a constant of the compiled kernel; the tokens become dynamic
                compiled = torch.compile(rounded_add_norm)
                for tokens in args.tokens:
                    rows += measure(ours, compiled, device, dtype, hidden, tokens, ceiling, args)
    if dist.get_rank() == 0:
        write(rows, device)
    dist.destroy_process_group()


def measure(ours, compiled, device, dtype_name, hidden, tokens, ceiling, args):
    dtype, world, group = DTYPES[dtype_name], dist.get_world_size(), dist.group.WORLD.group_name
    torch.manual_seed(0)
    weight, residual = torch.randn(hidden, device=device).to(dtype), torch.randn(tokens, hidden, device=device).to(dtype)
    torch.manual_seed(1 + dist.get_rank())
    a = torch.randn(tokens, 64, device=device).to(dtype)
    b = torch.randn(64, hidden, device=device).to(dtype) / 8
    x = torch.mm(a, b)
    in_workspace = ours.linear(a, b, None, SLOT)

    def fused(residual, ctas):
        return ours.fused(in_workspace, residual, weight, None, *NUMERICS, ctas, SLOT, 0, True, True, True)

    # Right before fast.
    total = x.float()
    dist.all_reduce(total)
    wanted, wanted_residual = add_norm(total, residual, weight, None, *NUMERICS)
    norm, kept = fused(residual, args.ctas[0])
    own = slice(*own_rows(dist.get_rank(), world, tokens)) if tokens >= TWO_SHOT_ROWS else slice(0, tokens)
    wanted_residual = wanted_residual[own]
    for got, exact in ((norm, wanted), (kept[: len(wanted_residual)], wanted_residual)):
        worst = (got.float() - exact).abs().max().item() if got.numel() else 0.0
        assert worst <= 0.02 * exact.abs().max().item(), f"{tokens} tokens: wrong by {worst}"

    # Zeros stay zeros, however often they are summed in place.
    zeros = torch.zeros_like(x)
    sides = {"baseline_us": lambda: compiled(reduced(zeros), residual, weight)}
    if args.torch:
        symmetric = symm_mem.empty(tokens, hidden, dtype=dtype, device=device).zero_()
        symm_mem.rendezvous(symmetric, group)
        one_shot, two_shot = torch.ops.symm_mem.one_shot_all_reduce, torch.ops.symm_mem.two_shot_all_reduce_
        if tokens <= 1024:
            sides["torch_one_shot_us"] = lambda: compiled(one_shot(symmetric, "sum", group), residual, weight)
        sides["torch_two_shot_us"] = lambda: compiled(two_shot(symmetric, "sum", group), residual, weight)

    rows = []
    for l2 in args.l2:
        times = {name: time_of(run, l2, args.samples, device) for name, run in sides.items()}
        for ctas in args.ctas:
            us = time_of(lambda: fused(kept, ctas), l2, args.samples, device)
            # One-shot reads all rows of all peers; two-shot its own rows, and sends them.
            share = 1 if tokens < TWO_SHOT_ROWS else 2 / world
            gbps = (world - 1) * share * tokens * hidden * dtype.itemsize / us / 1e3
            rows.append(
                {
                    "tokens": tokens, "hidden": hidden, "ranks": world, "dtype": dtype_name, "transport": ours.name,
                    "ctas": ctas, "l2": l2, "us": round(us, 2), "baseline_us": round(times["baseline_us"], 2),
                    "ratio": round(us / times["baseline_us"], 3), "gbps": round(gbps, 1), "ceiling_gbps": round(ceiling, 1),
                    **{name: round(t, 2) for name, t in times.items() if name != "baseline_us"},
                }
            )  # fmt: skip
            say("  ".join(f"{key} {value}" for key, value in rows[-1].items() if key not in ("ranks", "transport", "ceiling_gbps")))
    return rows


def rounded_add_norm(x, residual, weight):
    norm, new_residual = add_norm(x, residual, weight, None, *NUMERICS)
    return norm.to(x.dtype), new_residual.to(x.dtype)


def reduced(x):
    dist.all_reduce(x)
    return x


def time_of(run, l2, samples, device):
    """Microseconds of one call: the median over replays of a graph of CALLS calls, on the slowest rank."""
    if l2 == "warm":
        return replay_time(lambda: run(), samples, device)
    flush = torch.empty(256 << 20, dtype=torch.uint8, device=device)  # several times the L2

    def flushed_run():
        flush.zero_()
        run()

    return replay_time(flushed_run, samples, device) - replay_time(flush.zero_, samples, device)


def replay_time(run, samples, device):
    for _ in range(3):
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(CALLS):
            run()
    align = torch.zeros(1, device=device)
    taken = []
    for sample in range(-3, samples):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        dist.all_reduce(align)  # the ranks begin together
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        if sample >= 0:
            taken.append(begin.elapsed_time(end) / CALLS * 1e3)
    slowest = torch.tensor(statistics.median(taken), device=device)
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    return slowest.item()


def measure_ceiling(device):
    """GB/s in each direction of reads and writes together, at the best number of CTAs."""
    rank, world, part = dist.get_rank(), dist.get_world_size(), 16 << 20
    memory = symm_mem.empty(world * part, dtype=torch.uint8, device=device).zero_()
    handle = symm_mem.rendezvous(memory, dist.group.WORLD.group_name)
    mine = memory.data_ptr() - handle.buffer_ptrs[rank] + rank * part
    arch = nvrtc.architecture(torch.cuda.get_device_capability(device))
    image, _ = nvrtc.compile_source(CEILING.encode(), "ceiling.cu", nvrtc.options(arch, {"TW_WORLD": world}))
    kernel = nvrtc.Kernel(image, "ceiling", threads=512, shared_bytes=0)
    buffers = (ctypes.c_uint64 * (world + 1))(*(handle.buffer_ptrs[(rank + i) % world] + mine for i in range(world)), part)
    arguments = (ctypes.c_void_p * 1)(ctypes.addressof(buffers))
    best = 0.0
    for ctas in (8, 16, 32, 64):

        def run():
            kernel.launch(ctas, torch.cuda.current_stream().cuda_stream, ctypes.addressof(arguments))

        # Reads from each peer, and each peer's reads from here; writes likewise.
        best = max(best, 2 * (world - 1) * part / replay_time(run, 7, device) / 1e3)
    return best


def say(message):
    if dist.get_rank() == 0:
        print(message, flush=True)


def write(rows, device):
    result = {
        "machine": {"gpu": torch.cuda.get_device_name(device), "gpus": dist.get_world_size()},
        "versions": {"torch": torch.__version__, "cuda": torch.version.cuda, "nccl": ".".join(map(str, torch.cuda.nccl.version()))},
        "date": date.today().isoformat(),
        "command": "torchrun benchmarks/kernel.py " + " ".join(sys.argv[1:]),
        "note": "in CUDA graphs; the fused side without copies and with a sharded residual; medians of the slowest rank",
        "rows": rows,
    }
    folder = HERE / "results"
    folder.mkdir(exist_ok=True)
    path = folder / f"kernel-tp{dist.get_world_size()}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    print("wrote", path.relative_to(HERE.parent))


if __name__ == "__main__":
    main()
