// Compiled with -ffp-contract=off (CMakeLists.txt): a fused a * u - b * v would not be 0 for equal products.
#include "cpu/exact_distance.h"

#include "cpu/simd.h"

namespace vareid {
namespace {

constexpr int64_t kPartialSums = 32;

template <typename T, bool kScaled>
VAREID_INLINE double squared_distance(const T* __restrict__ x, const T* __restrict__ y, double a, double b, int64_t D,
                                      const T* ahead) {
  constexpr int64_t kLine = 64 / sizeof(T);
  double sums[kPartialSums] = {};
  int64_t d = 0;
  for (; d + kPartialSums <= D; d += kPartialSums) {
    for (int64_t l = 0; l < kPartialSums; l += kLine) __builtin_prefetch(ahead + d + l);
#pragma omp simd
    for (int64_t l = 0; l < kPartialSums; ++l) {
      const double u = load(x + d + l), v = load(y + d + l);
      const double difference = kScaled ? a * u - b * v : u - v;
      sums[l] += difference * difference;
    }
  }
  for (int64_t l = 0; d + l < D; ++l) {
    const double u = load(x + d + l), v = load(y + d + l);
    const double difference = kScaled ? a * u - b * v : u - v;
    sums[l] += difference * difference;
  }
  for (int64_t width = kPartialSums / 2; width > 0; width /= 2)
    for (int64_t l = 0; l < width; ++l) sums[l] += sums[l + width];
  return sums[0];
}

#define VAREID_EXACT_DISTANCE(T, name)                                                                            \
  VAREID_MULTIVERSION double name(const Features& x, int64_t i, const Features& y, int64_t j, int64_t D,          \
                                  int64_t next) {                                                                 \
    return squared_distance<T, false>(static_cast<const T*>(x.data) + i * x.stride,                               \
                                      static_cast<const T*>(y.data) + j * y.stride, 1.0, 1.0, D,                  \
                                      static_cast<const T*>(y.data) + next * y.stride);                           \
  }                                                                                                               \
  VAREID_MULTIVERSION double scaled_##name(const Features& x, int64_t i, const Features& y, int64_t j, int64_t D, \
                                           int64_t next) {                                                        \
    return squared_distance<T, true>(static_cast<const T*>(x.data) + i * x.stride,                                \
                                     static_cast<const T*>(y.data) + j * y.stride, x.factor[i], y.factor[j], D,   \
                                     static_cast<const T*>(y.data) + next * y.stride);                            \
  }

VAREID_EXACT_DISTANCE(float, exact_float32)
VAREID_EXACT_DISTANCE(double, exact_float64)
VAREID_EXACT_DISTANCE(float16, exact_float16)
VAREID_EXACT_DISTANCE(bfloat16, exact_bfloat16)
#undef VAREID_EXACT_DISTANCE

}  // namespace

ExactDistance exact_distance_function(DType dtype, bool scaled) {
  switch (dtype) {
    case DType::kFloat32:
      return scaled ? &scaled_exact_float32 : &exact_float32;
    case DType::kFloat64:
      return scaled ? &scaled_exact_float64 : &exact_float64;
    case DType::kFloat16:
      return scaled ? &scaled_exact_float16 : &exact_float16;
    case DType::kBFloat16:
      return scaled ? &scaled_exact_bfloat16 : &exact_bfloat16;
  }
  return nullptr;
}

}  // namespace vareid
