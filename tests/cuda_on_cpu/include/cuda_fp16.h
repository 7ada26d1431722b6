// __half for the CUDA-on-CPU build: 16 bits, converted by the compiler's _Float16.
#pragma once

#include "cuda_runtime.h"

CUDA_ON_CPU_SMALL_FLOAT(__half)

inline __half __float2half_rn(float x) { return {__builtin_bit_cast(unsigned short, static_cast<_Float16>(x))}; }
inline float __half2float(__half x) { return static_cast<float>(__builtin_bit_cast(_Float16, x.bits)); }
inline unsigned short __half_as_ushort(__half x) { return x.bits; }
