// __nv_bfloat16 for the CUDA-on-CPU build: the upper half of a float, rounded to nearest even.
#pragma once

#include "cuda_runtime.h"

CUDA_ON_CPU_SMALL_FLOAT(__nv_bfloat16)

inline __nv_bfloat16 __float2bfloat16_rn(float x) {
  const unsigned bits = __builtin_bit_cast(unsigned, x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return {0x7fff};  // a NaN stays one
  return {static_cast<unsigned short>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
}
inline float __bfloat162float(__nv_bfloat16 x) {
  return __builtin_bit_cast(float, static_cast<unsigned>(x.bits) << 16);
}
inline unsigned short __bfloat16_as_ushort(__nv_bfloat16 x) { return x.bits; }
