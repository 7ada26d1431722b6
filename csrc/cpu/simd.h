// One source, several instruction sets: a function marked VAREID_MULTIVERSION is compiled for AVX-512, AVX2 and the
// baseline, and the loader picks one at run time. Elsewhere it is compiled once, plainly.
#pragma once

#include <cstdint>
#include <cstring>

#include "dtype.h"

#if defined(__x86_64__) && defined(__ELF__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12 && \
    !defined(VAREID_NO_MULTIVERSION)
#define VAREID_MULTIVERSION __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
// For loops of integer comparisons, which AVX-512 does at half of AVX2's rate (they go through its mask registers).
#define VAREID_MULTIVERSION_AVX2 __attribute__((target_clones("arch=x86-64-v3", "default")))
#else
#define VAREID_MULTIVERSION
#define VAREID_MULTIVERSION_AVX2
#endif

// Bodies shared by the versions must be inlined into each of them to be compiled for its instruction set.
#define VAREID_INLINE inline __attribute__((always_inline))

namespace vareid {

struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

VAREID_INLINE float float_from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}
VAREID_INLINE uint32_t bits_from_float(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

VAREID_INLINE float load(const float* p) { return *p; }
VAREID_INLINE double load(const double* p) { return *p; }
VAREID_INLINE float load(const bfloat16* p) { return float_from_bits(static_cast<uint32_t>(p->bits) << 16); }
// The half formats are converted with integer arithmetic, which every instruction set vectorises.
VAREID_INLINE float load(const float16* p) {
  const uint32_t half = p->bits;
  const float finite = float_from_bits((half & 0x7fffu) << 13) * 0x1p112f;
  const uint32_t special = (half & 0x7c00u) == 0x7c00u ? 0x7f800000u : 0u;
  return float_from_bits(bits_from_float(finite) | special | ((half & 0x8000u) << 16));
}

VAREID_INLINE void store(float* p, float value) { *p = value; }
VAREID_INLINE void store(double* p, double value) { *p = value; }
VAREID_INLINE void store(bfloat16* p, float value) {  // round to nearest even; NaN stays NaN
  const uint32_t bits = bits_from_float(value);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  p->bits = static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? (bits >> 16) | 0x40u : rounded);
}
VAREID_INLINE void store(float16* p, float value) {  // round to nearest even; NaN stays NaN
  const uint32_t bits = bits_from_float(value);
  const uint32_t magnitude = bits & 0x7fffffffu;
  const uint32_t normal = (magnitude + 0xc8000fffu + ((magnitude >> 13) & 1u)) >> 13;
  const uint32_t subnormal = bits_from_float(float_from_bits(magnitude) + 0.5f) - 0x3f000000u;
  const uint32_t infinite = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  const uint32_t half = magnitude >= 0x47800000u ? infinite : magnitude < 0x38800000u ? subnormal : normal;
  p->bits = static_cast<uint16_t>(half | ((bits >> 16) & 0x8000u));
}

// The type in which an element type is accumulated.
template <typename T>
struct Accumulator {
  using type = float;
};
template <>
struct Accumulator<double> {
  using type = double;
};

template <typename T>
struct Type {
  using type = T;
};

// Calls body(Type<T>{}) with the element type T that `dtype` names.
template <typename Body>
void dispatch_float(DType dtype, const Body& body) {
  switch (dtype) {
    case DType::kFloat32:
      return body(Type<float>{});
    case DType::kFloat64:
      return body(Type<double>{});
    case DType::kFloat16:
      return body(Type<float16>{});
    case DType::kBFloat16:
      return body(Type<bfloat16>{});
  }
}

}  // namespace vareid
