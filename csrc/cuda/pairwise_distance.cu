#include "pairwise_distance.h"

#include <cmath>

#include "cuda/exact_distance.cuh"
#include "cuda/launch.h"

namespace vareid {
namespace {

constexpr int kRowThreads = 128;  // one warp for each row
constexpr int kRowWarps = kRowThreads / kWarp;
constexpr int kTile = 32;  // rows and columns finished by one block
constexpr int kTileWarps = 8;
constexpr int kProductTile = 64;            // rows and columns of a block's products, 4 x 4 for each of 256 threads
constexpr int kDepth = 16;                  // elements of a feature held in shared memory at once
constexpr float kCancellation = 1.0f / 32;  // as in csrc/cpu/pairwise_distance.cpp
constexpr float kFlushed = 0x1p-60f;        // likewise

__device__ __forceinline__ double double_from_bits(unsigned long long bits) { return __longlong_as_double(bits); }

template <typename T>
__global__ void pairwise_distance_max_abs_kernel(const T* __restrict__ x, double* __restrict__ max_abs, int64_t rows,
                                                 int64_t D, int64_t stride) {
  const int lane = threadIdx.x % kWarp;
  for (int64_t r = blockIdx.x * static_cast<int64_t>(kRowWarps) + threadIdx.x / kWarp; r < rows;
       r += static_cast<int64_t>(gridDim.x) * kRowWarps) {
    double largest = 0, poison = 0;
    for (int64_t d = lane; d < D; d += kWarp) {
      const double value = widen(x[r * stride + d]);
      poison += value * 0;  // 0, or NaN for NaN and Inf
      largest = fmax(largest, fabs(value));
    }
    poison = warp_sum(poison);
    for (int offset = kWarp / 2; offset > 0; offset /= 2)
      largest = fmax(largest, __shfl_xor_sync(kFullWarp, largest, offset));
    if (lane == 0) max_abs[r] = poison == 0 ? largest : double_from_bits(0x7ff8000000000000ull);
  }
}

template <typename T>
__global__ void pairwise_distance_norm_kernel(const T* __restrict__ x, const double* __restrict__ factor,
                                              double* __restrict__ norm, int64_t rows, int64_t D, int64_t stride) {
  const int lane = threadIdx.x % kWarp;
  for (int64_t r = blockIdx.x * static_cast<int64_t>(kRowWarps) + threadIdx.x / kWarp; r < rows;
       r += static_cast<int64_t>(gridDim.x) * kRowWarps) {
    const double scale = factor ? factor[r] : 1.0;
    double sum = 0;
    for (int64_t d = lane; d < D; d += kWarp) {
      const double value = scale * widen(x[r * stride + d]);
      sum += value * value;
    }
    sum = warp_sum(sum);
    if (lane == 0) norm[r] = sum;
  }
}

template <typename T>
__global__ void pairwise_distance_prepare_kernel(const T* __restrict__ x, const double* __restrict__ factor,
                                                 const double* __restrict__ center, float* __restrict__ out,
                                                 float* __restrict__ norm, int64_t rows, int64_t D, int64_t stride) {
  const int lane = threadIdx.x % kWarp;
  for (int64_t r = blockIdx.x * static_cast<int64_t>(kRowWarps) + threadIdx.x / kWarp; r < rows;
       r += static_cast<int64_t>(gridDim.x) * kRowWarps) {
    const double scale = factor ? factor[r] : 1.0;
    double sum = 0;
    for (int64_t d = lane; d < D; d += kWarp) {
      const float value = static_cast<float>(scale * widen(x[r * stride + d]) - (center ? center[d] : 0.0));
      out[r * D + d] = value;
      sum += static_cast<double>(value) * value;
    }
    sum = warp_sum(sum);
    if (lane == 0) norm[r] = static_cast<float>(sum);
  }
}

// A product becomes a distance; `sum` is that of the two norms. All lanes of a warp call together, each with a pair of
// its own or with valid false.
template <typename T>
__device__ __forceinline__ float finish_distance(float product, float sum, bool valid, int64_t i, int64_t j,
                                                 const DeviceRows<T>& x, const DeviceRows<T>& y, int64_t D, bool rooted,
                                                 double scale) {
  const float squared = fmaxf(sum - 2 * product, 0.0f);
  unsigned again = __ballot_sync(kFullWarp, valid && squared < fmaxf(kCancellation * sum, kFlushed));
  float distance = rooted ? sqrtf(squared) : squared;
  if (scale != 1) distance = static_cast<float>(distance * scale);
  while (again) {
    const int lane = __ffs(again) - 1;
    again &= again - 1;
    const int64_t row = __shfl_sync(kFullWarp, static_cast<long long>(i), lane);
    const int64_t column = __shfl_sync(kFullWarp, static_cast<long long>(j), lane);
    const double exact = warp_exact_distance(x, row, y, column, D);
    if (static_cast<int>(threadIdx.x % kWarp) == lane)
      distance = static_cast<float>((rooted ? sqrt(exact) : exact) * scale);
  }
  return distance;
}

template <typename T>
__global__ void pairwise_distance_block_kernel(float* __restrict__ block, int64_t ld, DeviceRows<T> x, DeviceRows<T> y,
                                               int64_t rows, int64_t columns, int64_t D,
                                               const float* __restrict__ x_norm, const float* __restrict__ y_norm,
                                               bool rooted, double scale, float* __restrict__ mirror,
                                               int64_t mirror_ld) {
  __shared__ float tile[kTile][kTile + 1];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t r0 = static_cast<int64_t>(blockIdx.y) * kTile, c0 = static_cast<int64_t>(blockIdx.x) * kTile;
  const int64_t c = c0 + lane;
  const float column_norm = c < columns ? y_norm[c] : 0.0f;
  for (int t = warp; t < kTile; t += kTileWarps) {
    const int64_t r = r0 + t;
    const bool valid = r < rows && c < columns;
    const float sum = valid ? x_norm[r] + column_norm : 0.0f;
    const float distance = finish_distance(valid ? block[r * ld + c] : 0.0f, sum, valid, r, c, x, y, D, rooted, scale);
    if (valid) block[r * ld + c] = distance;
    tile[t][lane] = distance;
  }
  if (!mirror) return;
  __syncthreads();
  for (int t = warp; t < kTile; t += kTileWarps)
    if (c0 + t < columns && r0 + lane < rows) mirror[(c0 + t) * mirror_ld + r0 + lane] = tile[lane][t];
}

template <typename T>
__global__ void pairwise_distance_tiled_kernel(const float* __restrict__ p, const float* __restrict__ q,
                                               float* __restrict__ block, int64_t ld, DeviceRows<T> x, DeviceRows<T> y,
                                               int64_t rows, int64_t columns, int64_t D,
                                               const float* __restrict__ x_norm, const float* __restrict__ y_norm,
                                               bool rooted, double scale) {
  __shared__ float left[kDepth][kProductTile + 2], right[kDepth][kProductTile + 2];
  const int tx = threadIdx.x % 16, ty = threadIdx.x / 16;
  const int64_t r0 = static_cast<int64_t>(blockIdx.y) * kProductTile,
                c0 = static_cast<int64_t>(blockIdx.x) * kProductTile;
  float sums[4][4] = {};
  for (int64_t d0 = 0; d0 < D; d0 += kDepth) {
    for (int at = threadIdx.x; at < kDepth * kProductTile; at += 256) {
      const int d = at % kDepth, r = at / kDepth;
      const bool inside = d0 + d < D;
      left[d][r] = inside && r0 + r < rows ? p[(r0 + r) * D + d0 + d] : 0.0f;
      right[d][r] = inside && c0 + r < columns ? q[(c0 + r) * D + d0 + d] : 0.0f;
    }
    __syncthreads();
#pragma unroll
    for (int d = 0; d < kDepth; ++d) {
      float a[4], b[4];
#pragma unroll
      for (int t = 0; t < 4; ++t) {
        a[t] = left[d][ty + 16 * t];
        b[t] = right[d][tx + 16 * t];
      }
#pragma unroll
      for (int i = 0; i < 4; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) sums[i][j] += a[i] * b[j];
    }
    __syncthreads();
  }
  float column_norm[4];
#pragma unroll
  for (int j = 0; j < 4; ++j) column_norm[j] = c0 + tx + 16 * j < columns ? y_norm[c0 + tx + 16 * j] : 0.0f;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int64_t r = r0 + ty + 16 * i;
    const float row_norm = r < rows ? x_norm[r] : 0.0f;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int64_t c = c0 + tx + 16 * j;
      const bool valid = r < rows && c < columns;
      const float distance =
          finish_distance(sums[i][j], row_norm + column_norm[j], valid, r, c, x, y, D, rooted, scale);
      if (valid) block[r * ld + c] = distance;
    }
  }
}

