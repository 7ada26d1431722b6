#include "k_reciprocal.h"

#include <cmath>
#include <stdexcept>

#include "cuda/exact_distance.cuh"
#include "cuda/k_reciprocal.cuh"
#include "cuda/launch.h"

namespace vareid {
namespace {

constexpr int kRowWarps = 4;   // rows for each block, where a warp does a row
constexpr int kThreads = 128;  // where a block does a row
constexpr int kWarps = kThreads / kWarp;
constexpr int kMostWordsPerThread = 25;  // odd: see Bits
constexpr int kWords = kThreads * kMostWordsPerThread;
constexpr int64_t kColumns = int64_t{kWords} * 32;  // columns whose membership is held in shared memory at once
constexpr int kWidth = static_cast<int>(kCudaMaxWidth);
constexpr int kHeld = 4;                // values that a lane keeps
constexpr int kSourceRows = kWarp / 2;  // rows to be averaged that are looked up at once
constexpr int kSources = 1024;          // entries of the rows to be averaged that are kept in shared memory
constexpr int kScanThreads = 1024;

// Whether an ascending list holds a value, and where.
__device__ __forceinline__ int64_t find(const int32_t* __restrict__ list, int64_t count, int32_t value) {
  int64_t low = 0, high = count;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (list[middle] < value)
      low = middle + 1;
    else
      high = middle;
  }
  return low < count && list[low] == value ? low : -1;
}

// One warp for each row.
__global__ void k_reciprocal_sets_kernel(const int32_t* __restrict__ neighbor, int64_t rows, int64_t width, int n,
                                         int32_t* __restrict__ reciprocal, int32_t* __restrict__ size) {
  __shared__ int32_t members[kRowWarps][kWidth];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t i = blockIdx.x * static_cast<int64_t>(kRowWarps) + warp;
  if (i >= rows) return;
  int count = 0;
  for (int c = 0; c < n; ++c) {  // the lanes look through one neighbour's list together
    const int32_t j = neighbor[i * width + c];
    bool mutual = false;
    for (int base = 0; base < n && !mutual; base += kWarp) {
      const bool here = base + lane < n && neighbor[j * width + base + lane] == i;
      mutual = __ballot_sync(kFullWarp, here) != 0;
    }
    if (mutual && lane == 0) members[warp][count] = j;
    count += mutual;
  }
  __syncwarp();
  for (int c = lane; c < count; c += kWarp) {
    const int32_t j = members[warp][c];
    int rank = 0;
    for (int other = 0; other < count; ++other) rank += members[warp][other] < j;
    reciprocal[i * n + rank] = j;
  }
  if (lane == 0) size[i] = count;
}

// The set of a row's columns from `first` on, as many as there are words for, held by a block as bits. Each thread owns
// an odd number of neighbouring words, so that a warp reads 32 banks.
struct Bits {
  unsigned* words;  // [kWords]
  int* partial;     // [kWarps]
  int64_t first;
  int per_thread;

