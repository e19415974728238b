"""The cost of communication kernels for a GEMM that runs beside them, which loses the SMs that they take, and for the host.

    torchrun --nproc-per-node 8 benchmarks/beside.py

The GEMM is the first one of a Llama 70B's MLP with this number of ranks. It runs alone, and beside kernels on a side stream, without and
with cuBLASLt's SM carveout of as many SMs as a kernel has CTAs. Writes benchmarks/results/beside-tp*.json: one row for each number of CTAs,
with

    tokens, ranks, ctas, gemm_us (alone), beside_us, carveout_us, slowdown (beside_us / gemm_us - 1), carveout_slowdown,
    share (of the SMs that the CTAs take), comm_us (a kernel alone), comm_beside_us

``host_us`` has the host's microseconds for a start and a wait, called as a compiled graph calls them. ``driver_us`` is the part of the
CUDA driver.
"""

import argparse
import os

import result_file
import timing
import torch
import torch.distributed as dist

from tw_compile.ops import direct
from tw_compile.site import Site
from tw_compile.transports import choose

HIDDEN, INTERMEDIATE = 8192, 28672
GEMMS, KERNELS, SAMPLES, SLOT = 8, 16, 9, 0


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--ctas", type=int, nargs="+", default=[4, 8, 16])
    args = parser.parse_args()
    rank = int(os.environ["LOCAL_RANK"])
    torch.cuda.set_device(rank)
    device = torch.device("cuda", rank)
    dist.init_process_group("nccl", device_id=device)
    with torch.inference_mode():
        group = dist.group.WORLD.group_name
        peer, _ = choose.choose("peer", group, device, timeout_s=30)
        rows = [measure(peer, device, args.tokens, ctas) for ctas in args.ctas]
        host_us, driver_us = times_of_host(peer, device, group)
    if dist.get_rank() == 0:
        for row in rows:
            print("  ".join(f"{key} {value}" for key, value in row.items()))
        print(f"host: {host_us:.2f} µs for a start and a wait, of which the driver {driver_us:.2f}")
    name, note = f"beside-tp{dist.get_world_size()}", "medians of the slowest rank, without CUDA graphs"
    result_file.write(name, device, note, rows, host_us=round(host_us, 2), driver_us=round(driver_us, 2))
    dist.destroy_process_group()


def measure(peer, device, tokens, ctas):
    world, sms = dist.get_world_size(), torch.cuda.get_device_properties(device).multi_processor_count
    x = torch.randn(tokens, HIDDEN, device=device, dtype=torch.bfloat16)
    weight = torch.randn(HIDDEN, 2 * INTERMEDIATE // world, device=device, dtype=torch.bfloat16)
    out = torch.mm(x, weight)
    partials = peer.linear(x[:, :64], torch.randn(64, HIDDEN, device=device, dtype=torch.bfloat16), None, SLOT)
    side = torch.cuda.Stream(device, priority=-1)  # like the stream of Symmetric

    def gemms(calls):
        for _ in range(calls):
            torch.mm(x, weight, out=out)

    def kernels(calls):
        for _ in range(calls):
            peer.fused(Site(partials, ctas=ctas, slot=SLOT, fp32_residual=True, sharded_residual=True), True)

    def times(gemm_calls, kernel_calls):
        """(microseconds of a GEMM, microseconds of a kernel) while both run."""
        gemm, kernel = timing.times_beside(lambda: gemms(gemm_calls), lambda: kernels(kernel_calls), side, device, SAMPLES)
        return gemm / max(gemm_calls, 1), kernel / max(kernel_calls, 1)

    gemm_us, comm_us = times(GEMMS, 0)[0], times(0, KERNELS)[1]
    enough_kernels, enough_gemms = 2 * int(GEMMS * gemm_us / comm_us) + 2, 2 * int(KERNELS * comm_us / gemm_us) + 2
    beside_us, comm_beside_us = times(GEMMS, enough_kernels)[0], times(enough_gemms, KERNELS)[1]
    torch.backends.cuda.preferred_blas_library("cublaslt")
    torch._C._set_sm_carveout_experimental(ctas)
    carveout_us = times(GEMMS, enough_kernels)[0]
    torch._C._set_sm_carveout_experimental(None)
    torch.backends.cuda.preferred_blas_library("default")
    return {
        "tokens": tokens, "ranks": world, "ctas": ctas, "gemm_us": round(gemm_us, 1), "beside_us": round(beside_us, 1),
        "carveout_us": round(carveout_us, 1),
        "slowdown": round(beside_us / gemm_us - 1, 4), "carveout_slowdown": round(carveout_us / gemm_us - 1, 4),
        "share": round(ctas / sms, 4), "comm_us": round(comm_us, 1), "comm_beside_us": round(comm_beside_us, 1),
    }  # fmt: skip


def times_of_host(peer, device, group):
    """(the host's microseconds for a start and a wait, the driver's part), with one token, so that the GPU keeps up with the host."""
    x = torch.zeros(1, HIDDEN, device=device, dtype=torch.bfloat16)
    weight = torch.ones(HIDDEN, device=device, dtype=torch.bfloat16)

    def pair():
        direct.start((x, None, weight, None, None, 1e-5, 1.0, 0.0, False, 0, SLOT, 0, True, True, "", None), group, "peer")
        direct.wait(x, SLOT, True, group, "peer")

    peer.start(Site(x, weight=weight, slot=1 - SLOT, fp32_residual=True, sharded_residual=True))  # as for the other half
    pair()
    call = peer._call(SLOT, x.dtype, x.shape)
    launch, _ = call.launch(False, "", 0, call.ctas)
    current, calls, done = peer._current(), peer._host, call.done

    def driver():
        calls.start(launch, current)
        calls.wait(current, done)

    times = timing.host_time(pair, device), timing.host_time(driver, device)
    peer.wait(1 - SLOT, True)
    return times


if __name__ == "__main__":
    main()
