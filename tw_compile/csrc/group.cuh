// The threads of a CTA that work on one row. A CTA has kGroups of them, as rows of threadIdx, each with rows, barriers and
// shared memory of its own: while one waits for its data or for its slowest warp, the SM has the others' work. Behind its
// kThreads threads a group may have a warp that sends its rows (delivery.cuh).
#pragma once
#include "ptx.cuh"

namespace tw {

template <int kThreads_, int kGroups_, bool kHasSender_>
struct Group {
  static constexpr int kThreads = kThreads_, kGroups = kGroups_;
  static constexpr bool kHasSender = kHasSender_;
  static constexpr int kWidth = kThreads + 32 * kHasSender;           // threads
  static constexpr int kRegisters = 65536 / (kWidth * kGroups) & ~7;  // of a thread: one CTA has the SM's

  static __device__ __forceinline__ u32 index() { return kGroups == 1 ? 0 : ptx::uniform(threadIdx.y); }
  static __device__ __forceinline__ bool is_sender() { return kHasSender && ptx::uniform(threadIdx.x) >= kThreads; }

  // All threads, the sender's with them.
  static __device__ __forceinline__ void sync() {
    if constexpr (kGroups == 1 && !kHasSender) {
      __syncthreads();
    } else {
      ptx::sync_some<kWidth>(1 + index());  // 0 is that of __syncthreads
    }
  }
  // The sender waits until all other threads have told it; these go on.
  static __device__ __forceinline__ void tell_sender() { ptx::arrive_some<kWidth>(1 + kGroups + index()); }
  static __device__ __forceinline__ void wait_until_told() { ptx::sync_some<kWidth>(1 + kGroups + index()); }

  // bytes: of each group
  static __device__ __forceinline__ char* shared_memory(u32 bytes) { return ptx::shared_memory() + index() * bytes; }
};

}  // namespace tw
