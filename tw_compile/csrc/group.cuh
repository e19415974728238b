// The threads of a CTA that work on one row. A CTA has kGroups of them, as rows of threadIdx, each with rows, barriers and
// shared memory of its own: while one waits for its data or for its slowest warp, the SM has the others' work.
#pragma once
#include "ptx.cuh"

namespace tw {

template <int kThreads_, int kGroups_>
struct Group {
  static constexpr int kThreads = kThreads_, kGroups = kGroups_;
  static constexpr int kRegisters = 65536 / (kThreads * kGroups) & ~7;  // of a thread: one CTA has the SM's

  static __device__ __forceinline__ u32 index() { return kGroups == 1 ? 0 : ptx::uniform(threadIdx.y); }

  static __device__ __forceinline__ void sync() {
    if constexpr (kGroups == 1) {
      __syncthreads();
    } else {
      ptx::sync_some<kThreads>(1 + index());  // 0 is that of __syncthreads
    }
  }

  // bytes: of each group
  static __device__ __forceinline__ char* shared_memory(u32 bytes) { return ptx::shared_memory() + index() * bytes; }
};

}  // namespace tw
