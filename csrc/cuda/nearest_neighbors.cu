#include "nearest_neighbors.h"

#include <cmath>
#include <stdexcept>

#include "cuda/exact_distance.cuh"
#include "cuda/launch.h"
#include "cuda/smallest.cuh"

namespace vareid {
namespace {

constexpr int kCapacity = static_cast<int>(kCudaMaxCapacity);
constexpr int kListWarps = 4;  // rows for each block, in selecting
constexpr int kRowWarps = 8;   // and in scanning
constexpr int kRowThreads = kRowWarps * kWarp;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr int kScanBlocks = 3;  // of a multiprocessor; a fourth would spill registers
#else
constexpr int kScanBlocks = 4;
#endif
constexpr int kColumns = 16;          // of a block that scans columns
constexpr int kTileRows = 4 * kWarp;  // at once there
constexpr int kRescanThreads = 256;
constexpr int kRescanPlaces = static_cast<int>(kCudaMaxNeighbors) + kWarp;

// The value of this rank among values[0..count) in shared memory, equal ones in order.
__device__ __forceinline__ float value_of_rank(const float* values, int count, int rank) {
  float result = 0;
  for (int base = 0; base < count; base += kWarp) {
    const int c = base + static_cast<int>(threadIdx.x % kWarp);
    int own = count;
    if (c < count) {
      own = 0;
      for (int other = 0; other < count; ++other)
        own += values[other] < values[c] || (values[other] == values[c] && other < c);
    }
    const unsigned mask = __ballot_sync(kFullWarp, own == rank);
    if (mask) result = __shfl_sync(kFullWarp, c < count ? values[c] : 0.0f, __ffs(static_cast<int>(mask)) - 1);
  }
  return result;
}

// One row's candidates while a warp scans: every lane carries the same scalars. New ones go to shared memory, at the
// places that they will have in the row's arrays; those that were there before are only fetched when places run out.
template <int kPlaces>
struct List {
  float* lower;  // [kPlaces], as index and upper
  float* upper;
  int32_t* index;
  float* stored_lower;  // the row's arrays
  int32_t* stored_index;
  const float* other_window;  // of the set that index counts in
  float window;
  int k, capacity, count, stored;
  float threshold, cut;

  // Keeps the entries for which keep(c) holds, in order.
  template <typename Keep>
  __device__ __forceinline__ void filter(const Keep& keep) {
    const int lane = threadIdx.x % kWarp;
    unsigned stays = 0;  // one bit for each of the lane's places
    for (int base = 0; base < count; base += kWarp)
      if (base + lane < count && keep(base + lane)) stays |= 1u << (base / kWarp);
    int kept = 0;
    for (int base = 0; base < count; base += kWarp) {
      const int c = base + lane;
      const bool stay = (stays >> (base / kWarp)) & 1u;
      const float own_lower = stay ? lower[c] : 0.0f, own_upper = stay ? upper[c] : 0.0f;
      const int32_t own_index = stay ? index[c] : 0;
      const unsigned mask = __ballot_sync(kFullWarp, stay);
      __syncwarp();
      if (stay) {
        const int at = kept + __popc(mask & lanes_below());
        lower[at] = own_lower;
        upper[at] = own_upper;
        index[at] = own_index;
      }
      kept += __popc(mask);
    }
    __syncwarp();
    count = kept;
  }

  // Drops what is beyond the k-th smallest upper bound, and what does not fit; as in
  // csrc/cpu/nearest_neighbors_candidates.cpp.
  __device__ void compact() {
    for (int c = threadIdx.x % kWarp; c < stored; c += kWarp) {
      lower[c] = stored_lower[c];
      index[c] = stored_index[c];
      upper[c] = lower[c] + 2 * (window + other_window[index[c]]);
    }
    stored = 0;
    __syncwarp();
    float limit = value_of_rank(upper, count, k - 1);
    filter([&](int c) { return lower[c] <= limit; });
    const int most = capacity - (capacity - k) / 2;
    if (count > most) {
      const float lost = value_of_rank(lower, count, most);
      cut = fminf(cut, lost);
      filter([&](int c) {
        int rank = 0;
        for (int other = 0; other < count; ++other)
          rank += lower[other] < lower[c] || (lower[other] == lower[c] && other < c);
        return rank < most;
      });
      limit = nextafterf(lost, -INFINITY);
    }
    threshold = fminf(threshold, limit);
  }

