// Squared distances as float64 sums of squared differences, by one warp. The sums are those of
// csrc/cpu/exact_distance.cpp, in the same order and never fused, so both give the same bits.
#pragma once

#include "cuda/reduce.cuh"
#include "cuda/vector.cuh"

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
DeviceRows<T> device_rows(const void* first, const double* first_factor, int64_t first_rows, int64_t first_stride,
                          const void* second = nullptr, const double* second_factor = nullptr,
                          int64_t second_stride = 0) {
  return {static_cast<const T*>(first),  first_factor,  first_rows,   first_stride,
          static_cast<const T*>(second), second_factor, second_stride};
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

}  // namespace vareid
