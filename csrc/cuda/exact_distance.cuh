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
#pragma unroll 4
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

// Row i against the rows of y that stand in the first kCount lanes of `pending`; their lanes get the distances.
template <int kCount, typename T>
__device__ __forceinline__ void warp_exact_some(const T* __restrict__ left, double a, const DeviceRows<T>& y, int64_t j,
                                                unsigned& pending, int64_t D, double& result) {
  const int lane = threadIdx.x % kWarp;
  const T* right[kCount];
  double b[kCount], sum[kCount];
  int source[kCount];
#pragma unroll
  for (int t = 0; t < kCount; ++t) {
    source[t] = __ffs(static_cast<int>(pending)) - 1;
    pending &= pending - 1;
    const int64_t row = __shfl_sync(kFullWarp, static_cast<long long>(j), source[t]);
    right[t] = y.row(row);
    b[t] = y.factor(row);
    sum[t] = 0;
  }
#pragma unroll 2
  for (int64_t d = lane; d < D; d += kWarp) {
    T own = left[d], other[kCount];  // all loads under way before the first is used
#pragma unroll
    for (int t = 0; t < kCount; ++t) other[t] = right[t][d];
    const double u = __dmul_rn(a, static_cast<double>(widen(own)));
#pragma unroll
    for (int t = 0; t < kCount; ++t) {
      const double difference = __dsub_rn(u, __dmul_rn(b[t], static_cast<double>(widen(other[t]))));
      sum[t] = __dadd_rn(sum[t], __dmul_rn(difference, difference));
    }
  }
#pragma unroll
  for (int t = 0; t < kCount; ++t) {
    const double total = warp_sum(sum[t]);
    if (lane == source[t]) result = total;
  }
}

// Row i against rows of y that stand in lanes: the lanes in `pending` each get the distance to their own row j. Row i
// is read once for up to eight of them.
template <typename T>
__device__ __forceinline__ double warp_exact_distances(const DeviceRows<T>& x, int64_t i, const DeviceRows<T>& y,
                                                       int64_t j, unsigned pending, int64_t D) {
  const T* const left = x.row(i);
  const double a = x.factor(i);
  double result = 0;
  while (pending) {
    const int count = __popc(pending);
    if (count >= 8)
      warp_exact_some<8>(left, a, y, j, pending, D, result);
    else if (count >= 4)
      warp_exact_some<4>(left, a, y, j, pending, D, result);
    else if (count >= 2)
      warp_exact_some<2>(left, a, y, j, pending, D, result);
    else
      warp_exact_some<1>(left, a, y, j, pending, D, result);
  }
  return result;
}

}  // namespace vareid
