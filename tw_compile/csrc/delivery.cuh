// How a group's norms leave for all ranks: by stores, as each thread has them; or row by row out of shared memory, as bulk
// copies, which cost no registers, hardly any instructions, and do not go through the SM's path for loads and stores.
#pragma once
#include "group.cuh"

namespace tw {

//   put    a vector of the row at offset `at` of the workspaces
//   close  this thread has put all that it has of the row
//
// A row is put into one of kPlaces places while those before it leave. The sender lets the group through the first barrier of
// a row's norm when the place is free. It is a warp of its own since waiting for bulk copies is waiting for a thread's cp.async
// too: the hardware counts both in one.
template <class Layout, class Group, class Transport, int kPlaces>
class Delivery {
 public:
  static constexpr int kRowBytes = static_cast<int>(Layout::kRowBytes), kSharedBytes = kPlaces * kRowBytes;

  // shared: kSharedBytes of the group
  __device__ __forceinline__ Delivery(const Transport& transport, char* shared)
      : transport_(transport), shared_(ptx::shared_address(shared)) {}
  __device__ __forceinline__ void put(u64, u64 offset, uint4 vector) {
    ptx::store_shared(place() + static_cast<u32>(offset), vector);
  }
  __device__ __forceinline__ void close() {
    ptx::fence_async();  // before bulk copies of what this thread has put
    Group::tell_sender();
    turn();
  }

  // Of the sender: a row at offset `at`. barriers: those of the group in a row's norm
  __device__ __forceinline__ void send(u64 at, int barriers) {
    ptx::bulk_copies_read<kPlaces - 1>();
    for (int i = 0; i < barriers; ++i) Group::sync();
    Group::wait_until_told();
    if (threadIdx.x % 32 == 0) transport_.send(at, place(), kRowBytes);
    ptx::close_bulk_copies();
    turn();
  }
  // Of the sender: all rows have arrived everywhere.
  __device__ __forceinline__ void finish() { ptx::bulk_copies_arrived(); }

 private:
  __device__ __forceinline__ u32 place() const { return shared_ + turn_ * kRowBytes; }
  __device__ __forceinline__ void turn() { turn_ = turn_ == kPlaces - 1 ? 0 : turn_ + 1; }

  const Transport& transport_;
  const u32 shared_;  // address in shared memory
  u32 turn_ = 0;
};

// By stores.
template <class Layout, class Group, class Transport>
class Delivery<Layout, Group, Transport, 0> {
 public:
  static constexpr int kSharedBytes = 0;

  __device__ __forceinline__ Delivery(const Transport& transport, char*) : transport_(transport) {}
  __device__ __forceinline__ void put(u64 at, u64 offset, uint4 vector) { transport_.store(at + offset, vector); }
  __device__ __forceinline__ void close() {}

 private:
  const Transport& transport_;
};

}  // namespace tw
