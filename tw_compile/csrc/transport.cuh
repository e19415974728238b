// The transports: how a vector is loaded from all ranks and stored to all ranks. All other code is the same for both transports.
//
//   load_reduce   begins to load the 16 bytes at an offset in each rank's workspace, as one sum (Pending), or into kPlaces places of
//                 this thread
//   load_own      loads the 16 bytes on this GPU, unless load_reduce includes them
//   total         returns the sum over the ranks in float32, after both have arrived
//   store         stores a vector at an offset in each rank's workspace
#pragma once
#include "element.cuh"
#include "site.cuh"

namespace tw {

// The places of a thread, each of which receives a copy of 16 bytes. In shared memory they are kThreads * 16 bytes apart, and valid after
// copies_arrived. This is for copies that take long.
template <int kThreads>
struct SharedPlaces {
  u32 first;  // address in shared memory

  __device__ __forceinline__ SharedPlaces from(int place) const { return {first + place * (kThreads * 16)}; }
  __device__ __forceinline__ void copy_here(const void* p) const { ptx::copy_async(first, p); }
  __device__ __forceinline__ uint4 get() const { return ptx::load_shared(first); }
};

// Places in registers, which are faster if there are few.
struct RegisterPlaces {
  uint4* first;  // element of a local array, with constant indices only

  __device__ __forceinline__ RegisterPlaces from(int place) const { return {first + place}; }
  __device__ __forceinline__ void copy_here(const void* p) const { *first = ptx::load_sys(p); }
  __device__ __forceinline__ uint4 get() const { return *first; }
};

// Loads and stores through a pointer to each rank's memory. The parts are added in rank order.
template <class Element_, int kWorld, int kRank>
struct Peer {
  using Element = Element_;
  static constexpr int kPlaces = kWorld - 1;
  static constexpr bool kAliases = false;  // whether the workspace is read at another address than it was written at

  const Site<kWorld>& site;

  struct Pending {};
  using Own = uint4;

  template <class Places>
  __device__ __forceinline__ void load_reduce(Pending&, Places places, u64 at) const {
#pragma unroll
    for (int i = 1; i < kWorld; ++i) places.from(i - 1).copy_here(site.workspace[i] + at);
  }
  __device__ __forceinline__ void load_own(Own& own, u64 at) const { own = ptx::load_sys(site.workspace[0] + at); }

  template <class Places>
  __device__ __forceinline__ void total(const Pending&, Own own, Places places, float (&sum)[Element::kVector]) const {
#pragma unroll
    for (int rank = 0; rank < kWorld; ++rank) {
      const int turned = (rank - kRank + kWorld) % kWorld;  // index as in Site::workspace
      float part[Element::kVector];
      Element::unpack(turned == 0 ? own : places.from(turned - 1).get(), part);
#pragma unroll
      for (int i = 0; i < Element::kVector; ++i) sum[i] = rank == 0 ? part[i] : __fadd_rn(sum[i], part[i]);
    }
  }
  template <class Vector>
  __device__ __forceinline__ void store(u64 at, Vector vector) const {
#pragma unroll
    for (int i = 0; i < kWorld; ++i) ptx::store_sys(site.workspace[i] + at, vector);
  }
};

// Loads and stores through the switch. It adds in float32, in an order of its own, and rounds the sum to the element type.
template <class Element_, int kWorld, int kRank>
struct Multimem {
  using Element = Element_;
  static constexpr int kPlaces = 0;
  static constexpr bool kAliases = true;

  const Site<kWorld>& site;

  struct Pending {
    uint4 sum;
  };
  struct Own {};

  template <class Places>
  __device__ __forceinline__ void load_reduce(Pending& pending, Places, u64 at) const {
    pending.sum = Element::multimem_load_add(site.multicast + at);
  }
  __device__ __forceinline__ void load_own(Own&, u64) const {}

  template <class Places>
  __device__ __forceinline__ void total(const Pending& pending, Own, Places, float (&sum)[Element::kVector]) const {
    Element::unpack(pending.sum, sum);
  }
  template <class Vector>
  __device__ __forceinline__ void store(u64 at, Vector vector) const {
    ptx::multimem_store(site.multicast + at, vector);
  }
};

}  // namespace tw
