#include "nearest_neighbors.h"

#include <cmath>
#include <stdexcept>

#include "cuda/exact_distance.cuh"
#include "cuda/launch.h"

namespace vareid {
namespace {

constexpr int kCapacity = static_cast<int>(kCudaMaxCapacity);
constexpr int kListWarps = 4;  // rows for each block, in selecting
constexpr int kRowWarps = 8;   // and in scanning
constexpr int kRowThreads = kRowWarps * kWarp;
constexpr int kColumnWarps = 32;  // columns for each block
constexpr int kRescanThreads = 256;

// One row's candidates, held by a warp: every lane carries the same count, threshold and cut.
struct List {
  float* lower;
  int32_t* index;
  int count;
  float threshold, cut;
};

__device__ __forceinline__ unsigned lanes_below() { return (1u << (threadIdx.x % kWarp)) - 1; }

// Keeps the entries for which keep(c) holds, in order.
template <typename Keep>
__device__ __forceinline__ void filter_list(List& list, const Keep& keep) {
  const int lane = threadIdx.x % kWarp;
  int kept = 0;
  for (int base = 0; base < list.count; base += kWarp) {
    const int c = base + lane;
    const bool inside = c < list.count;
    const float lower = inside ? list.lower[c] : 0.0f;
    const int32_t index = inside ? list.index[c] : 0;
    const bool stays = inside && keep(c, lower);
    const unsigned mask = __ballot_sync(kFullWarp, stays);
    __syncwarp();
    if (stays) {
      const int at = kept + __popc(mask & lanes_below());
      list.lower[at] = lower;
      list.index[at] = index;
    }
    kept += __popc(mask);
    __syncwarp();
  }
  list.count = kept;
}

// How many of values[0..count) come before values[c], equal ones in order.
template <typename T>
__device__ __forceinline__ int rank_of(const T* values, int count, int c) {
  int rank = 0;
  for (int other = 0; other < count; ++other)
    rank += values[other] < values[c] || (values[other] == values[c] && other < c);
  return rank;
}

// The value of this rank among values[0..count) in shared memory.
__device__ __forceinline__ float value_of_rank(const float* values, int count, int rank) {
  float result = 0;
  for (int base = 0; base < count; base += kWarp) {
    const int c = base + static_cast<int>(threadIdx.x % kWarp);
    const bool here = c < count && rank_of(values, count, c) == rank;
    const unsigned mask = __ballot_sync(kFullWarp, here);
    if (mask) result = __shfl_sync(kFullWarp, here ? values[c] : 0.0f, __ffs(mask) - 1);
  }
  return result;
}

// Drops what is beyond the k-th smallest upper bound, and what does not fit; as in csrc/cpu/nearest_neighbors.cpp.
__device__ void compact(List& list, int k, int capacity, float window, const float* __restrict__ other_window,
                        float* scratch) {
  const int lane = threadIdx.x % kWarp;
  for (int c = lane; c < list.count; c += kWarp)
    scratch[c] = list.lower[c] + 2 * (window + other_window[list.index[c]]);
  __syncwarp();
  float threshold = value_of_rank(scratch, list.count, k - 1);
  filter_list(list, [&](int, float lower) { return lower <= threshold; });
  const int limit = capacity - (capacity - k) / 2;
  if (list.count > limit) {
    for (int c = lane; c < list.count; c += kWarp) scratch[c] = list.lower[c];
    __syncwarp();
    const int count = list.count;
    const float lost = value_of_rank(scratch, count, limit);
    list.cut = fminf(list.cut, lost);
    filter_list(list, [&](int c, float) { return rank_of(scratch, count, c) < limit; });
    threshold = nextafterf(lost, -INFINITY);
  }
  list.threshold = fminf(list.threshold, threshold);
}

// Takes one entry from each lane, where `lower` (without the row's own norm) does not exceed the threshold.
__device__ __forceinline__ void offer(List& list, bool valid, float partial, float shrunk, int64_t index, int k,
                                      int capacity, float window, const float* __restrict__ other_window,
                                      float* scratch) {
  bool hit = valid && partial <= list.threshold - shrunk;
  unsigned pending = __ballot_sync(kFullWarp, hit);
  while (pending) {
    const int space = capacity - list.count, at = __popc(pending & lanes_below());
    const bool taken = hit && at < space;
    if (taken) {
      list.lower[list.count + at] = partial + shrunk;
      list.index[list.count + at] = static_cast<int32_t>(index);
    }
    list.count += min(__popc(pending), space);
    __syncwarp();
    if (list.count == capacity) compact(list, k, capacity, window, other_window, scratch);
    hit = hit && !taken && partial <= list.threshold - shrunk;
    pending = __ballot_sync(kFullWarp, hit);
  }
}

struct State {
  float* lower;
  int32_t* index;
  int32_t* count;
  float* threshold;
  float* cut;
  float* row_max;
  int64_t capacity;
  int k;