  __device__ __forceinline__ void clear(int64_t from, int64_t columns) {
    first = from;
    const int64_t size = min(kColumns, columns - from);
    per_thread = static_cast<int>((size + kThreads * 32 - 1) / (kThreads * 32)) | 1;
    for (int w = threadIdx.x; w < per_thread * kThreads; w += kThreads) words[w] = 0;
    __syncthreads();
  }
  __device__ __forceinline__ void add(int64_t column) const {
    const int64_t at = column - first;
    if (at >= 0 && at < kColumns) atomicOr(&words[at / 32], 1u << (at % 32));
  }
  // Writes the members in ascending order to out, if not null, and returns how many there are.
  __device__ __forceinline__ int64_t emit(int32_t* __restrict__ out) const {
    __syncthreads();
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, begin = threadIdx.x * per_thread;
    int own = 0;
    for (int w = 0; w < per_thread; ++w) own += __popc(words[begin + w]);
    int before = own;  // inclusive sum over the warp
    for (int offset = 1; offset < kWarp; offset *= 2) {
      const int other = __shfl_up_sync(kFullWarp, before, offset);
      if (lane >= offset) before += other;
    }
    if (lane == kWarp - 1) partial[warp] = before;
    __syncthreads();
    int64_t at = before - own, total = 0;
    for (int w = 0; w < kWarps; ++w) {
      if (w < warp) at += partial[w];
      total += partial[w];
    }
    if (out)
      for (int w = 0; w < per_thread; ++w)
        for (unsigned bits = words[begin + w]; bits; bits &= bits - 1)
          out[at++] = static_cast<int32_t>(first + (begin + w) * 32 + __ffs(static_cast<int>(bits)) - 1);
    __syncthreads();
    return total;
  }
};

// One block for each row. With index null, the sizes go to indptr[i + 1].
__global__ void k_reciprocal_robust_sets_kernel(const int32_t* __restrict__ reciprocal,
                                                const int32_t* __restrict__ size, int64_t width,
                                                const int32_t* __restrict__ half, const int32_t* __restrict__ half_size,
                                                int64_t half_width, int64_t rows, int64_t* __restrict__ indptr,
                                                int32_t* __restrict__ index) {
  __shared__ unsigned words[kWords];
  __shared__ int partial[kWarps];
  __shared__ int32_t own[kWidth];
  Bits set{words, partial, 0, 0};
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t i = blockIdx.x;
  const int n = size[i];
  for (int c = threadIdx.x; c < n; c += kThreads) own[c] = reciprocal[i * width + c];
  int64_t total = 0;
  for (int64_t first = 0; first < rows; first += kColumns) {
    set.clear(first, rows);
    for (int c = threadIdx.x; c < n; c += kThreads) set.add(own[c]);
    for (int c = warp; c < n; c += kWarps) {
      const int64_t candidate = own[c];
      const int32_t* const theirs = half + candidate * half_width;
      const int m = half_size[candidate];
      int common = 0;
      const auto inside = [&](int32_t other) {
        bool found = false;
        for (int e = 0; e < n; ++e) found |= own[e] == other;
        return __popc(__ballot_sync(kFullWarp, found));
      };
      int32_t held[kHeld];
#pragma unroll
      for (int h = 0; h < kHeld; ++h) {
        held[h] = h * kWarp + lane < m ? theirs[h * kWarp + lane] : -1;
        if (h * kWarp < m) common += inside(held[h]);
      }
      for (int base = kHeld * kWarp; base < m; base += kWarp)
        common += inside(base + lane < m ? theirs[base + lane] : -1);
      if (3 * common <= 2 * m) continue;
#pragma unroll
      for (int h = 0; h < kHeld; ++h)
        if (h * kWarp + lane < m) set.add(held[h]);
      for (int e = kHeld * kWarp + lane; e < m; e += kWarp) set.add(theirs[e]);
    }
    total += set.emit(index ? index + indptr[i] + total : nullptr);
  }
  if (!index && threadIdx.x == 0) indptr[i + 1] = total;
}

// indptr[r + 1] holds the size of row r; it becomes where row r ends. One block.
__global__ void k_reciprocal_prefix_kernel(int64_t* __restrict__ indptr, int64_t rows) {
  __shared__ int64_t sums[kScanThreads / kWarp];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  int64_t carry = 0;
  for (int64_t base = 0; base < rows; base += kScanThreads) {
    const int64_t r = base + threadIdx.x;
    long long value = r < rows ? indptr[r + 1] : 0;
    for (int offset = 1; offset < kWarp; offset *= 2) {
      const long long other = __shfl_up_sync(kFullWarp, value, offset);
      if (lane >= offset) value += other;
    }
    if (lane == kWarp - 1) sums[warp] = value;
    __syncthreads();
    int64_t before = carry;
    for (int w = 0; w < kScanThreads / kWarp; ++w) {
      if (w < warp) before += sums[w];
      carry += sums[w];
    }
    if (r < rows) indptr[r + 1] = before + value;
    __syncthreads();
  }
  if (threadIdx.x == 0) indptr[0] = 0;
}

// One warp for each row.
template <typename T>
__global__ void k_reciprocal_listed_distance_kernel(DeviceRows<T> x, int64_t rows, int64_t D,
                                                    const int32_t* __restrict__ neighbor,
                                                    const float* __restrict__ neighbor_distance, int64_t width,
                                                    const int64_t* __restrict__ indptr,
                                                    const int32_t* __restrict__ index, float* __restrict__ out) {
  __shared__ int32_t listed[kRowWarps][kWidth];  // of the list's start; what lies behind is read again
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t i = blockIdx.x * static_cast<int64_t>(kRowWarps) + warp;
  if (i >= rows) return;
  const int held = static_cast<int>(min(width, int64_t{kWidth}));
  for (int c = lane; c < held; c += kWarp) listed[warp][c] = neighbor[i * width + c];
  __syncwarp();
  const int64_t begin = indptr[i], end = indptr[i + 1];
  for (int64_t base = begin; base < end; base += kWarp) {
    const bool valid = base + lane < end;
    const int32_t j = valid ? index[base + lane] : -1;
    int64_t at = -1;
    for (int c = 0; c < held; ++c)
      if (listed[warp][c] == j) at = c;
    for (int64_t c = held; c < width; ++c)
      if (neighbor[i * width + c] == j) at = c;
    float value = at >= 0 ? neighbor_distance[i * width + at] : 0.0f;
    const unsigned pending = __ballot_sync(kFullWarp, valid && at < 0);
    const double exact = warp_exact_distances(x, i, x, j, pending, D);
    if (at < 0) value = static_cast<float>(exact);
    if (valid) out[base + lane] = value;
  }
}

// One warp for each row.
__global__ void k_reciprocal_encode_kernel(const int64_t* __restrict__ indptr, const float* __restrict__ distance,
                                           const float* __restrict__ row_max, int64_t rows, float* __restrict__ value) {
  const int lane = threadIdx.x % kWarp;
  const int64_t i = blockIdx.x * static_cast<int64_t>(kRowWarps) + threadIdx.x / kWarp;
  if (i >= rows) return;
  const double scale = row_max[i] > 0 ? 1.0 / row_max[i] : 0.0;
  const int64_t begin = indptr[i], end = indptr[i + 1];
  double held[kHeld];  // the first of the lane's weights stay in registers
  double sum = 0;
#pragma unroll
  for (int h = 0; h < kHeld; ++h) {
    const int64_t e = begin + lane + h * kWarp;
    held[h] = e < end ? exp(-distance[e] * scale) : 0.0;
    sum += held[h];
  }
  for (int64_t e = begin + lane + kHeld * kWarp; e < end; e += kWarp) sum += exp(-distance[e] * scale);
  sum = warp_sum(sum);
#pragma unroll
  for (int h = 0; h < kHeld; ++h) {
    const int64_t e = begin + lane + h * kWarp;
    if (e < end) value[e] = static_cast<float>(held[h] / sum);
  }
  for (int64_t e = begin + lane + kHeld * kWarp; e < end; e += kWarp)
    value[e] = static_cast<float>(exp(-distance[e] * scale) / sum);
}

// One block for each row. With new_index null, the sizes go to new_indptr[i + 1].
__global__ void k_reciprocal_query_expansion_kernel(const int32_t* __restrict__ neighbor, int64_t rows, int64_t width,
                                                    int n, const int64_t* __restrict__ indptr,
                                                    const int32_t* __restrict__ index, const float* __restrict__ value,
                                                    int64_t* __restrict__ new_indptr, int32_t* new_index,
                                                    float* __restrict__ new_value) {
  __shared__ unsigned words[kWords];
  __shared__ int partial[kWarps];
  __shared__ int64_t source_begin[kSourceRows];
  __shared__ int64_t source_entries[kSourceRows + 1];  // entries of the rows before, from the first of all on
  __shared__ int32_t columns[kSources];
  __shared__ float weights[kSources];
  __shared__ int32_t members[kSources];
  Bits set{words, partial, 0, 0};
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t i = blockIdx.x;
  int64_t entries = 0;  // of all rows to be averaged, one row after the other
  for (int base = 0; base < n; base += kSourceRows) {
    if (warp == 0) {  // two lanes for each row: where it begins and where it ends
      const int t = lane / 2, last = lane % 2;
      long long edge = 0;
      if (base + t < n) edge = indptr[neighbor[i * width + base + t] + last];
      const long long other_edge = __shfl_xor_sync(kFullWarp, edge, 1);
      long long before = last ? edge - other_edge : 0;  // inclusive sum over the warp
      for (int offset = 1; offset < kWarp; offset *= 2) {
        const long long other = __shfl_up_sync(kFullWarp, before, offset);
        if (lane >= offset) before += other;
      }
      if (last)
        source_entries[t + 1] = entries + before;
      else
        source_begin[t] = edge;
      if (lane == 0) source_entries[0] = entries;
    }
    __syncthreads();
    for (int t = warp; t < min(kSourceRows, n - base); t += kWarps) {
      const int64_t begin = source_begin[t], offset = source_entries[t], end = source_entries[t + 1];
      for (int64_t at = offset + lane; at < end && at < kSources; at += kWarp) {
        columns[at] = index[begin + at - offset];
        if (new_index) weights[at] = value[begin + at - offset];
      }
    }
    entries = source_entries[kSourceRows];
    __syncthreads();
  }
  const bool kept = entries <= kSources;
  int64_t total = 0;
  for (int64_t first = 0; first < rows; first += kColumns) {
    set.clear(first, rows);
    if (kept) {
      for (int e = threadIdx.x; e < entries; e += kThreads) set.add(columns[e]);
    } else {
      for (int t = 0; t < n; ++t) {
        const int64_t j = neighbor[i * width + t];
        for (int64_t e = indptr[j] + threadIdx.x; e < indptr[j + 1]; e += kThreads) set.add(index[e]);
      }
    }
    int32_t* const out = new_index ? new_index + new_indptr[i] + total : nullptr;
    const int64_t found = set.emit(kept && out ? members : out);
    if (out) {
      float* const sums = new_value + new_indptr[i] + total;
      for (int64_t e = threadIdx.x; e < found; e += kThreads) {
        const int32_t column = kept ? members[e] : out[e];
        double sum = 0;
        if (kept) {
          for (int source = 0; source < entries; ++source)
            if (columns[source] == column) sum += weights[source];
          out[e] = column;
        } else {
          for (int t = 0; t < n; ++t) {
            const int64_t j = neighbor[i * width + t];
            const int64_t at = find(index + indptr[j], indptr[j + 1] - indptr[j], column);
            if (at >= 0) sum += value[indptr[j] + at];
          }
        }
        sums[e] = static_cast<float>(sum / n);
      }
    }
    total += found;
  }
  if (!new_index && threadIdx.x == 0) new_indptr[i + 1] = total;
}

unsigned warp_grid(int64_t rows) { return grid_size((rows + kRowWarps - 1) / kRowWarps); }

}  // namespace

