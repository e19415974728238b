// How a group's norms leave for all ranks: by stores, as each thread has them, or row by row out of shared memory, as bulk
// copies. A bulk copy costs no instructions and no registers, and does not go through the SM's path for loads and stores.
//
//   make_room   before the group's last barrier ahead of a row's put
//   put         a vector of the row
//   send        the row is put: it may leave. at: its offset in the workspaces
//   finish      all rows have arrived everywhere, as far as this thread has sent them
#pragma once
#include "group.cuh"

namespace tw {

template <class Layout, class Group, class Transport>
class Stores {
 public:
  static constexpr int kSharedBytes = 0;

  __device__ __forceinline__ Stores(const Transport& transport, char*) : transport_(transport) {}
  __device__ __forceinline__ void make_room() {}
  __device__ __forceinline__ void put(u64 at, u64 offset, uint4 vector) { transport_.store(at + offset, vector); }
  __device__ __forceinline__ void send(u64) {}
  __device__ __forceinline__ void finish() {}

 private:
  const Transport& transport_;
};

// A row is put into one of two places while the other one leaves. The first thread sends, and waits for what it has sent.
template <class Layout, class Group, class Transport>
class BulkCopies {
 public:
  static constexpr int kRowBytes = static_cast<int>(Layout::kRowBytes), kSharedBytes = 2 * kRowBytes;

  // shared: kSharedBytes of the group
  __device__ __forceinline__ BulkCopies(const Transport& transport, char* shared)
      : transport_(transport), shared_(ptx::shared_address(shared)) {}
  __device__ __forceinline__ void make_room() {
    if (threadIdx.x == 0) ptx::bulk_copies_read<1>();  // the row before the last has left
  }
  __device__ __forceinline__ void put(u64, u64 offset, uint4 vector) {
    ptx::store_shared(place() + static_cast<u32>(offset), vector);
  }
  __device__ __forceinline__ void send(u64 at) {
    ptx::fence_async();  // what this thread has put, before copies of it
    Group::sync();
    if (threadIdx.x == 0) {
      transport_.send(at, place(), kRowBytes);
      ptx::close_bulk_copies();
    }
    second_ ^= 1;
  }
  __device__ __forceinline__ void finish() {
    if (threadIdx.x == 0) ptx::bulk_copies_arrived();
  }

 private:
  __device__ __forceinline__ u32 place() const { return shared_ + second_ * kRowBytes; }

  const Transport& transport_;
  const u32 shared_;  // address in shared memory
  u32 second_ = 0;
};

}  // namespace tw