  __device__ __forceinline__ List open(int64_t row) const {
    return {lower + row * capacity, index + row * capacity, count[row], threshold[row], cut[row]};
  }
  __device__ __forceinline__ void close(int64_t row, const List& list, float largest) const {
    if (threadIdx.x % kWarp != 0) return;
    count[row] = list.count;
    threshold[row] = list.threshold;
    cut[row] = list.cut;
    row_max[row] = fmaxf(row_max[row], largest);
  }
};

__device__ __forceinline__ float warp_max(float value) {
  for (int offset = kWarp / 2; offset > 0; offset /= 2) value = fmaxf(value, __shfl_xor_sync(kFullWarp, value, offset));
  return value;
}

// One warp for each row of the block; the block's warps share the columns' bounds.
__global__ void nearest_neighbors_scan_rows_kernel(float* __restrict__ block, int64_t ld, int64_t rows, int64_t columns,
                                                   int64_t row_begin, int64_t column_begin,
                                                   const float* __restrict__ left_norm,
                                                   const float* __restrict__ left_window,
                                                   const float* __restrict__ right_norm,
                                                   const float* __restrict__ right_window, State state, bool write) {
  __shared__ float scratch[kRowWarps][kCapacity];
  __shared__ float norms[kRowThreads], shrunks[kRowThreads];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t r = blockIdx.x * static_cast<int64_t>(kRowWarps) + warp, i = row_begin + r;
  const bool active = r < rows;
  const float norm = active ? left_norm[i] : 0.0f, window = active ? left_window[i] : 0.0f, shrunk = norm - window;
  List list = {nullptr, nullptr, 0, 0.0f, 0.0f};
  if (active) list = state.open(i);
  float largest = -INFINITY;
  for (int64_t tile = 0; tile < columns; tile += kRowThreads) {
    if (tile + threadIdx.x < columns) {
      const float other = right_norm[column_begin + tile + threadIdx.x];
      norms[threadIdx.x] = other;
      shrunks[threadIdx.x] = other - right_window[column_begin + tile + threadIdx.x];
    }
    __syncthreads();
    for (int base = 0; active && base < kRowThreads && tile + base < columns; base += kWarp) {
      const int64_t c = tile + base + lane;
      const bool valid = c < columns;
      const float product = valid ? -2 * block[r * ld + c] : 0.0f;
      const float other = valid ? norms[base + lane] : 0.0f, other_shrunk = valid ? shrunks[base + lane] : 0.0f;
      if (valid) largest = fmaxf(largest, product + other);
      if (valid && write) block[r * ld + c] = fmaxf(product + other + norm, 0.0f);
      offer(list, valid, product + other_shrunk, shrunk, column_begin + c, state.k, static_cast<int>(state.capacity),
            window, right_window, scratch[warp]);
    }
    __syncthreads();
  }
  if (active) state.close(i, list, warp_max(largest) + norm);
}

// One warp for each column: tiles of the block are turned over in shared memory.
__global__ void nearest_neighbors_scan_columns_kernel(const float* __restrict__ block, int64_t ld, int64_t rows,
                                                      int64_t columns, int64_t row_begin, int64_t column_begin,
                                                      const float* __restrict__ left_norm,
                                                      const float* __restrict__ left_window,
                                                      const float* __restrict__ right_norm,
                                                      const float* __restrict__ right_window, State state) {
  __shared__ float scratch[kColumnWarps][kCapacity];
  __shared__ float tile[kWarp][kColumnWarps + 1];
  __shared__ float norms[kWarp], shrunks[kWarp];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t c0 = blockIdx.x * static_cast<int64_t>(kColumnWarps), c = c0 + warp, j = column_begin + c;
  const bool active = c < columns;
  const float norm = active ? right_norm[j] : 0.0f, window = active ? right_window[j] : 0.0f, shrunk = norm - window;
  List list = {nullptr, nullptr, 0, 0.0f, 0.0f};
  if (active) list = state.open(j);
  float largest = -INFINITY;
  for (int64_t base = 0; base < rows; base += kWarp) {
    if (base + warp < rows && c0 + lane < columns) tile[warp][lane] = block[(base + warp) * ld + c0 + lane];
    if (warp == 0 && base + lane < rows) {
      norms[lane] = left_norm[row_begin + base + lane];
      shrunks[lane] = norms[lane] - left_window[row_begin + base + lane];
    }
    __syncthreads();
    if (active) {
      const bool valid = base + lane < rows;
      const float product = valid ? -2 * tile[lane][warp] : 0.0f;
      const float other = valid ? norms[lane] : 0.0f, other_shrunk = valid ? shrunks[lane] : 0.0f;
      if (valid) largest = fmaxf(largest, product + other);
      offer(list, valid, product + other_shrunk, shrunk, row_begin + base + lane, state.k,
            static_cast<int>(state.capacity), window, left_window, scratch[warp]);
    }
    __syncthreads();
  }
  if (active) state.close(j, list, warp_max(largest) + norm);
}

struct Result {
  int32_t* index;
  void* distance;
  DType dtype;
  int64_t k;
  Metric metric;
  double unscale;