  // Takes one entry from each lane, where `partial` + `shrunk`, its lower bound, does not exceed the threshold.
  __device__ __forceinline__ void offer(bool valid, float partial, float shrunk, float theirs, int64_t column) {
    bool hit = valid && partial <= threshold - shrunk;
    unsigned pending = __ballot_sync(kFullWarp, hit);
    while (pending) {
      const int space = capacity - count, at = __popc(pending & lanes_below());
      const bool taken = hit && at < space;
      if (taken) {
        lower[count + at] = partial + shrunk;
        upper[count + at] = partial + shrunk + 2 * (window + theirs);
        index[count + at] = static_cast<int32_t>(column);
      }
      count += min(__popc(pending), space);
      if (count == capacity) compact();
      hit = hit && !taken && partial <= threshold - shrunk;
      pending = __ballot_sync(kFullWarp, hit);
    }
  }

  // Takes kCount entries from each lane, a warp apart, of `valid` in all: -2 times their products, with the others'
  // norms and windows in shared memory. Most batches hold nothing to take, which one vote tells; for the others
  // product_again(at) fetches the values once more, so that they need not be indexed in registers.
  template <int kCount, typename Again>
  __device__ __forceinline__ void offer_some(const float (&product)[kCount], const float* norms, const float* windows,
                                             float shrunk, int64_t valid, int64_t first, const Again& product_again) {
    const int lane = threadIdx.x % kWarp;
    bool any = false;
#pragma unroll
    for (int t = 0; t < kCount; ++t) {
      const int at = t * kWarp + lane;
      if (at < valid) any |= product[t] + (norms[at] - windows[at]) <= threshold - shrunk;
    }
    if (__ballot_sync(kFullWarp, any) == 0) return;
#pragma unroll 1
    for (int at = lane; at < kCount * kWarp; at += kWarp) {
      const bool here = at < valid;
      const float theirs = here ? windows[at] : 0.0f;
      offer(here, here ? product_again(at) + (norms[at] - theirs) : 0.0f, shrunk, theirs, first + at);
    }
  }
};

struct State {
  float* lower;
  int32_t* index;
  int32_t* count;
  float* threshold;
  float* cut;
  float* row_max;
  int64_t capacity;
  int k;