void k_reciprocal_running_sums(int64_t* sums, int64_t count, cudaStream_t stream) {
  launch(k_reciprocal_prefix_kernel, 1, kScanThreads, 0, stream, sums, count);
}

void k_reciprocal_sets_cuda(const int32_t* neighbor, int64_t rows, int64_t width, int64_t k, int32_t* reciprocal,
                            int32_t* size, const Place& place) {
  const int64_t n = std::min(k + 1, width);
  if (n > kCudaMaxWidth) throw std::invalid_argument("k1: at most 1023 on a GPU");
  if (rows == 0) return;
  const DeviceGuard guard(place.device);
  launch(k_reciprocal_sets_kernel, warp_grid(rows), kRowWarps * kWarp, 0, static_cast<cudaStream_t>(place.stream),
         neighbor, rows, width, static_cast<int>(n), reciprocal, size);
}

void k_reciprocal_robust_sets_cuda(const int32_t* reciprocal, const int32_t* size, int64_t width, const int32_t* half,
                                   const int32_t* half_size, int64_t half_width, int64_t rows, int64_t* indptr,
                                   int32_t* index, void*, const Place& place) {
  const DeviceGuard guard(place.device);
  if (rows > 0)
    launch(k_reciprocal_robust_sets_kernel, grid_size(rows), kThreads, 0, static_cast<cudaStream_t>(place.stream),
           reciprocal, size, width, half, half_size, half_width, rows, indptr, index);
  if (!index) k_reciprocal_running_sums(indptr, rows, static_cast<cudaStream_t>(place.stream));
}

