// The work of a group on a row: sum over the ranks, bias, scale, residual, norm, quantisation. All kernels use this code, with the same
// layout of a row for a given hidden size. So the bits of a row depend only on its data: not on the kernel, the rank, the batch, or the
// number of CTAs and groups.
//
// Products and sums are intrinsics, so that the compiler cannot contract them in one place and not in another.
#pragma once
#include "group.cuh"
#include "quantise.cuh"
#include "vector.cuh"

namespace tw {

// The thread's part of the row in float32, between the sum and the norm: in registers if the row is one chunk, otherwise in shared
// memory, where each thread reads only its own values.
template <class Layout, bool kInRegisters = Layout::kChunks == 1>
struct Kept;

template <class Layout>
struct Kept<Layout, true> {
  float values[Layout::kUnroll][Layout::kVector];

  static constexpr int kBytes = 0;

  __device__ __forceinline__ explicit Kept(char*) {}
  __device__ __forceinline__ void put(int, int u, const float (&r)[Layout::kVector]) {
#pragma unroll
    for (int i = 0; i < Layout::kVector; ++i) values[u][i] = r[i];
  }
  __device__ __forceinline__ void get(int, int u, float (&r)[Layout::kVector]) const {
#pragma unroll
    for (int i = 0; i < Layout::kVector; ++i) r[i] = values[u][i];
  }
};

template <class Layout>
struct Kept<Layout, false> {
  static constexpr int kQuads = Layout::kVector / 4;
  static constexpr int kBytes = Layout::kThreads * Layout::kUnroll * Layout::kChunks * Layout::kVector * 4;
  float4* memory;

  __device__ __forceinline__ explicit Kept(char* shared) : memory(reinterpret_cast<float4*>(shared)) {}
  static __device__ __forceinline__ int index(int chunk, int u, int quad) {
    return ((chunk * Layout::kUnroll + u) * kQuads + quad) * Layout::kThreads + static_cast<int>(threadIdx.x);
  }
  __device__ __forceinline__ void put(int chunk, int u, const float (&r)[Layout::kVector]) {
#pragma unroll
    for (int q = 0; q < kQuads; ++q)
      memory[index(chunk, u, q)] = make_float4(r[4 * q], r[4 * q + 1], r[4 * q + 2], r[4 * q + 3]);
  }
  __device__ __forceinline__ void get(int chunk, int u, float (&r)[Layout::kVector]) const {
#pragma unroll
    for (int q = 0; q < kQuads; ++q) {
      const float4 v = memory[index(chunk, u, q)];
      r[4 * q] = v.x, r[4 * q + 1] = v.y, r[4 * q + 2] = v.z, r[4 * q + 3] = v.w;
    }
  }
};

// The norms: row / sqrt(mean(row²) + eps). row is r - mean(r) for a LayerNorm, and r for an RMSNorm.
struct RmsNorm {
  static constexpr bool kCenters = false;
};
struct LayerNorm {
  static constexpr bool kCenters = true;
};

// The scales that a row may have of its own.
template <class Output, class Layout>
constexpr int kScales = Output::kQuantises ? (Layout::kHidden - 1) / Output::kGroup + 1 : 0;

// The rows of a group, one after the other. For each row call add() for its chunks in order, then normalise(), then quantise() if Output
// quantises.
template <class Norm, class Output, class Layout, class Transport, class Group, int kWorld>
class Rows {
 public:
  using Element = typename Layout::Element;

  // kKeepsWeight: whether there are enough registers to keep the weight from row to row, beside the floats of a row and the data of
  // the next row that is loaded ahead. kLoadsAhead: whether there are enough to load the next row ahead.
  static constexpr int kFloats = Layout::kUnroll * Layout::kVector, kOtherRegisters = 40;
  static constexpr int kFree = Group::kRegisters - kOtherRegisters - kFloats - Local<Layout, Transport>::kRegisters;
  static constexpr bool kKeepsWeight = Layout::kChunks == 1 && kFree >= kFloats, kLoadsAhead = kFree >= 0;

  // shared: the group's shared memory
  __device__ __forceinline__ explicit Rows(const Site<kWorld>& site, const Transport& transport, char* shared)
      : site_(site),
        transport_(transport),
        of_warps_(reinterpret_cast<float*>(shared)),
        kept_(shared + kScratchBytes),
        places_(ptx::shared_address(shared) + kScratchBytes + Kept<Layout>::kBytes + threadIdx.x * 16) {}

