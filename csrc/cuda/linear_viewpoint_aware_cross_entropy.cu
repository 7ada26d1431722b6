#include "linear_viewpoint_aware_cross_entropy.h"

#include <stdexcept>

#include "cuda/cross_entropy_rows.cuh"
#include "cuda/launch.h"

namespace vareid {
namespace {

// One block for each part of a row.
template <typename T, int kWidth>
__global__ void linear_viewpoint_aware_cross_entropy_summarise_kernel(DeviceRows<T> rows,
                                                                      const int64_t* __restrict__ identity, int64_t N,
                                                                      int64_t K, OthersSummary* __restrict__ summaries,
                                                                      int64_t total_parts,
                                                                      double* __restrict__ own_logits) {
  const int64_t i = blockIdx.x / rows.parts;
  const int64_t index = blockIdx.x - i * rows.parts;
  summarise_part<T, kWidth>(rows, N, i, index, identity_or_none(identity, i, K), summaries + i * total_parts + index,
                            own_logits);
}

template <typename Acc>
__global__ void linear_viewpoint_aware_cross_entropy_finish_kernel(DeviceFinish<Acc> head, int64_t N) {
  finish_rows(head, N);
}

template <typename T, int kWidth>
__global__ void linear_viewpoint_aware_cross_entropy_gradient_kernel(DeviceRows<T> rows, DeviceLabels labels,
                                                                     int64_t N) {
  const int64_t i = blockIdx.x / rows.parts;
  const int64_t y = identity_or_none(labels.identity, i, labels.identities);
  differentiate_part<T, kWidth>(rows, N, i, blockIdx.x - i * rows.parts, y, labels.views_of(i, y));
}

// One block for each row.
template <typename T, int kWidth>
__global__ void linear_viewpoint_aware_cross_entropy_inverse_norms_kernel(
    const T* __restrict__ x, typename DeviceAccumulator<T>::type* __restrict__ inverse, int64_t D) {
  using Acc = typename DeviceAccumulator<T>::type;
  __shared__ Acc partial[1][kRowWarps + 1];
  const T* const row = x + blockIdx.x * D;
  Acc sums[1] = {0};
  for (int64_t d = static_cast<int64_t>(threadIdx.x) * kWidth; d < D; d += static_cast<int64_t>(blockDim.x) * kWidth) {
    const Pack<T, kWidth> pack = load_pack<T, kWidth>(row + d);
#pragma unroll
    for (int k = 0; k < kWidth; ++k) sums[0] += widen(pack.value[k]) * widen(pack.value[k]);
  }
  const Acc total = block_sums<1, kRowWarps>(sums, partial);
  if (threadIdx.x == 0) inverse[blockIdx.x] = total == Acc(0) ? Acc(0) : 1 / sqrt(total);
}

// One block for each row. What its threads can hold of a row is read once; the rest twice, the second time from the
// cache.
template <typename T, int kWidth>
__global__ void linear_viewpoint_aware_cross_entropy_project_kernel(
    const T* __restrict__ x, const typename DeviceAccumulator<T>::type* __restrict__ inverse, T* __restrict__ grad,
    int64_t D) {
  using Acc = typename DeviceAccumulator<T>::type;
  __shared__ Acc partial[1][kRowWarps + 1];
  __shared__ Acc along;
  const T* const row = x + blockIdx.x * D;
  T* const slope = grad + blockIdx.x * D;
  const int64_t first = static_cast<int64_t>(threadIdx.x) * kWidth, step = static_cast<int64_t>(blockDim.x) * kWidth;
  const int64_t beyond = first + kRowBatch * step;
  const auto dot = [](const Pack<T, kWidth>& a, const Pack<T, kWidth>& b) {
    Acc sum = 0;
#pragma unroll
    for (int k = 0; k < kWidth; ++k) sum += widen(a.value[k]) * widen(b.value[k]);
    return sum;
  };
  const auto subtract = [](const Pack<T, kWidth>& a, Pack<T, kWidth>& b, Acc factor) {
#pragma unroll
    for (int k = 0; k < kWidth; ++k) b.value[k] = narrow<T>(widen(b.value[k]) - factor * widen(a.value[k]));
  };
  Pack<T, kWidth> held[kRowBatch], held_slope[kRowBatch];
  Acc sums[1] = {0};
#pragma unroll
  for (int h = 0; h < kRowBatch; ++h) {
    if (first + h * step >= D) continue;
    held[h] = load_pack<T, kWidth>(row + first + h * step);
    held_slope[h] = load_pack<T, kWidth>(slope + first + h * step);
  }
#pragma unroll
  for (int h = 0; h < kRowBatch; ++h)
    if (first + h * step < D) sums[0] += dot(held[h], held_slope[h]);
  for (int64_t d = beyond; d < D; d += step)
    sums[0] += dot(load_pack<T, kWidth>(row + d), load_pack<T, kWidth>(slope + d));
  const Acc total = block_sums<1, kRowWarps>(sums, partial);
  if (threadIdx.x == 0) along = total * inverse[blockIdx.x] * inverse[blockIdx.x];
  __syncthreads();
#pragma unroll
  for (int h = 0; h < kRowBatch; ++h) {
    if (first + h * step >= D) continue;
    subtract(held[h], held_slope[h], along);
    store_pack<T, kWidth>(slope + first + h * step, held_slope[h]);
  }
  for (int64_t d = beyond; d < D; d += step) {
    Pack<T, kWidth> b = load_pack<T, kWidth>(slope + d);
    subtract(load_pack<T, kWidth>(row + d), b, along);
    store_pack<T, kWidth>(slope + d, b);
  }
}

template <typename T>
DeviceRows<T> rows_of(const LogitsTile& tile) {
  using Acc = typename DeviceAccumulator<T>::type;
  DeviceRows<T> rows = {};
  rows.logits = static_cast<const T*>(tile.logits);
  rows.grad = static_cast<T*>(tile.logits);
  rows.mask = tile.mask ? tile.mask + tile.first * tile.views : nullptr;
  rows.scale = static_cast<const Acc*>(tile.scale);
  rows.row_stride = rows.grad_stride = tile.row_stride;
  rows.columns = tile.identities * tile.views;
  rows.first = tile.first * tile.views;
  rows.views = tile.views;
  cut_rows(rows, tile.N);
  return rows;
}

DeviceLabels labels_of(const LogitsTile& tile) {
  return {tile.identity, tile.viewpoint, tile.distribution, tile.mask, tile.K, tile.views};
}

void check_rows(int64_t rows) {
  if (rows > kMostBlocks) throw std::invalid_argument("identity_centers: at most 2^31 - 1 centres on a GPU");
}

// Calls body(type, width) with 16-byte accesses where rows of D elements at these addresses allow them.
template <typename Body>
void with_width(DType dtype, int64_t D, std::initializer_list<const void*> pointers, const Body& body) {
  dispatch_device_float(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    if (rows_are_packed<T>(D, pointers))
      body(type, std::integral_constant<int, 16 / sizeof(T)>{});
    else
      body(type, std::integral_constant<int, 1>{});
  });
}

template <typename T, int kWidth>
__global__ void linear_viewpoint_aware_cross_entropy_scale_kernel(
    T* __restrict__ grad, const typename DeviceAccumulator<T>::type* __restrict__ factor, int64_t n) {
  const typename DeviceAccumulator<T>::type by = *factor;
  if (by == 1) return;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kRowThreads * kWidth;
  for (int64_t i = (blockIdx.x * static_cast<int64_t>(kRowThreads) + threadIdx.x) * kWidth; i < n; i += step) {
    Pack<T, kWidth> pack = load_pack<T, kWidth>(grad + i);
#pragma unroll
    for (int k = 0; k < kWidth; ++k) pack.value[k] = narrow<T>(widen(pack.value[k]) * by);
    store_pack<T, kWidth>(grad + i, pack);
  }
}

}  // namespace

