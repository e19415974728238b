// The element types, and the conversions between 16 bytes of elements and floats. All arithmetic is in float32.
#pragma once
#include "ptx.cuh"

namespace tw {

struct bf16 {
  static constexpr int kBytes = 2, kVector = 8;  // elements in a 16-byte vector

  static __device__ __forceinline__ void unpack(uint4 v, float (&f)[kVector]) {
    const u32 words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      f[2 * i] = __uint_as_float(words[i] << 16);
      f[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
    }
  }
  static __device__ __forceinline__ uint4 pack(const float (&f)[kVector]) {
    return make_uint4(ptx::pack_bf16(f[0], f[1]), ptx::pack_bf16(f[2], f[3]), ptx::pack_bf16(f[4], f[5]),
                      ptx::pack_bf16(f[6], f[7]));
  }
  static __device__ __forceinline__ float rounded(float f) { return __uint_as_float(ptx::pack_bf16(f, 0.0f) << 16); }
  static __device__ __forceinline__ uint4 multimem_load_add(const void* p) { return ptx::multimem_load_add_bf16(p); }
};

struct fp16 {
  static constexpr int kBytes = 2, kVector = 8;

  static __device__ __forceinline__ void unpack(uint4 v, float (&f)[kVector]) {
    const u32 words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      f[2 * i] = ptx::unpack_fp16_low(words[i]);
      f[2 * i + 1] = ptx::unpack_fp16_high(words[i]);
    }
  }
  static __device__ __forceinline__ uint4 pack(const float (&f)[kVector]) {
    return make_uint4(ptx::pack_fp16(f[0], f[1]), ptx::pack_fp16(f[2], f[3]), ptx::pack_fp16(f[4], f[5]),
                      ptx::pack_fp16(f[6], f[7]));
  }
  static __device__ __forceinline__ float rounded(float f) { return ptx::unpack_fp16_low(ptx::pack_fp16(f, 0.0f)); }
  static __device__ __forceinline__ uint4 multimem_load_add(const void* p) { return ptx::multimem_load_add_fp16(p); }
};

struct fp32 {
  static constexpr int kBytes = 4, kVector = 4;

  static __device__ __forceinline__ void unpack(uint4 v, float (&f)[kVector]) {
    f[0] = __uint_as_float(v.x);
    f[1] = __uint_as_float(v.y);
    f[2] = __uint_as_float(v.z);
    f[3] = __uint_as_float(v.w);
  }
  static __device__ __forceinline__ uint4 pack(const float (&f)[kVector]) {
    return make_uint4(__float_as_uint(f[0]), __float_as_uint(f[1]), __float_as_uint(f[2]), __float_as_uint(f[3]));
  }
  static __device__ __forceinline__ uint4 multimem_load_add(const void* p) { return ptx::multimem_load_add_fp32(p); }
};

}  // namespace tw