unsigned row_grid(int64_t rows) { return grid_size(std::min<int64_t>((rows + kRowWarps - 1) / kRowWarps, 1 << 20)); }

double metric_scale(Metric metric, double unscale) {
  return metric == Metric::kEuclidean ? unscale : metric == Metric::kCosine ? 0.5 : unscale * unscale;
}

// Tiles along the columns (up to 2^31 - 1) and the rows (up to 65,535).
dim3 tile_grid(int64_t rows, int64_t columns, int64_t tile) {
  if ((rows + tile - 1) / tile > 65535) throw std::invalid_argument("block: more rows than a grid holds");
  return dim3(static_cast<unsigned>((columns + tile - 1) / tile), static_cast<unsigned>((rows + tile - 1) / tile));
}

}  // namespace

void pairwise_distance_max_abs_cuda(const Features& x, DType dtype, int64_t D, double* max_abs, const Place& place) {
  if (x.rows == 0) return;
  const DeviceGuard guard(place.device);
  dispatch_device_float(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    launch(pairwise_distance_max_abs_kernel<T>, row_grid(x.rows), kRowThreads, 0,
           static_cast<cudaStream_t>(place.stream), static_cast<const T*>(x.data), max_abs, x.rows, D, x.stride);
  });
}

void pairwise_distance_norm_cuda(const Features& x, DType dtype, int64_t D, double* norm, const Place& place) {
  if (x.rows == 0) return;
  const DeviceGuard guard(place.device);
  dispatch_device_float(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    launch(pairwise_distance_norm_kernel<T>, row_grid(x.rows), kRowThreads, 0, static_cast<cudaStream_t>(place.stream),
           static_cast<const T*>(x.data), x.factor, norm, x.rows, D, x.stride);
  });
}

