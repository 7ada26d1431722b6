// __half for the CUDA-on-CPU build, over the compiler's _Float16.
#pragma once

#include "cuda_on_cpu/small_float.h"
#include "cuda_runtime.h"

namespace cuda_on_cpu {
inline unsigned short encode_half(float x) { return __builtin_bit_cast(unsigned short, static_cast<_Float16>(x)); }
inline float decode_half(unsigned short bits) { return static_cast<float>(__builtin_bit_cast(_Float16, bits)); }
}  // namespace cuda_on_cpu

CUDA_ON_CPU_SMALL_FLOAT(__half, cuda_on_cpu::encode_half, cuda_on_cpu::decode_half)
using half = __half;
using half2 = __half2;

inline __half __float2half(float x) { return __half(x); }
inline __half __float2half_rn(float x) { return __half(x); }

inline float __half2float(__half x) { return x; }
inline __half2 __floats2half2_rn(float x, float y) { return __half2(__half(x), __half(y)); }
inline __half2 __float22half2_rn(float2 v) { return __floats2half2_rn(v.x, v.y); }
inline __half2 __halves2half2(__half x, __half y) { return __half2(x, y); }
inline float2 __half22float2(__half2 v) { return {v.x, v.y}; }
inline __half __low2half(__half2 v) { return v.x; }
inline __half __high2half(__half2 v) { return v.y; }
inline __half __ushort_as_half(unsigned short bits) {
  __half x;
  x.bits = bits;
  return x;
}
inline unsigned short __half_as_ushort(__half x) { return x.bits; }
inline __half __double2half(double x) {
  return __ushort_as_half(__builtin_bit_cast(unsigned short, static_cast<_Float16>(x)));
}
