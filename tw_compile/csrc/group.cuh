// A group is the threads of a CTA that work on one row. A CTA has kGroups groups; the threads of a group have the same threadIdx.y.
// Each group has its own rows, barriers and shared memory: while it waits for data or for its slowest warp, the SM runs the others.
#pragma once
#include "ptx.cuh"

namespace tw {

template <int kThreads_, int kGroups_>
struct Group {
  static constexpr int kThreads = kThreads_, kGroups = kGroups_;
  static constexpr int kRegisters = 65536 / (kThreads * kGroups) & ~7;  // of a thread, with one CTA on an SM

  static __device__ __forceinline__ u32 index() { return kGroups == 1 ? 0 : ptx::uniform(threadIdx.y); }

  static __device__ __forceinline__ void sync() {
    if constexpr (kGroups == 1) {
      __syncthreads();
    } else {
      ptx::sync_some<kThreads>(1 + index());  // barrier 0 is for __syncthreads
    }
  }

  // The group's own shared memory. bytes: its size in each group
  static __device__ __forceinline__ char* shared_memory(u32 bytes) { return ptx::shared_memory() + index() * bytes; }
};

}  // namespace tw
