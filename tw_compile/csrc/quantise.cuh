// What a norm is quantised to. The specification is in tw_compile/quantise.py.
#pragma once
#include "site.cuh"

namespace tw {

constexpr int kRow = 1 << 30;  // more channels than any row has

// The norm leaves in the dtype of the model.
struct Plain {
  static constexpr bool kQuantises = false;
  static constexpr int kGroup = kRow;
};

// kGroup: the channels that have a scale of their own; kRow if that is the whole row, or if one scale is given.
struct Fp8 {
  static constexpr bool kQuantises = true;
  static constexpr int kGroup = kRow;

  static __device__ __forceinline__ u32 pack(float a, float b, float c, float d) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
    return ptx::pack_e4m3(a, b) | ptx::pack_e4m3(c, d) << 16;
#else
    return e4m3(a) | e4m3(b) << 8 | e4m3(c) << 16 | e4m3(d) << 24;
#endif
  }

 private:
  // As PyTorch does it (c10/util/Float8_e4m3fn.h), but what is larger than 448 becomes 448.
  static __device__ __forceinline__ u32 e4m3(float f) {
    const u32 sign = __float_as_uint(f) >> 24 & 0x80u, bits = __float_as_uint(f) & 0x7fffffffu;
    if (bits > 0x7f800000u) return sign | 0x7fu;
    if (bits >= 0x43e00000u) return sign | 0x7eu;
    // Below the smallest normal number, 2^-6: the sum's last bit is that of the result.
    if (bits < 121u << 23) return sign | (__float_as_uint(__fadd_rn(__uint_as_float(bits), 16384.0f)) - (141u << 23));
    return sign | (bits - (120u << 23) + 0x7ffffu + (bits >> 20 & 1)) >> 20;
  }
};

struct Int8 {
  static constexpr bool kQuantises = true;
  static constexpr int kGroup = kRow;

  static __device__ __forceinline__ u32 pack(float a, float b, float c, float d) {
    const auto byte = [](float f) { return static_cast<u32>(__float2int_rn(f)) & 0xffu; };
    return byte(a) | byte(b) << 8 | byte(c) << 16 | byte(d) << 24;
  }
};

struct Fp8_128 : Fp8 {
  static constexpr int kGroup = 128;
};
struct Int8_128 : Int8 {
  static constexpr int kGroup = 128;
};

// Comparisons are written so that NaN stays NaN.
__device__ __forceinline__ float at_least(float x, float low) { return x < low ? low : x; }
__device__ __forceinline__ float at_most(float x, float high) { return x > high ? high : x; }
// Of magnitudes, also NaN, which is larger than infinity.
__device__ __forceinline__ float larger(float a, float b) { return __float_as_uint(a) > __float_as_uint(b) ? a : b; }
__device__ __forceinline__ float magnitude(float x) { return __uint_as_float(__float_as_uint(x) & 0x7fffffffu); }

// The scale of a row or a group. Element: of the norm; largest: its largest magnitude
template <class Element, int kWorld>
__device__ __forceinline__ float scale_of(const Site<kWorld>& site, float largest) {
  const auto rounded = [&](float x) { return site.narrow ? Element::rounded(x) : x; };
  if (site.zero != 0.0f && !(largest > 0.0f)) largest = site.zero;
  largest = rounded(__fadd_rn(largest, site.added));
  largest = rounded(at_least(largest, site.least));
  return rounded(at_least(rounded(__fdiv_rn(largest, site.most)), site.floor));
}

// Scales values with one scale, and keeps them within the limits.
template <int kWorld>
class Scaler {
 public:
  __device__ __forceinline__ Scaler(const Site<kWorld>& site, float scale) : site_(site) {
    const float divisor = scale == 0.0f ? 1.0f : scale;
    by_ = site.how == kDivide ? divisor : site.how == kInverse ? __fdiv_rn(1.0f, divisor) : scale;
  }
  __device__ __forceinline__ float operator()(float y) const {
    y = site_.how == kDivide ? __fdiv_rn(y, by_) : __fmul_rn(y, by_);
    return at_most(at_least(y, site_.low), site_.high);
  }

 private:
  static constexpr u32 kDivide = 0, kInverse = 1;  // as in quantise.HOWS

  const Site<kWorld>& site_;
  float by_;
};

}  // namespace tw
