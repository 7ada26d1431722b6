// Squared distances as float64 sums of squared differences, by one warp. The sums are those of
// csrc/cpu/exact_distance.cpp, in the same order and never fused, so both give the same bits.
#pragma once

#include "cuda/reduce.cuh"
#include "cuda/vector.cuh"
#include "pairwise_distance.h"

namespace vareid {

// One or two sets of features whose rows are numbered together, on the device.
template <typename T>
struct DeviceRows {
  const T* first;
  const double* first_factor;
  int64_t first_rows, first_stride;
  const T* second;
  const double* second_factor;
  int64_t second_stride;

  __device__ __forceinline__ const T* row(int64_t i) const {
    return i < first_rows ? first + i * first_stride : second + (i - first_rows) * second_stride;
  }
  __device__ __forceinline__ double factor(int64_t i) const {
    if (!first_factor) return 1.0;
    return i < first_rows ? first_factor[i] : second_factor[i - first_rows];
  }
};

template <typename T>
DeviceRows<T> device_rows(const Features& first, const Features& second = {}) {
  return {static_cast<const T*>(first.data),  first.factor,  first.rows,   first.stride,
          static_cast<const T*>(second.data), second.factor, second.stride};
}

// The result is in every lane; all lanes of the warp take part.
template <typename T>
__device__ __forceinline__ double warp_exact_distance(const T* __restrict__ x, double a, const T* __restrict__ y,
                                                      double b, int64_t D) {
  double sum = 0;
  for (int64_t d = threadIdx.x % kWarp; d < D; d += kWarp) {
    const double u = __dmul_rn(a, static_cast<double>(widen(x[d])));
    const double v = __dmul_rn(b, static_cast<double>(widen(y[d])));
    const double difference = __dsub_rn(u, v);
    sum = __dadd_rn(sum, __dmul_rn(difference, difference));
  }
  return warp_sum(sum);
}

template <typename T>
__device__ __forceinline__ double warp_exact_distance(const DeviceRows<T>& x, int64_t i, const DeviceRows<T>& y,
                                                      int64_t j, int64_t D) {
  return warp_exact_distance(x.row(i), x.factor(i), y.row(j), y.factor(j), D);
}

// Row i against rows of y that stand in lanes: the lanes in `pending` each get the distance to their own row j. Row i
// is read once for every kTogether of them.
constexpr int kTogether = 8;
template <typename T>
__device__ __forceinline__ double warp_exact_distances(const DeviceRows<T>& x, int64_t i, const DeviceRows<T>& y,
                                                       int64_t j, unsigned pending, int64_t D) {
  const int lane = threadIdx.x % kWarp;
  const T* const left = x.row(i);
  const double a = x.factor(i);
  double result = 0;
  while (pending) {
    const int count = min(kTogether, __popc(pending));
    const T* right[kTogether];
    double b[kTogether], sum[kTogether];
    int source[kTogether];
#pragma unroll
    for (int t = 0; t < kTogether; ++t) {
      source[t] = t < count ? __ffs(static_cast<int>(pending)) - 1 : lane;
      if (t < count) pending &= pending - 1;
      const int64_t row = __shfl_sync(kFullWarp, static_cast<long long>(j), source[t]);
      right[t] = t < count ? y.row(row) : left;
      b[t] = t < count ? y.factor(row) : 0.0;
      sum[t] = 0;
    }
    for (int64_t d = lane; d < D; d += kWarp) {
      const double u = __dmul_rn(a, static_cast<double>(widen(left[d])));
#pragma unroll
      for (int t = 0; t < kTogether; ++t) {
        if (t < count) {
          const double difference = __dsub_rn(u, __dmul_rn(b[t], static_cast<double>(widen(right[t][d]))));
          sum[t] = __dadd_rn(sum[t], __dmul_rn(difference, difference));
        }
      }
    }
#pragma unroll
    for (int t = 0; t < kTogether; ++t) {
      if (t < count) {
        const double total = warp_sum(sum[t]);
        if (lane == source[t]) result = total;
      }
    }
  }
  return result;
}

}  // namespace vareid