  // The places of this thread for chunk i, in shared memory behind the scratch and the kept rows.
  __device__ __forceinline__ SharedPlaces<Layout::kThreads> places(int i) const {
    return {places_ + i * kPlacesOfChunk<Layout, Transport> * Layout::kThreads * 16};
  }
  static constexpr __device__ int shared_bytes(int chunks) {
    return kScratchBytes + Kept<Layout>::kBytes + chunks * kPlacesOfChunk<Layout, Transport> * Layout::kThreads * 16;
  }

  // Computes r = scale * (sum + bias) + residual for one chunk.
  template <class In>
  __device__ __forceinline__ void add(const In& in, const Local<Layout, Transport>& local, int chunk) {
    if (chunk == 0) sum_ = 0.0f;
#pragma unroll
    for (int u = 0; u < Layout::kUnroll; ++u) {
      const int v = Layout::vector(chunk, u);
      if (!Layout::holds(v)) continue;
      float r[Layout::kVector];
      in.total(transport_, u, local.own[u], r);
      if (site_.bias != nullptr) {
        Vector<Layout> bias;
        bias.load(site_.bias, false, v, ptx::load_constant);
        bias.each(false, [&](int i, float b) { r[i] = __fadd_rn(r[i], b); });
      }
      if (site_.residual != nullptr) {
        const bool is_float = site_.takes_carried != 0;
        local.residual[u].each(is_float, [&](int i, float before) { r[i] = __fmaf_rn(r[i], site_.scale, before); });
      } else {
#pragma unroll
        for (int i = 0; i < Layout::kVector; ++i) r[i] = __fmul_rn(r[i], site_.scale);
      }
#pragma unroll
      for (int i = 0; i < Layout::kVector; ++i) {
        sum_ = Norm::kCenters ? __fadd_rn(sum_, r[i]) : __fmaf_rn(r[i], r[i], sum_);
      }
      kept_.put(chunk, u, r);
    }
  }

  // Calls store(byte offset in the row, floats of a vector) for the r of one chunk.
  template <class Store>
  __device__ __forceinline__ void each(int chunk, Store store) {
#pragma unroll
    for (int u = 0; u < Layout::kUnroll; ++u) {
      if (!Layout::holds(Layout::vector(chunk, u))) continue;
      float r[Layout::kVector];
      kept_.get(chunk, u, r);
      store(Layout::offset(chunk, u), r);
    }
  }

  // With kKeepsWeight, weight + offset stays in registers. It is loaded once, before the first row, in two steps. fetch_weight() runs
  // before the barrier, at which other ranks wait for this CTA, and so does not wait for the load. keep_weight() runs after it.
  __device__ __forceinline__ void fetch_weight() {
    if constexpr (kKeepsWeight) {
      if (site_.weight == nullptr) return;
#pragma unroll
      for (int u = 0; u < Layout::kUnroll; ++u) {
        const int v = Layout::vector(0, u);
        if (Layout::holds(v)) raw_weight_[u].load(site_.weight, site_.weight_is_float != 0, v, ptx::load_constant);
      }
    }
  }
  __device__ __forceinline__ void keep_weight() {
    if constexpr (kKeepsWeight) {
#pragma unroll
      for (int u = 0; u < Layout::kUnroll; ++u) to_floats(raw_weight_[u], weight_[u]);
    }
  }

  // There are no registers for the shift, so that it is only prefetched.
  __device__ __forceinline__ void prefetch_shift() {
    if (site_.shift == nullptr) return;
#pragma unroll
    for (int u = 0; u < Layout::kUnroll; ++u) {
      const int v = Layout::vector(0, u);
      if (Layout::holds(v)) Vector<Layout>::prefetch(site_.shift, site_.shift_is_float != 0, v);
    }
  }

