// How a vector is fetched from all ranks and delivered to all ranks. The two transports have two functions, and differ in
// nothing else: every other line of a kernel over Multimem also runs over Peer.
//
//   load_reduce(at)    the 16 bytes at this offset of every rank's workspace: kParts vectors whose sum, in float32, is the
//                      sum over the ranks. Returns without waiting for the data
//   store(at, vector)  to this offset of every rank's workspace
#pragma once
#include "element.cuh"
#include "site.cuh"

namespace tw {

// Through a pointer to each rank's memory. The parts come in the order of Site::workspace.
template <class Element_, int kWorld>
struct Peer {
  using Element = Element_;
  static constexpr int kParts = kWorld;
  static constexpr bool kAliases = false;  // reads the workspace through another address than the one it was written at

  const Site<kWorld>& site;

  __device__ __forceinline__ void load_reduce(uint4 (&parts)[kParts], u64 at) const {
#pragma unroll
    for (int i = 0; i < kWorld; ++i) parts[i] = ptx::load_sys(site.workspace[i] + at);
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
  static constexpr int kParts = 1;
  static constexpr bool kAliases = true;

  const Site<kWorld>& site;

  __device__ __forceinline__ void load_reduce(uint4 (&parts)[kParts], u64 at) const {
    parts[0] = Element::multimem_load_add(site.multicast + at);
  }
  __device__ __forceinline__ void store(u64 at, uint4 vector) const { ptx::multimem_store(site.multicast + at, vector); }
};

}  // namespace tw
