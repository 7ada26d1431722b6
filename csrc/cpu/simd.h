// One source, several instruction sets: a function marked VAREID_MULTIVERSION is compiled for AVX-512, AVX2 and the
// baseline, and the loader picks one at run time. Elsewhere it is compiled once, plainly.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__x86_64__) && defined(__ELF__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12 && \
    !defined(VAREID_NO_MULTIVERSION)
#define VAREID_MULTIVERSION __attribute__((target_clones("arch=x86-64-v4", "arch=haswell", "default")))
#else
#define VAREID_MULTIVERSION
#endif

// Bodies shared by the versions must be inlined into each of them to be compiled for its instruction set.
#define VAREID_INLINE inline __attribute__((always_inline))

namespace vareid {

struct bfloat16 {
  uint16_t bits;
};
using float16 = _Float16;

VAREID_INLINE float load(const float* p) { return *p; }
VAREID_INLINE double load(const double* p) { return *p; }
VAREID_INLINE float load(const float16* p) { return static_cast<float>(*p); }
VAREID_INLINE float load(const bfloat16* p) {
  const uint32_t bits = static_cast<uint32_t>(p->bits) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

VAREID_INLINE void store(float* p, float value) { *p = value; }
VAREID_INLINE void store(double* p, double value) { *p = value; }
VAREID_INLINE void store(float16* p, float value) { *p = static_cast<float16>(value); }
VAREID_INLINE void store(bfloat16* p, float value) {  // round to nearest even; NaN stays NaN
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  p->bits = static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? (bits >> 16) | 0x40u : rounded);
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

}  // namespace vareid