  __device__ __forceinline__ void write(int64_t row, int rank, double squared, int32_t j) const {
    index[row * k + rank] = j;
    if (!distance) return;
    double value = metric == Metric::kCosine ? squared / 2 : squared * unscale;
    if (metric == Metric::kEuclidean) value = sqrt(squared) * sqrt(unscale);
    if (dtype == DType::kFloat64)
      static_cast<double*>(distance)[row * k + rank] = value;
    else
      static_cast<float*>(distance)[row * k + rank] = static_cast<float>(value);
  }
};

// One warp for each row.
template <typename T>
__global__ void nearest_neighbors_select_kernel(DeviceRows<T> x, DeviceRows<T> y, int64_t rows, int64_t D,
                                                const float* __restrict__ left_window,
                                                const float* __restrict__ right_window, const float* __restrict__ lower,
                                                const int32_t* __restrict__ candidate,
                                                const int32_t* __restrict__ counts, const float* __restrict__ cut,
                                                int64_t capacity, int k, Result result, uint8_t* __restrict__ unsure,
                                                float* __restrict__ reach) {
  __shared__ float upper[kListWarps][kCapacity];
  __shared__ double distance[kListWarps][kCapacity];
  __shared__ int32_t index[kListWarps][kCapacity];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t i = blockIdx.x * static_cast<int64_t>(kListWarps) + warp;
  if (i >= rows) return;
  const int count = counts[i];
  const float* const bounds = lower + i * capacity;
  const int32_t* const found = candidate + i * capacity;
  for (int c = lane; c < count; c += kWarp) upper[warp][c] = bounds[c] + 2 * (left_window[i] + right_window[found[c]]);
  __syncwarp();
  const float limit = value_of_rank(upper[warp], count, k - 1);
  const bool again = limit >= cut[i];
  if (lane == 0) {
    reach[i] = limit;
    unsure[i] = again;
  }
  if (again) return;
  int kept = 0;
  for (int base = 0; base < count; base += kWarp) {
    const int c = base + lane;
    const bool stays = c < count && bounds[c] <= limit;
    const unsigned mask = __ballot_sync(kFullWarp, stays);
    if (stays) index[warp][kept + __popc(mask & lanes_below())] = found[c];
    kept += __popc(mask);
  }
  __syncwarp();
  for (int c = 0; c < kept; ++c) {
    const double exact = warp_exact_distance(x, i, y, index[warp][c], D);
    if (lane == 0) distance[warp][c] = exact;
  }
  __syncwarp();
  for (int c = lane; c < kept; c += kWarp) {
    const double own = distance[warp][c];
    const int32_t j = index[warp][c];
    int rank = 0;
    for (int other = 0; other < kept; ++other)
      rank += distance[warp][other] < own || (distance[warp][other] == own && index[warp][other] < j);
    if (rank < k) result.write(i, rank, own, j);
  }
}

// One block for each row that is done again: exact distances of all that may be near, then the k smallest in turn.
template <typename T>
__global__ void nearest_neighbors_rescan_kernel(const float* __restrict__ block, int64_t ld,
                                                const int64_t* __restrict__ rows, int64_t columns, DeviceRows<T> x,
                                                DeviceRows<T> y, int64_t D, const float* __restrict__ left_norm,
                                                const float* __restrict__ left_window,
                                                const float* __restrict__ right_norm,
                                                const float* __restrict__ right_window, const float* __restrict__ reach,
                                                Result result, double* __restrict__ workspace) {
  constexpr int kWarps = kRescanThreads / kWarp;
  __shared__ double least[kWarps];
  __shared__ int64_t where[kWarps];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t r = blockIdx.x, i = rows[r];
  const float shrunk = left_norm[i] - left_window[i], limit = reach[i];
  double* const exact = workspace + r * columns;
  for (int64_t base = static_cast<int64_t>(warp) * kWarp; base < columns; base += kRescanThreads) {
    const int64_t j = base + lane;
    const bool near = j < columns && -2 * block[r * ld + j] + (right_norm[j] - right_window[j]) + shrunk <= limit;
    unsigned mask = __ballot_sync(kFullWarp, near);
    double own = INFINITY;
    while (mask) {
      const int at = __ffs(mask) - 1;
      mask &= mask - 1;
      const double value = warp_exact_distance(x, i, y, base + at, D);
      if (lane == at) own = value;
    }
    if (j < columns) exact[j] = own;
  }
  double last = -1;
  int64_t last_index = -1;
  for (int rank = 0; rank < static_cast<int>(result.k); ++rank) {
    double best = INFINITY;
    int64_t best_index = columns;
    for (int64_t j = threadIdx.x; j < columns; j += kRescanThreads) {
      const double value = exact[j];
      const bool after = value > last || (value == last && j > last_index);
      if (after && (value < best || (value == best && j < best_index))) {
        best = value;
        best_index = j;
      }
    }
    for (int offset = kWarp / 2; offset > 0; offset /= 2) {
      const double other = __shfl_xor_sync(kFullWarp, best, offset);
      const int64_t other_index = __shfl_xor_sync(kFullWarp, static_cast<long long>(best_index), offset);
      if (other < best || (other == best && other_index < best_index)) {
        best = other;
        best_index = other_index;
      }
    }
    if (lane == 0) {
      least[warp] = best;
      where[warp] = best_index;
    }
    __syncthreads();
    last = least[0];
    last_index = where[0];
    for (int w = 1; w < kWarps; ++w)
      if (least[w] < last || (least[w] == last && where[w] < last_index)) {
        last = least[w];
        last_index = where[w];
      }
    if (threadIdx.x == 0) result.write(i, rank, last, static_cast<int32_t>(last_index));
    __syncthreads();
  }
}

unsigned list_grid(int64_t rows) { return grid_size((rows + kListWarps - 1) / kListWarps); }

void check_limits(int64_t k, int64_t capacity) {
  if (k < 1 || k > kCudaMaxNeighbors) throw std::invalid_argument("k: 1 to 128 on a GPU");
  if (capacity <= k || capacity > kCudaMaxCapacity) throw std::invalid_argument("capacity: k + 1 to 192 on a GPU");
}

}  // namespace

void nearest_neighbors_scan_cuda(float* block, int64_t ld, int64_t rows, int64_t columns, int64_t row_begin,
                                 int64_t column_begin, const float* left_norm, const float* left_window,
                                 const float* right_norm, const float* right_window, float* lower, int32_t* index,
                                 int32_t* count, float* threshold, float* cut, float* row_max, int64_t capacity,
                                 int64_t k, bool both, bool write, int device, void* stream) {
  check_limits(k, capacity);
  if (rows == 0 || columns == 0) return;
  const DeviceGuard guard(device);
  const State state{lower, index, count, threshold, cut, row_max, capacity, static_cast<int>(k)};
  if (both)  // before the rows, which may overwrite the products
    launch(nearest_neighbors_scan_columns_kernel, grid_size((columns + kColumnWarps - 1) / kColumnWarps),
           kColumnWarps * kWarp, 0, static_cast<cudaStream_t>(stream), static_cast<const float*>(block), ld, rows,
           columns, row_begin, column_begin, left_norm, left_window, right_norm, right_window, state);
  launch(nearest_neighbors_scan_rows_kernel, grid_size((rows + kRowWarps - 1) / kRowWarps), kRowThreads, 0,
         static_cast<cudaStream_t>(stream), block, ld, rows, columns, row_begin, column_begin, left_norm, left_window,
         right_norm, right_window, state, write);
}

void nearest_neighbors_select_cuda(const void* x, const double* x_factor, int64_t x_rows, int64_t x_stride,
                                   const void* x2, const double* x2_factor, int64_t x2_rows, int64_t x2_stride,
                                   const void* y, const double* y_factor, int64_t y_rows, int64_t y_stride,
                                   const void* y2, const double* y2_factor, int64_t y2_rows, int64_t y2_stride,
                                   DType dtype, int64_t D, Metric metric, double unscale, const float* left_window,
                                   const float* right_window, const float* lower, const int32_t* candidate,
                                   const int32_t* count, const float* cut, int64_t capacity, int64_t k, int32_t* index,
                                   void* distance, DType distance_dtype, uint8_t* unsure, float* reach, int device,
                                   void* stream) {
  check_limits(k, capacity);
  const int64_t rows = x_rows + x2_rows;
  if (rows == 0 || y_rows + y2_rows == 0) return;
  const DeviceGuard guard(device);
  const Result result{index, distance, distance_dtype, k, metric, unscale};
  dispatch_device_float(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    launch(nearest_neighbors_select_kernel<T>, list_grid(rows), kListWarps * kWarp, 0,
           static_cast<cudaStream_t>(stream), device_rows<T>(x, x_factor, x_rows, x_stride, x2, x2_factor, x2_stride),
           device_rows<T>(y, y_factor, y_rows, y_stride, y2, y2_factor, y2_stride), rows, D, left_window, right_window,
           lower, candidate, count, cut, capacity, static_cast<int>(k), result, unsure, reach);
  });
}

