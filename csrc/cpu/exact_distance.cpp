// Compiled with -ffp-contract=off (CMakeLists.txt): a fused a * u - b * v would not be 0 for equal products.
#include "cpu/exact_distance.h"

#include <algorithm>

#include "cpu/simd.h"

namespace vareid {
namespace {

constexpr int64_t kPartialSums = 32;
constexpr int kTogether = 4;  // rows that are measured together: their loads overlap, and x is converted once

template <typename T>
struct Row {
  const T* data;
  double factor;
};

template <bool kScaled, typename T>
VAREID_INLINE void row_of(const Features& x, int64_t i, Row<T>* row) {
  *row = {static_cast<const T*>(x.data) + i * x.stride, kScaled ? x.factor[i] : 1.0};
}

// The rows index[first] and so on, the last one again where there are no more.
template <bool kScaled, typename T>
VAREID_INLINE void rows_of(const Rows& x, const int32_t* index, int64_t first, int64_t count, Row<T>* rows) {
  for (int64_t r = 0; r < kTogether; ++r) {
    const int64_t i = index[std::min(first + r, count - 1)];
    row_of<kScaled>(x.of(i), x.local(i), rows + r);
  }
}

template <bool kScaled, typename T>
VAREID_INLINE double squared_difference(const Row<T>& x, const Row<T>& y, int64_t d) {
  const double u = load(x.data + d), v = load(y.data + d);
  const double difference = kScaled ? x.factor * u - y.factor * v : u - v;
  return difference * difference;
}

// Asks for the elements of the rows `ahead` meanwhile.
template <bool kScaled, int kRows, typename T>
VAREID_INLINE void squared_distances(const Row<T>& x, const Row<T>* y, const Row<T>* ahead, int64_t D, double* out) {
  constexpr int64_t kLine = 64 / sizeof(T);
  double sums[kRows][kPartialSums] = {};
  int64_t d = 0;
  for (; d + kPartialSums <= D; d += kPartialSums) {
    for (int r = 0; r < kRows; ++r)
      for (int64_t l = 0; l < kPartialSums; l += kLine) __builtin_prefetch(ahead[r].data + d + l);
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
#pragma omp simd
      for (int64_t l = 0; l < kPartialSums; ++l) sums[r][l] += squared_difference<kScaled>(x, y[r], d + l);
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int64_t l = 0; d + l < D; ++l) sums[r][l] += squared_difference<kScaled>(x, y[r], d + l);
    for (int64_t width = kPartialSums / 2; width > 0; width /= 2)
      for (int64_t l = 0; l < width; ++l) sums[r][l] += sums[r][l + width];
    out[r] = sums[r][0];
  }
}

template <typename T, bool kScaled>
VAREID_INLINE double distance(const Features& x, int64_t i, const Features& y, int64_t j, int64_t D) {
  Row<T> row, column;
  row_of<kScaled>(x, i, &row);
  row_of<kScaled>(y, j, &column);
  double out;
  squared_distances<kScaled, 1>(row, &column, &column, D, &out);
  return out;
}

template <typename T, bool kScaled>
VAREID_INLINE void distances(const Rows& x, int64_t i, const Rows& y, const int32_t* index, int64_t count, int64_t D,
                             double* out) {
  Row<T> row;
  row_of<kScaled>(x.of(i), x.local(i), &row);
  Row<T> columns[kTogether], ahead[kTogether];
  if (count > 0) rows_of<kScaled>(y, index, 0, count, ahead);
  for (int64_t c = 0; c < count; c += kTogether) {
    std::copy(ahead, ahead + kTogether, columns);
    rows_of<kScaled>(y, index, c + kTogether, count, ahead);
    if (c + kTogether <= count)
      squared_distances<kScaled, kTogether>(row, columns, ahead, D, out + c);
    else
      for (int64_t r = 0; c + r < count; ++r)
        squared_distances<kScaled, 1>(row, columns + r, columns + std::min(r + 1, count - 1 - c), D, out + c + r);
  }
}

#define VAREID_EXACT_DISTANCE(T, name, scaled)                                                                   \
  VAREID_MULTIVERSION double name(const Features& x, int64_t i, const Features& y, int64_t j, int64_t D) {       \
    return distance<T, scaled>(x, i, y, j, D);                                                                   \
  }                                                                                                              \
  VAREID_MULTIVERSION void name##s(const Rows& x, int64_t i, const Rows& y, const int32_t* index, int64_t count, \
                                   int64_t D, double* out) {                                                     \
    distances<T, scaled>(x, i, y, index, count, D, out);                                                         \
  }

VAREID_EXACT_DISTANCE(float, float32_distance, false)
VAREID_EXACT_DISTANCE(float, scaled_float32_distance, true)
VAREID_EXACT_DISTANCE(double, float64_distance, false)
VAREID_EXACT_DISTANCE(double, scaled_float64_distance, true)
VAREID_EXACT_DISTANCE(float16, float16_distance, false)
VAREID_EXACT_DISTANCE(float16, scaled_float16_distance, true)
VAREID_EXACT_DISTANCE(bfloat16, bfloat16_distance, false)
VAREID_EXACT_DISTANCE(bfloat16, scaled_bfloat16_distance, true)
#undef VAREID_EXACT_DISTANCE

}  // namespace

ExactDistance exact_distance_function(DType dtype, bool scaled) {
  switch (dtype) {
    case DType::kFloat32:
      return scaled ? &scaled_float32_distance : &float32_distance;
    case DType::kFloat64:
      return scaled ? &scaled_float64_distance : &float64_distance;
    case DType::kFloat16:
      return scaled ? &scaled_float16_distance : &float16_distance;
    case DType::kBFloat16:
      return scaled ? &scaled_bfloat16_distance : &bfloat16_distance;
  }
  return nullptr;
}

ExactDistances exact_distances_function(DType dtype, bool scaled) {
  switch (dtype) {
    case DType::kFloat32:
      return scaled ? &scaled_float32_distances : &float32_distances;
    case DType::kFloat64:
      return scaled ? &scaled_float64_distances : &float64_distances;
    case DType::kFloat16:
      return scaled ? &scaled_float16_distances : &float16_distances;
    case DType::kBFloat16:
      return scaled ? &scaled_bfloat16_distances : &bfloat16_distances;
  }
  return nullptr;
}

}  // namespace vareid
