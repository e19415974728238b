"""The throughput of NVLink by the kind of copy and the number of CTAs: the ceiling of the fused kernels.

    torchrun --nproc-per-node 8 benchmarks/wire.py

Each rank reads its own part of each peer's buffer and writes it there. This is the traffic of a two_shot call without its arithmetic. The
ways are

    registers   16-byte loads and stores of 512 threads, with as many in flight as the registers can hold
    cp.async    16-byte copies into shared memory by each thread, and stores from there, as in two_shot.cuh
    bulk        8 KB bulk copies in both directions with mbarriers, issued by one thread

Writes benchmarks/results/wire-tp*.json, one row for each way and number of CTAs, with ``ranks, way, ctas, gbps``. gbps: GB/s in each
direction, reads and writes together
"""

import ctypes
import os

import result_file
import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory as symm_mem
from timing import times_of

from tw_compile.transports.symmetric import host, nvrtc

PART = 16 << 20  # bytes of each peer
WAYS = ("registers", "cp.async", "bulk")
PIECE, PIECES = 8192, 24  # bytes of a bulk copy; copies in flight in a CTA

SOURCE = r"""
#include "ptx.cuh"
constexpr int kPeers = TW_WORLD - 1;
struct Buffers { char* part[TW_WORLD]; u64 bytes; };  // this rank's part, on this rank and from there on round

extern "C" __global__ void __launch_bounds__(512, 1) registers(const __grid_constant__ Buffers buffers) {
  constexpr int kUnroll = TW_WORLD > 4 ? 2 : 4;
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

extern "C" __global__ void __launch_bounds__(512, 1) cp_async(const __grid_constant__ Buffers buffers) {
  constexpr int kSteps = 24 / kPeers;  // of 8 KB for each peer, in flight
  const u32 here = ptx::shared_address(ptx::shared_memory()) + threadIdx.x * 16;
  const u64 wide = gridDim.x * 512 * 16ull, first = (blockIdx.x * 512 + threadIdx.x) * 16ull;
  const auto fetch = [&](u64 at, int step) {
    if (at < buffers.bytes) {
#pragma unroll
      for (int p = 0; p < kPeers; ++p) ptx::copy_async(here + (step * kPeers + p) * 8192, buffers.part[p + 1] + at);
    }
    ptx::close_copies();
  };
  for (int step = 0; step < kSteps; ++step) fetch(first + step * wide, step);
  int step = 0;
  for (u64 at = first; at < buffers.bytes; at += wide) {
    ptx::copies_arrived<kSteps - 1>();
#pragma unroll
    for (int p = 0; p < kPeers; ++p)
      ptx::store_sys(buffers.part[p + 1] + at, ptx::load_shared(here + (step * kPeers + p) * 8192));
    fetch(at + kSteps * wide, step);
    step = step + 1 == kSteps ? 0 : step + 1;
  }
}

extern "C" __global__ void __launch_bounds__(32, 1) bulk(const __grid_constant__ Buffers buffers) {
  __shared__ u64 full[TW_PIECES];
  if (threadIdx.x != 0) return;
  char* here = ptx::shared_memory();
  for (int i = 0; i < TW_PIECES; ++i) asm volatile("mbarrier.init.shared.b64 [%0], 1;" :: "r"(ptx::shared_address(full + i)));
  asm volatile("fence.mbarrier_init.release.cluster; fence.proxy.async;" ::: "memory");

  const u64 pieces = buffers.bytes / TW_PIECE * kPeers;  // piece n goes to peer n % kPeers
  const auto place = [&](u64 n) { return buffers.part[n % kPeers + 1] + n / kPeers * TW_PIECE; };
  const auto fetch = [&](u64 n, int i) {
    if (n >= pieces) return;
    asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" :: "r"(ptx::shared_address(full + i)), "r"(TW_PIECE) : "memory");
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
                 :: "r"(ptx::shared_address(here + i * TW_PIECE)), "l"(place(n)), "r"(TW_PIECE),
                    "r"(ptx::shared_address(full + i)) : "memory");
  };
  for (int i = 0; i < TW_PIECES; ++i) fetch(blockIdx.x + i * static_cast<u64>(gridDim.x), i);
  int i = 0;
  u32 phase = 0;
  for (u64 n = blockIdx.x; n < pieces; n += gridDim.x) {
    u32 arrived = 0;
    while (!arrived)
      asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.shared.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
                   : "=r"(arrived) : "r"(ptx::shared_address(full + i)), "r"(phase) : "memory");
    asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2; cp.async.bulk.commit_group;"
                 :: "l"(place(n)), "r"(ptx::shared_address(here + i * TW_PIECE)), "r"(TW_PIECE) : "memory");
    // The piece stored one step ago has left shared memory, and its place can be filled again.
    asm volatile("cp.async.bulk.wait_group.read 1;" ::: "memory");
    if (n >= gridDim.x) fetch(n + (TW_PIECES - 1) * static_cast<u64>(gridDim.x), i == 0 ? TW_PIECES - 1 : i - 1);
    if (++i == TW_PIECES) i = 0, phase ^= 1;
  }
  asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
}
"""


def main():
    rank = int(os.environ["LOCAL_RANK"])
    torch.cuda.set_device(rank)
    device = torch.device("cuda", rank)
    dist.init_process_group("nccl", device_id=device)
    rows = measure(device)
    if dist.get_rank() == 0:
        for row in rows:
            print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
    note = "GB/s of each rank in each direction, reads and writes together, on all ranks at once; medians of the slowest rank"
    result_file.write(f"wire-tp{dist.get_world_size()}", device, note, rows)
    dist.destroy_process_group()


def measure(device, ways=WAYS, all_ctas=(2, 4, 8, 16, 32, 64)) -> list[dict]:
    rank, world = dist.get_rank(), dist.get_world_size()
    memory = symm_mem.empty(world * PART, dtype=torch.uint8, device=device).zero_()
    handle = symm_mem.rendezvous(memory, dist.group.WORLD.group_name)
    mine = memory.data_ptr() - handle.buffer_ptrs[rank] + rank * PART
    buffers = (ctypes.c_uint64 * (world + 1))(*(handle.buffer_ptrs[(rank + i) % world] + mine for i in range(world)), PART)
    arch = nvrtc.architecture(torch.cuda.get_device_capability(device))
    macros = {"TW_WORLD": world, "TW_PIECE": PIECE, "TW_PIECES": PIECES}
    image, _ = nvrtc.compile_source(SOURCE.encode(), "wire.cu", nvrtc.options(arch, macros))
    rows = []
    for way in ways:
        name, threads, shared = way.replace(".", "_"), 32 if way == "bulk" else 512, 0 if way == "registers" else PIECE * PIECES
        kernel = nvrtc.Kernel(image, name, (threads, 1), shared)
        for ctas in all_ctas:
            launch = kernel.packed(ctas, ctypes.addressof(buffers))

            def run(launch=launch):
                host.calls().launch(launch, torch.cuda.current_stream().cuda_stream)

            # In each direction: this rank's reads and the peers' writes, or the peers' reads and this rank's writes.
            us = times_of({"": run}, "warm", 7, device)[""]
            rows.append({"ranks": world, "way": way, "ctas": ctas, "gbps": round(2 * (world - 1) * PART / us / 1e3, 1)})
    return rows


def ceiling(device) -> float:
    """GB/s in each direction, reads and writes together, with the best number of CTAs."""
    return max(row["gbps"] for row in measure(device, ("registers", "cp.async"), (8, 16, 32, 64)))


if __name__ == "__main__":
    main()