void k_reciprocal_listed_distance_cuda(const Features& x, const Features& y, DType dtype, int64_t D,
                                       const int32_t* neighbor, const float* neighbor_distance, int64_t width,
                                       const int64_t* indptr, const int32_t* index, float* out, const Place& place) {
  if (x.rows + y.rows == 0) return;
  const DeviceGuard guard(place.device);
  dispatch_device_float(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    launch(k_reciprocal_listed_distance_kernel<T>, warp_grid(x.rows + y.rows), kRowWarps * kWarp, 0,
           static_cast<cudaStream_t>(place.stream), device_rows<T>(x, y), x.rows + y.rows, D, neighbor,
           neighbor_distance, width, indptr, index, out);
  });
}

void k_reciprocal_encode_cuda(const int64_t* indptr, const float* distance, const float* row_max, int64_t rows,
                              float* value, const Place& place) {
  if (rows == 0) return;
  const DeviceGuard guard(place.device);
  launch(k_reciprocal_encode_kernel, warp_grid(rows), kRowWarps * kWarp, 0, static_cast<cudaStream_t>(place.stream),
         indptr, distance, row_max, rows, value);
}

void k_reciprocal_query_expansion_cuda(const int32_t* neighbor, int64_t rows, int64_t width, int64_t k2,
                                       const int64_t* indptr, const int32_t* index, const float* value,
                                       int64_t* new_indptr, int32_t* new_index, float* new_value, void*,
                                       const Place& place) {
  const DeviceGuard guard(place.device);
  if (rows > 0)
    launch(k_reciprocal_query_expansion_kernel, grid_size(rows), kThreads, 0, static_cast<cudaStream_t>(place.stream),
           neighbor, rows, width, static_cast<int>(std::min(k2, width)), indptr, index, value, new_indptr, new_index,
           new_value);
  if (!new_index) k_reciprocal_running_sums(new_indptr, rows, static_cast<cudaStream_t>(place.stream));
}

}  // namespace vareid
