// How a vector is fetched from all ranks and delivered to all ranks. The two transports have two functions, and differ in
// nothing else: every other line of a kernel over Multimem also runs over Peer.
//
//   load_reduce(pending, places, at)  begins to fetch the 16 bytes at this offset of every rank's workspace, into registers
//                                     (pending) or kPlaces places of this thread in shared memory
//   total(pending, places, sum)       ends it, when copies have arrived: the sum over the ranks, in float32
//   store(at, vector)                 to this offset of every rank's workspace
#pragma once
#include "element.cuh"
#include "site.cuh"

namespace tw {

// 16 bytes each in shared memory, for one thread, which are kThreads places apart.
template <int kThreads>
struct Places {
  u32 first;  // address in shared memory

  __device__ __forceinline__ Places from(int place) const { return {first + place * (kThreads * 16)}; }
  __device__ __forceinline__ void copy_here(const void* p) const { ptx::copy_async(first, p); }
  __device__ __forceinline__ uint4 get() const { return ptx::load_shared(first); }
};

// Through a pointer to each rank's memory. The parts are added in rank order.
template <class Element_, int kWorld>
struct Peer {
  using Element = Element_;
  static constexpr int kPlaces = kWorld;
  static constexpr bool kAliases = false;  // reads the workspace through another address than the one it was written at

  const Site<kWorld>& site;
  int place_of_rank[kWorld];  // the parts land in the order of Site::workspace

  struct Pending {};

  __device__ __forceinline__ explicit Peer(const Site<kWorld>& site) : site(site) {
#pragma unroll
    for (int rank = 0; rank < kWorld; ++rank) {
      const int turned = rank - static_cast<int>(site.rank);
      place_of_rank[rank] = turned < 0 ? turned + kWorld : turned;
    }
  }

  template <class Places>
  __device__ __forceinline__ void load_reduce(Pending&, Places places, u64 at) const {
#pragma unroll
    for (int i = 0; i < kWorld; ++i) places.from(i).copy_here(site.workspace[i] + at);
  }
  template <class Places>
  __device__ __forceinline__ void total(const Pending&, Places places, float (&sum)[Element::kVector]) const {
    Element::unpack(places.from(place_of_rank[0]).get(), sum);
#pragma unroll
    for (int rank = 1; rank < kWorld; ++rank) {
      float part[Element::kVector];
      Element::unpack(places.from(place_of_rank[rank]).get(), part);
#pragma unroll
      for (int i = 0; i < Element::kVector; ++i) sum[i] = __fadd_rn(sum[i], part[i]);
    }
  }
  __device__ __forceinline__ void store(u64 at, uint4 vector) const {
#pragma unroll
    for (int i = 0; i < kWorld; ++i) ptx::store_sys(site.workspace[i] + at, vector);
  }
};

// Through the switch, which adds in float32 and rounds the sum to the element type; the order of its additions is its own.
template <class Element_, int kWorld>
struct Multimem {
  using Element = Element_;
  static constexpr int kPlaces = 0;
  static constexpr bool kAliases = true;

  const Site<kWorld>& site;

  struct Pending {
    uint4 sum;
  };

  __device__ __forceinline__ explicit Multimem(const Site<kWorld>& site) : site(site) {}

  template <class Places>
  __device__ __forceinline__ void load_reduce(Pending& pending, Places, u64 at) const {
    pending.sum = Element::multimem_load_add(site.multicast + at);
  }
  template <class Places>
  __device__ __forceinline__ void total(const Pending& pending, Places, float (&sum)[Element::kVector]) const {
    Element::unpack(pending.sum, sum);
  }
  __device__ __forceinline__ void store(u64 at, uint4 vector) const { ptx::multimem_store(site.multicast + at, vector); }
};

}  // namespace tw