  template <int kPlaces>
  __device__ __forceinline__ List<kPlaces> open(int64_t row, float* bounds, int32_t* places, float window,
                                                const float* other_window) const {
    return {bounds,       bounds + kPlaces, places,  lower + row * capacity,     index + row * capacity,
            other_window, window,           k,       static_cast<int>(capacity), count[row],
            count[row],   threshold[row],   cut[row]};
  }
  template <int kPlaces>
  __device__ __forceinline__ void close(int64_t row, const List<kPlaces>& list, float largest) const {
    const int lane = threadIdx.x % kWarp;
    for (int c = list.stored + lane; c < list.count; c += kWarp) {
      list.stored_lower[c] = list.lower[c];
      list.stored_index[c] = list.index[c];
    }
    if (lane != 0) return;
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
__global__ void __launch_bounds__(kRowThreads, kScanBlocks)
    nearest_neighbors_scan_rows_kernel(float* __restrict__ block, int64_t ld, int64_t rows, int64_t columns,
                                       int64_t row_begin, int64_t column_begin, const float* __restrict__ left_norm,
                                       const float* __restrict__ left_window, const float* __restrict__ right_norm,
                                       const float* __restrict__ right_window, State state, bool write) {
  __shared__ float bounds[kRowWarps][2 * kCapacity];
  __shared__ int32_t places[kRowWarps][kCapacity];
  __shared__ float norms[kRowThreads], windows[kRowThreads];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t r = blockIdx.x * static_cast<int64_t>(kRowWarps) + warp, i = row_begin + r;
  const bool active = r < rows;
  const float norm = active ? left_norm[i] : 0.0f, window = active ? left_window[i] : 0.0f, shrunk = norm - window;
  List<kCapacity> list = {};
  if (active) list = state.open<kCapacity>(i, bounds[warp], places[warp], window, right_window);
  float largest = -INFINITY;
  for (int64_t tile = 0; tile < columns; tile += kRowThreads) {
    if (tile + threadIdx.x < columns) {
      norms[threadIdx.x] = right_norm[column_begin + tile + threadIdx.x];
      windows[threadIdx.x] = right_window[column_begin + tile + threadIdx.x];
    }
    __syncthreads();
    if (active) {
      float* const from = block + r * ld + tile;
      float product[kRowWarps];  // all loads under way before the first is used
#pragma unroll
      for (int t = 0; t < kRowWarps; ++t) {
        const int at = t * kWarp + lane;
        product[t] = tile + at < columns ? -2 * from[at] : 0.0f;
      }
      list.offer_some(product, norms, windows, shrunk, columns - tile, column_begin + tile,
                      [&](int at) { return -2 * from[at]; });
#pragma unroll
      for (int t = 0; t < kRowWarps; ++t) {
        const int at = t * kWarp + lane;
        if (tile + at >= columns) continue;
        const float sum = product[t] + norms[at];
        largest = fmaxf(largest, sum);
        if (write) from[at] = fmaxf(sum + norm, 0.0f);
      }
    }
    __syncthreads();
  }
  if (active) state.close(i, list, warp_max(largest) + norm);
}

// One warp for each of kColumns columns: tiles of the block are turned over in shared memory.
template <int kPlaces>
__global__ void __launch_bounds__(kColumns* kWarp)
    nearest_neighbors_scan_columns_kernel(const float* __restrict__ block, int64_t ld, int64_t rows, int64_t columns,
                                          int64_t row_begin, int64_t column_begin, const float* __restrict__ left_norm,
                                          const float* __restrict__ left_window, const float* __restrict__ right_norm,
                                          const float* __restrict__ right_window, State state) {
  static_assert(kColumns == kWarp / 2, "a warp fetches two rows of a tile");
  __shared__ float bounds[kColumns][2 * kPlaces];
  __shared__ int32_t places[kColumns][kPlaces];
  __shared__ float tile[kTileRows][kColumns + 1];
  __shared__ float norms[kTileRows], windows[kTileRows];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t c0 = blockIdx.x * static_cast<int64_t>(kColumns), c = c0 + warp, j = column_begin + c;
  const bool active = c < columns;
  const float norm = active ? right_norm[j] : 0.0f, window = active ? right_window[j] : 0.0f, shrunk = norm - window;
  List<kPlaces> list = {};
  if (active) list = state.open<kPlaces>(j, bounds[warp], places[warp], window, left_window);
  float largest = -INFINITY;
  // Rows 16 apart lie in other banks.
  const int row = warp + lane / kColumns * kColumns, column = lane % kColumns;
  for (int64_t base = 0; base < rows; base += kTileRows) {
    if (c0 + column < columns) {
#pragma unroll
      for (int t = 0; t < kTileRows; t += kWarp)
        if (base + t + row < rows) tile[t + row][column] = block[(base + t + row) * ld + c0 + column];
    }
    if (threadIdx.x < kTileRows && base + threadIdx.x < rows) {
      norms[threadIdx.x] = left_norm[row_begin + base + threadIdx.x];
      windows[threadIdx.x] = left_window[row_begin + base + threadIdx.x];
    }
    __syncthreads();
    if (active) {
      float product[kTileRows / kWarp];
#pragma unroll
      for (int t = 0; t < kTileRows / kWarp; ++t) {
        const bool valid = base + t * kWarp + lane < rows;
        product[t] = valid ? -2 * tile[t * kWarp + lane][warp] : 0.0f;
        if (valid) largest = fmaxf(largest, product[t] + norms[t * kWarp + lane]);
      }
      list.offer_some(product, norms, windows, shrunk, rows - base, row_begin + base,
                      [&](int at) { return -2 * tile[at][warp]; });
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
    double value = metric == Metric::kCosine ? squared / 2 : squared * unscale * unscale;
    if (metric == Metric::kEuclidean) value = sqrt(squared) * unscale;
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
                                                float* __restrict__ kth_upper) {
  __shared__ float bounds[kListWarps][kCapacity], upper[kListWarps][kCapacity];
  __shared__ double distance[kListWarps][kCapacity];
  __shared__ int32_t index[kListWarps][kCapacity];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t i = blockIdx.x * static_cast<int64_t>(kListWarps) + warp;
  if (i >= rows) return;
  const int count = counts[i];
  for (int c = lane; c < count; c += kWarp) {
    const int32_t j = candidate[i * capacity + c];
    index[warp][c] = j;
    bounds[warp][c] = lower[i * capacity + c];
    upper[warp][c] = bounds[warp][c] + 2 * (left_window[i] + right_window[j]);
  }
  __syncwarp();
  const float limit = value_of_rank(upper[warp], count, k - 1);
  const bool again = limit >= cut[i];
  if (lane == 0) {
    kth_upper[i] = limit;
    unsure[i] = again;
  }
  if (again) return;
  int kept = 0;
  for (int base = 0; base < count; base += kWarp) {
    const int c = base + lane;
    const bool stays = c < count && bounds[warp][c] <= limit;
    const int32_t j = stays ? index[warp][c] : 0;
    const unsigned mask = __ballot_sync(kFullWarp, stays);
    __syncwarp();
    if (stays) index[warp][kept + __popc(mask & lanes_below())] = j;
    kept += __popc(mask);
  }
  __syncwarp();
  for (int base = 0; base < kept; base += kWarp) {
    const int c = base + lane;
    const int32_t j = c < kept ? index[warp][c] : 0;
    const double exact = warp_exact_distances(x, i, y, j, __ballot_sync(kFullWarp, c < kept), D);
    if (c < kept) distance[warp][c] = exact;
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

// One block for each row that is done again: exact distances of all that may be near; each warp keeps its best.
template <typename T>
__global__ void nearest_neighbors_rescan_kernel(const float* __restrict__ block, int64_t ld,
                                                const int64_t* __restrict__ rows, int64_t columns, DeviceRows<T> x,
                                                DeviceRows<T> y, int64_t D, const float* __restrict__ left_norm,
                                                const float* __restrict__ left_window,
                                                const float* __restrict__ right_norm,
                                                const float* __restrict__ right_window,
                                                const float* __restrict__ kth_upper, Result result) {
  constexpr int kWarps = kRescanThreads / kWarp;
  __shared__ double values[kWarps][kRescanPlaces];
  __shared__ int32_t indices[kWarps][kRescanPlaces];
  __shared__ int counts[kWarps];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t r = blockIdx.x, i = rows[r];
  const float shrunk = left_norm[i] - left_window[i], limit = kth_upper[i];
  Smallest<kRescanPlaces> best{values[warp], indices[warp], static_cast<int>(result.k)};
  for (int64_t base = static_cast<int64_t>(warp) * kWarp; base < columns; base += kRescanThreads) {
    const int64_t j = base + lane;
    const bool near = j < columns && -2 * block[r * ld + j] + (right_norm[j] - right_window[j]) + shrunk <= limit;
    const double exact = warp_exact_distances(x, i, y, j, __ballot_sync(kFullWarp, near), D);
    best.show(near, exact, static_cast<int32_t>(j));
  }
  merge_smallest<kWarps>(best, values, indices, counts,
                         [&](int rank, double value, int32_t j) { result.write(i, rank, value, j); });
}

template <int kPlaces>
void scan_columns(const float* block, int64_t ld, int64_t rows, int64_t columns, int64_t row_begin,
                  int64_t column_begin, const float* left_norm, const float* left_window, const float* right_norm,
                  const float* right_window, const State& state, cudaStream_t stream) {
  launch(nearest_neighbors_scan_columns_kernel<kPlaces>, grid_size((columns + kColumns - 1) / kColumns),
         kColumns * kWarp, 0, stream, block, ld, rows, columns, row_begin, column_begin, left_norm, left_window,
         right_norm, right_window, state);
}

unsigned list_grid(int64_t rows) { return grid_size((rows + kListWarps - 1) / kListWarps); }

void check_limits(int64_t k, int64_t capacity) {
  if (k < 1 || k > kCudaMaxNeighbors) throw std::invalid_argument("k: 1 to 128 on a GPU");
  if (capacity <= k || capacity > kCudaMaxCapacity) throw std::invalid_argument("capacity: k + 1 to 192 on a GPU");
}

}  // namespace

void nearest_neighbors_scan_cuda(float* block, int64_t ld, int64_t rows, int64_t columns, int64_t row_begin,
                                 int64_t column_begin, const Bounds& left_bounds, const Bounds& right_bounds,
                                 const Candidates& candidates, bool both, bool write, const Place& place) {
  check_limits(candidates.k, candidates.capacity);
  if (rows == 0 || columns == 0) return;
  const DeviceGuard guard(place.device);
  const auto queue = static_cast<cudaStream_t>(place.stream);
  const State state{candidates.lower, candidates.index,   candidates.count,    candidates.threshold,
                    candidates.cut,   candidates.row_max, candidates.capacity, static_cast<int>(candidates.k)};
  const auto& [left_norm, left_window] = left_bounds;
  const auto& [right_norm, right_window] = right_bounds;
  if (both)  // before the rows, which may overwrite the products
    candidates.capacity <= kCapacity / 2
        ? scan_columns<kCapacity / 2>(block, ld, rows, columns, row_begin, column_begin, left_norm, left_window,
                                      right_norm, right_window, state, queue)
        : scan_columns<kCapacity>(block, ld, rows, columns, row_begin, column_begin, left_norm, left_window, right_norm,
                                  right_window, state, queue);
  launch(nearest_neighbors_scan_rows_kernel, grid_size((rows + kRowWarps - 1) / kRowWarps), kRowThreads, 0, queue,
         block, ld, rows, columns, row_begin, column_begin, left_norm, left_window, right_norm, right_window, state,
         write);
}

void nearest_neighbors_select_cuda(const Features& x, const Features& x2, const Features& y, const Features& y2,
                                   DType dtype, int64_t D, Metric metric, double unscale, const Bounds& left_bounds,
                                   const Bounds& right_bounds, const Candidates& candidates, int32_t* index,
                                   void* distance, DType distance_dtype, uint8_t* unsure, float* kth_upper,
                                   const Place& place) {
  const auto k = static_cast<int>(candidates.k);
  check_limits(k, candidates.capacity);
  const int64_t rows = x.rows + x2.rows;
  if (rows == 0 || y.rows + y2.rows == 0) return;
  const DeviceGuard guard(place.device);
  const Result result{index, distance, distance_dtype, k, metric, unscale};
  dispatch_device_float(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    launch(nearest_neighbors_select_kernel<T>, list_grid(rows), kListWarps * kWarp, 0,
           static_cast<cudaStream_t>(place.stream), device_rows<T>(x, x2), device_rows<T>(y, y2), rows, D,
           left_bounds.window, right_bounds.window, candidates.lower, candidates.index, candidates.count,
           candidates.cut, candidates.capacity, k, result, unsure, kth_upper);
  });
}

void nearest_neighbors_rescan_cuda(const float* block, int64_t ld, const int64_t* rows, int64_t count,
                                   const Features& x, const Features& x2, const Features& y, const Features& y2,
                                   DType dtype, int64_t D, Metric metric, double unscale, const Bounds& left_bounds,
                                   const Bounds& right_bounds, const float* kth_upper, const int32_t*, int64_t k,
                                   int32_t* index, void* distance, DType distance_dtype, void*, const Place& place) {
  if (k < 1 || k > kCudaMaxNeighbors) throw std::invalid_argument("k: 1 to 128 on a GPU");
  if (count == 0) return;
  const DeviceGuard guard(place.device);
  const Result result{index, distance, distance_dtype, k, metric, unscale};
  dispatch_device_float(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    launch(nearest_neighbors_rescan_kernel<T>, grid_size(count), kRescanThreads, 0,
           static_cast<cudaStream_t>(place.stream), block, ld, rows, y.rows + y2.rows, device_rows<T>(x, x2),
           device_rows<T>(y, y2), D, left_bounds.norm, left_bounds.window, right_bounds.norm, right_bounds.window,
           kth_upper, result);
  });
}

}  // namespace vareid