  // Calls store(byte offset in the row, vector) for norm = row / sqrt(mean(row²) + eps) * (weight + offset) + shift. If the norm is
  // quantised, calls it only where the norm is kept as well.
  template <class Store>
  __device__ __forceinline__ void normalise(Store store) {
    if constexpr (Norm::kCenters) sum_ = center(row_mean(sum_));
    const float spread = row_mean(sum_);
    const float factor = site_.eps < 0.0f ? 1.0f : ptx::rsqrt(__fadd_rn(spread, site_.eps));  // see site.cuh
    constexpr bool kOneScale = kScales<Output, Layout> == 1;
    if constexpr (kOneScale) largest_ = 0.0f;
#pragma unroll 1
    for (int chunk = 0; chunk < Layout::kChunks; ++chunk) {
#pragma unroll
      for (int u = 0; u < Layout::kUnroll; ++u) {
        const int v = Layout::vector(chunk, u);
        if (!Layout::holds(v)) continue;
        float r[Layout::kVector];
        kept_.get(chunk, u, r);
        float fetched[Layout::kVector];
        if (!kKeepsWeight) {
          Vector<Layout> raw;
          if (site_.weight != nullptr) raw.load(site_.weight, site_.weight_is_float != 0, v, ptx::load_constant);
          to_floats(raw, fetched);
        }
        const float(&weight)[Layout::kVector] = kKeepsWeight ? weight_[u] : fetched;
#pragma unroll
        for (int i = 0; i < Layout::kVector; ++i) r[i] = __fmul_rn(__fmul_rn(r[i], factor), weight[i]);
        if constexpr (Norm::kCenters) add_shift(v, r);
        const uint4 rounded = Element::pack(r);
        if constexpr (Output::kQuantises) {
          if (site_.keeps_norm) store(Layout::offset(chunk, u), rounded);
          Element::unpack(rounded, r);
          if constexpr (kOneScale) largest_ = largest_of(largest_, r);
          kept_.put(chunk, u, r);
        } else {
          store(Layout::offset(chunk, u), rounded);
        }
      }
    }
  }

  // Calls store(byte offset in the quantised row, 8 elements), and for each of the row's own scales once in the group store_scale(index,
  // scale).
  template <class Store, class StoreScale>
  __device__ __forceinline__ void quantise(Store store, StoreScale store_scale) {
    static_assert(Layout::kVector == 8, "norms of 16 bits are quantised");
    if constexpr (kScales<Output, Layout> > 1) {
      quantise_groups(store, store_scale);
    } else {
      quantise_row(store, store_scale);
    }
  }

 private:
  template <class Store, class StoreScale>
  __device__ __forceinline__ void quantise_row(Store store, StoreScale store_scale) {
    float scale;
    if (site_.static_scale != nullptr) {
      scale = __uint_as_float(ptx::load_word(site_.static_scale));
    } else {
      scale = scale_of<Element>(site_, over_row(largest_, larger));
      if (threadIdx.x == 0) store_scale(0, __float_as_uint(scale));
    }
    const Scaler<kWorld> scaled(site_, scale);
#pragma unroll 1
    for (int chunk = 0; chunk < Layout::kChunks; ++chunk) {
#pragma unroll
      for (int u = 0; u < Layout::kUnroll; ++u) {
        if (!Layout::holds(Layout::vector(chunk, u))) continue;
        float r[Layout::kVector];
        kept_.get(chunk, u, r);
        store_scaled(scaled, Layout::offset(chunk, u) / 2, r, store);
      }
    }
  }

  // A group of channels is in neighbouring lanes of a warp: no barrier is needed.
  template <class Store, class StoreScale>
  __device__ __forceinline__ void quantise_groups(Store store, StoreScale store_scale) {
    constexpr int kLanes = Output::kGroup / Layout::kVector;
    static_assert(32 % kLanes == 0 && Layout::kHidden % Output::kGroup == 0, "a row is a whole number of groups, and a warp, too");
#pragma unroll 1
    for (int chunk = 0; chunk < Layout::kChunks; ++chunk) {
#pragma unroll
      for (int u = 0; u < Layout::kUnroll; ++u) {
        const int v = Layout::vector(chunk, u);
        const bool holds = Layout::holds(v);
        float r[Layout::kVector], largest = 0.0f;
        if (holds) {
          kept_.get(chunk, u, r);
          largest = largest_of(largest, r);
        }
#pragma unroll
        for (int lane = kLanes / 2; lane > 0; lane /= 2) largest = larger(largest, __shfl_xor_sync(0xffffffffu, largest, lane));
        if (!holds) continue;
        const float scale = scale_of<Element>(site_, largest);
        if (threadIdx.x % kLanes == 0) store_scale(v / kLanes, __float_as_uint(scale));
        store_scaled(Scaler<kWorld>(site_, scale), Layout::offset(chunk, u) / 2, r, store);
      }
    }
  }

