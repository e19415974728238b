// How a row is divided into vectors and chunks among the threads of a group; and a thread's data: what it loads from other ranks, and
// what it loads from this GPU into registers.
#pragma once
#include "transport.cuh"

namespace tw {

// A row has kChunks chunks. In a chunk each thread has kUnroll vectors, and neighbouring threads have neighbouring vectors.
template <class Element_, int kHidden_, int kThreads_, int kUnroll_, int kChunks_>
struct Layout {
  using Element = Element_;
  static constexpr int kHidden = kHidden_, kThreads = kThreads_, kUnroll = kUnroll_, kChunks = kChunks_;
  static constexpr int kVector = Element::kVector;
  static constexpr int kVectors = kHidden / kVector;  // in a row
  static constexpr int kWarps = kThreads / 32;
  static constexpr u64 kRowBytes = static_cast<u64>(kHidden) * Element::kBytes;
  static constexpr u64 kFloatRowBytes = static_cast<u64>(kHidden) * 4;
  static constexpr bool kExact = kVectors == kThreads * kUnroll * kChunks;

  static_assert(kHidden % kVector == 0, "a row is a whole number of vectors");
  static_assert(kThreads % 32 == 0 && kThreads <= 1024, "a group is a whole number of warps");
  static_assert(kVectors <= kThreads * kUnroll * kChunks, "the threads cover the row");

  static __device__ __forceinline__ int vector(int chunk, int u) {
    return (chunk * kUnroll + u) * kThreads + static_cast<int>(threadIdx.x);
  }
  static __device__ __forceinline__ bool holds(int vector) { return kExact || vector < kVectors; }
  // The offset of the vector in the row, in bytes, as a sum of a value of the thread and a constant, so that the compiler keeps one
  // address per thread.
  static __device__ __forceinline__ u64 offset(int chunk, int u) {
    return threadIdx.x * 16u + static_cast<u64>((chunk * kUnroll + u) * kThreads * 16);
  }
};

// A vector in private memory, of Element or of float32. With 16-bit elements a float32 vector has twice the bytes.
template <class Layout>
struct Vector {
  static constexpr int kWords = Layout::kVector / 4;  // 16-byte words of a float32 vector
  uint4 raw[kWords];

  // v: the index of the vector in the row. fetch(address): ptx::load or ptx::load_constant
  template <class Fetch>
  __device__ __forceinline__ void load(const char* row, bool is_float, int v, Fetch fetch) {
    if (kWords == 1 || !is_float) {
      raw[0] = fetch(row + v * 16ull);
    } else {
#pragma unroll
      for (int w = 0; w < kWords; ++w) raw[w] = fetch(row + (v * kWords + w) * 16ull);
    }
  }
  static __device__ __forceinline__ void prefetch(const char* row, bool is_float, int v) {
    ptx::prefetch(row + v * (is_float ? 4ull * Layout::kVector : 16ull));
  }
  // Calls with(i, element i) for each element. A float32 vector is unpacked one word at a time, which needs fewer registers.
  template <class With>
  __device__ __forceinline__ void each(bool is_float, With with) const {
    if (kWords == 1 || !is_float) {
      float f[Layout::kVector];
      Layout::Element::unpack(raw[0], f);
#pragma unroll
      for (int i = 0; i < Layout::kVector; ++i) with(i, f[i]);
    } else {
#pragma unroll
      for (int w = 0; w < kWords; ++w) {
        float f[4];
        fp32::unpack(raw[w], f);
#pragma unroll
        for (int i = 0; i < 4; ++i) with(4 * w + i, f[i]);
      }
    }
  }
};

// A row of a carried residual has the front halves of all vectors first, in float32, then the back halves, so that neighbouring threads
// access neighbouring words. This is the distance in bytes between the two halves of a vector.
template <class Layout>
constexpr u64 kToBackHalf = Layout::kVectors * 16ull;

// A thread's part of a chunk from the other ranks, in places of its own.
template <class Layout, class Transport, class Places>
class Chunk {
 public:
  using Pending = typename Transport::Pending[Layout::kUnroll];

  __device__ __forceinline__ Chunk(Places places, Pending& pending) : places_(places), pending_(pending) {}

  // row_at: the offset of the row of partial sums in the workspace
  __device__ __forceinline__ void load(const Transport& transport, u64 row_at, int chunk) const {
#pragma unroll
    for (int u = 0; u < Layout::kUnroll; ++u) {
      if (!Layout::holds(Layout::vector(chunk, u))) continue;
      transport.load_reduce(pending_[u], places_.from(u * Transport::kPlaces), row_at + Layout::offset(chunk, u));
    }
  }

  __device__ __forceinline__ void total(
      const Transport& transport, int u, typename Transport::Own own, float (&sum)[Layout::kVector]) const {
    transport.total(pending_[u], own, places_.from(u * Transport::kPlaces), sum);
  }

 private:
  const Places places_;
  Pending& pending_;
};
template <class Layout, class Transport>
constexpr int kPlacesOfChunk = Layout::kUnroll * Transport::kPlaces;

// A thread's part of a chunk from the memory of this GPU, in registers.
template <class Layout, class Transport>
struct Local {
  static constexpr int kRegisters = Layout::kUnroll * (4 + 4 * Vector<Layout>::kWords);

  typename Transport::Own own[Layout::kUnroll];
  Vector<Layout> residual[Layout::kUnroll];

  __device__ __forceinline__ void load_own(const Transport& transport, u64 row_at, int chunk) {
#pragma unroll
    for (int u = 0; u < Layout::kUnroll; ++u) {
      if (Layout::holds(Layout::vector(chunk, u))) transport.load_own(own[u], row_at + Layout::offset(chunk, u));
    }
  }
  __device__ __forceinline__ void load_residual(const char* row, bool is_carried, int chunk) {
#pragma unroll
    for (int u = 0; u < Layout::kUnroll; ++u) {
      if (!Layout::holds(Layout::vector(chunk, u))) continue;
      const char* here = row + Layout::offset(chunk, u);
      residual[u].raw[0] = ptx::load(here);
      if (Vector<Layout>::kWords > 1 && is_carried) residual[u].raw[1] = ptx::load(here + kToBackHalf<Layout>);
    }
  }
};

template <class Layout>
__device__ __forceinline__ void store_carried(char* here, const float (&r)[Layout::kVector]) {
#pragma unroll
  for (int w = 0; w < Layout::kVector / 4; ++w) {
    ptx::store(here + w * kToBackHalf<Layout>, fp32::pack({r[4 * w], r[4 * w + 1], r[4 * w + 2], r[4 * w + 3]}));
  }
}

}  // namespace tw