void nearest_neighbors_rescan_cuda(const float* block, int64_t ld, const int64_t* rows, int64_t count, const void* x,
                                   const double* x_factor, int64_t x_rows, int64_t x_stride, const void* x2,
                                   const double* x2_factor, int64_t x2_rows, int64_t x2_stride, const void* y,
                                   const double* y_factor, int64_t y_rows, int64_t y_stride, const void* y2,
                                   const double* y2_factor, int64_t y2_rows, int64_t y2_stride, DType dtype, int64_t D,
                                   Metric metric, double unscale, const float* left_norm, const float* left_window,
                                   const float* right_norm, const float* right_window, const float* reach, int64_t k,
                                   int32_t* index, void* distance, DType distance_dtype, double* workspace, int device,
                                   void* stream) {
  (void)x2_rows;
  if (count == 0) return;
  const DeviceGuard guard(device);
  const Result result{index, distance, distance_dtype, k, metric, unscale};
  dispatch_device_float(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    launch(nearest_neighbors_rescan_kernel<T>, grid_size(count), kRescanThreads, 0, static_cast<cudaStream_t>(stream),
           block, ld, rows, y_rows + y2_rows, device_rows<T>(x, x_factor, x_rows, x_stride, x2, x2_factor, x2_stride),
           device_rows<T>(y, y_factor, y_rows, y_stride, y2, y2_factor, y2_stride), D, left_norm, left_window,
           right_norm, right_window, reach, result, workspace);
  });
}

}  // namespace vareid