int64_t linear_viewpoint_aware_cross_entropy_parts_cuda(int64_t N, int64_t columns) {
  DeviceRows<float> rows = {};
  rows.columns = columns;
  cut_rows(rows, N);
  return rows.parts;
}

void linear_viewpoint_aware_cross_entropy_summarise_cuda(const LogitsTile& tile, OthersSummary* summaries,
                                                         int64_t total_parts, int64_t first_part, double* own_logits,
                                                         DType dtype, const Place& place) {
  check_samples(tile.N);
  if (tile.N == 0) return;
  const DeviceGuard guard(place.device);
  dispatch_device_float(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    constexpr int kWidth = 16 / sizeof(T);
    const DeviceRows<T> rows = rows_of<T>(tile);
    launch(linear_viewpoint_aware_cross_entropy_summarise_kernel<T, kWidth>, dim3(grid_size(tile.N * rows.parts)),
           dim3(row_threads(rows.columns, kWidth)), 0, static_cast<cudaStream_t>(place.stream), rows, tile.identity,
           tile.N, tile.K, summaries + first_part, total_parts, own_logits);
  });
}

void linear_viewpoint_aware_cross_entropy_finish_cuda(const LogitsTile& tile, const OthersSummary* summaries,
                                                      int64_t total_parts, const double* own_logits,
                                                      const Smoothing& smoothing, double* statistics, void* loss,
                                                      int64_t* label_error, DType dtype, const Place& place) {
  const DeviceGuard guard(place.device);
  const auto run = [&](auto type) {
    using Acc = decltype(type);
    const DeviceFinish<Acc> head = {
        summaries, total_parts, own_logits, labels_of(tile), smoothing, statistics, static_cast<Acc*>(loss),
        true,      1.0,         label_error};
    launch(linear_viewpoint_aware_cross_entropy_finish_kernel<Acc>, dim3(1), dim3(kRowThreads), 0,
           static_cast<cudaStream_t>(place.stream), head, tile.N);
  };
  if (dtype == DType::kFloat64)
    run(double{});
  else
    run(float{});
}