  template <class Store>
  static __device__ __forceinline__ void store_scaled(const Scaler<kWorld>& scaled, u64 at, float (&r)[Layout::kVector], Store store) {
#pragma unroll
    for (int i = 0; i < Layout::kVector; ++i) r[i] = scaled(r[i]);
    store(at, make_uint2(Output::pack(r[0], r[1], r[2], r[3]), Output::pack(r[4], r[5], r[6], r[7])));
  }

  static __device__ __forceinline__ float largest_of(float largest, const float (&r)[Layout::kVector]) {
#pragma unroll
    for (int i = 0; i < Layout::kVector; ++i) largest = larger(largest, magnitude(r[i]));
    return largest;
  }

  // Subtracts the mean from the kept row. Returns the sum of the thread's squares, which is computed after the subtraction, and so is
  // accurate for a large mean.
  __device__ __forceinline__ float center(float mean) {
    float squares = 0.0f;
#pragma unroll 1
    for (int chunk = 0; chunk < Layout::kChunks; ++chunk) {
#pragma unroll
      for (int u = 0; u < Layout::kUnroll; ++u) {
        if (!Layout::holds(Layout::vector(chunk, u))) continue;
        float r[Layout::kVector];
        kept_.get(chunk, u, r);
#pragma unroll
        for (int i = 0; i < Layout::kVector; ++i) {
          r[i] = __fadd_rn(r[i], -mean);
          squares = __fmaf_rn(r[i], r[i], squares);
        }
        kept_.put(chunk, u, r);
      }
    }
    return squares;
  }

  __device__ __forceinline__ void to_floats(const Vector<Layout>& raw, float (&weight)[Layout::kVector]) const {
    if (site_.weight == nullptr) {
#pragma unroll
      for (int i = 0; i < Layout::kVector; ++i) weight[i] = 1.0f;
    } else {
      raw.each(site_.weight_is_float != 0, [&](int i, float w) { weight[i] = __fadd_rn(w, site_.offset); });
    }
  }

  __device__ __forceinline__ void add_shift(int v, float (&r)[Layout::kVector]) {
    if (site_.shift == nullptr) return;
    Vector<Layout> shift;
    shift.load(site_.shift, site_.shift_is_float != 0, v, ptx::load_constant);
    shift.each(site_.shift_is_float != 0, [&](int i, float s) { r[i] = __fadd_rn(r[i], s); });
  }

  __device__ __forceinline__ float row_mean(float value) {
    const float sum = over_row(value, [](float a, float b) { return __fadd_rn(a, b); });
    return __fmul_rn(sum, 1.0f / Layout::kHidden);
  }

  // Combines one value of each thread, always in the same order. One barrier is enough: the next call writes the other half of
  // of_warps_, and no warp can reach the call after it, which writes this half, before all warps have read this half.
  template <class Combine>
  __device__ __forceinline__ float over_row(float value, Combine combine) {
#pragma unroll
    for (int lane = 16; lane > 0; lane /= 2) value = combine(value, __shfl_xor_sync(0xffffffffu, value, lane));
    float* of_warp = of_warps_ + half_ * 32;
    half_ ^= 1;
    if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = value;
    Group::sync();
    float all = 0.0f;
#pragma unroll
    for (int quad = 0; quad < Layout::kWarps; quad += 4) {
      const float4 four = *reinterpret_cast<const float4*>(of_warp + quad);
      all = quad == 0 ? four.x : combine(all, four.x);
      if (quad + 1 < Layout::kWarps) all = combine(all, four.y);
      if (quad + 2 < Layout::kWarps) all = combine(all, four.z);
      if (quad + 3 < Layout::kWarps) all = combine(all, four.w);
    }
    return all;
  }

  static constexpr int kScratchBytes = 2 * 32 * 4;

  const Site<kWorld>& site_;
  const Transport& transport_;
  float* const of_warps_;  // two values of each warp
  Kept<Layout> kept_;
  const u32 places_;  // address in shared memory of the thread's first place
  Vector<Layout> raw_weight_[Layout::kUnroll];
  float weight_[Layout::kUnroll][Layout::kVector];
  float sum_ = 0.0f;  // sum of the thread's squares; for a LayerNorm first the sum of its elements
  float largest_ = 0.0f;  // magnitude of the thread's part of the norm
  u32 half_ = 0;
};

}  // namespace tw