void pairwise_distance_prepare_cuda(const Features& x, DType dtype, int64_t D, const double* center, float* out,
                                    float* norm, const Place& place) {
  if (x.rows == 0) return;
  const DeviceGuard guard(place.device);
  dispatch_device_float(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    launch(pairwise_distance_prepare_kernel<T>, row_grid(x.rows), kRowThreads, 0,
           static_cast<cudaStream_t>(place.stream), static_cast<const T*>(x.data), x.factor, center, out, norm, x.rows,
           D, x.stride);
  });
}

void pairwise_distance_block_cuda(float* block, int64_t ld, const Features& x, const Features& y, DType dtype,
                                  int64_t D, const float* x_norm, const float* y_norm, Metric metric, double unscale,
                                  float* mirror, int64_t mirror_ld, const Place& place) {
  if (x.rows == 0 || y.rows == 0) return;
  const DeviceGuard guard(place.device);
  dispatch_device_float(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    launch(pairwise_distance_block_kernel<T>, tile_grid(x.rows, y.rows, kTile), kTileWarps * kWarp, 0,
           static_cast<cudaStream_t>(place.stream), block, ld, device_rows<T>(x), device_rows<T>(y), x.rows, y.rows, D,
           x_norm, y_norm, metric == Metric::kEuclidean, metric_scale(metric, unscale), mirror, mirror_ld);
  });
}

void pairwise_distance_tiled_cuda(const float* x_prepared, const float* y_prepared, float* block, int64_t ld,
                                  const Features& x, const Features& y, DType dtype, int64_t D, const float* x_norm,
                                  const float* y_norm, Metric metric, double unscale, const Place& place) {
  if (x.rows == 0 || y.rows == 0) return;
  const DeviceGuard guard(place.device);
  dispatch_device_float(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    launch(pairwise_distance_tiled_kernel<T>, tile_grid(x.rows, y.rows, kProductTile), 256, 0,
           static_cast<cudaStream_t>(place.stream), x_prepared, y_prepared, block, ld, device_rows<T>(x),
           device_rows<T>(y), x.rows, y.rows, D, x_norm, y_norm, metric == Metric::kEuclidean,
           metric_scale(metric, unscale));
  });
}

}  // namespace vareid