void linear_viewpoint_aware_cross_entropy_gradient_cuda(const LogitsTile& tile, const double* statistics,
                                                        const void* upstream, int64_t upstream_stride, double share,
                                                        DType dtype, const Place& place) {
  check_samples(tile.N);
  if (tile.N == 0) return;
  const DeviceGuard guard(place.device);
  dispatch_device_float(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    constexpr int kWidth = 16 / sizeof(T);
    DeviceRows<T> rows = rows_of<T>(tile);
    rows.statistics = statistics;
    rows.upstream = static_cast<const typename DeviceAccumulator<T>::type*>(upstream);
    rows.upstream_stride = upstream_stride;
    rows.share = share;
    launch(linear_viewpoint_aware_cross_entropy_gradient_kernel<T, kWidth>, dim3(grid_size(tile.N * rows.parts)),
           dim3(row_threads(rows.columns, kWidth)), 0, static_cast<cudaStream_t>(place.stream), rows, labels_of(tile),
           tile.N);
  });
}

void linear_viewpoint_aware_cross_entropy_inverse_norms_cuda(const void* x, void* inverse, int64_t rows, int64_t D,
                                                             DType dtype, const Place& place) {
  check_rows(rows);
  if (rows == 0) return;
  const DeviceGuard guard(place.device);
  with_width(dtype, D, {x}, [&](auto type, auto width) {
    using T = typename decltype(type)::type;
    launch(linear_viewpoint_aware_cross_entropy_inverse_norms_kernel<T, width.value>, dim3(grid_size(rows)),
           dim3(row_threads(D, width.value)), 0, static_cast<cudaStream_t>(place.stream), static_cast<const T*>(x),
           static_cast<typename DeviceAccumulator<T>::type*>(inverse), D);
  });
}

void linear_viewpoint_aware_cross_entropy_project_cuda(const void* x, const void* inverse, void* grad, int64_t rows,
                                                       int64_t D, DType dtype, const Place& place) {
  check_rows(rows);
  if (rows == 0) return;
  const DeviceGuard guard(place.device);
  with_width(dtype, D, {x, grad}, [&](auto type, auto width) {
    using T = typename decltype(type)::type;
    launch(linear_viewpoint_aware_cross_entropy_project_kernel<T, width.value>, dim3(grid_size(rows)),
           dim3(row_threads(D, width.value)), 0, static_cast<cudaStream_t>(place.stream), static_cast<const T*>(x),
           static_cast<const typename DeviceAccumulator<T>::type*>(inverse), static_cast<T*>(grad), D);
  });
}

void linear_viewpoint_aware_cross_entropy_scale_cuda(void* grad, const void* factor, int64_t n, DType dtype,
                                                     const Place& place) {
  if (n == 0) return;
  const DeviceGuard guard(place.device);
  with_width(dtype, n, {grad}, [&](auto type, auto width) {
    using T = typename decltype(type)::type;
    const int64_t blocks = n / (kRowThreads * width.value) + 1;
    launch(linear_viewpoint_aware_cross_entropy_scale_kernel<T, width.value>,
           dim3(grid_size(std::min<int64_t>(blocks, 1 << 14))), dim3(kRowThreads), 0,
           static_cast<cudaStream_t>(place.stream), static_cast<T*>(grad),
           static_cast<const typename DeviceAccumulator<T>::type*>(factor), n);
  });
}

}  // namespace vareid
