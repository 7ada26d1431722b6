#include "k_reciprocal.h"

#include <cmath>
#include <stdexcept>

#include "cuda/exact_distance.cuh"
#include "cuda/launch.h"

namespace vareid {
namespace {

constexpr int kRowWarps = 4;   // rows for each block, where a warp does a row
constexpr int kThreads = 128;  // where a block does a row
constexpr int kWarps = kThreads / kWarp;
constexpr int kWordsPerThread = 16;
constexpr int kWords = kThreads * kWordsPerThread;
constexpr int kPaddedWords = kWords + kThreads;
constexpr int64_t kColumns = int64_t{kWords} * 32;  // columns whose membership is held in shared memory at once
constexpr int kWidth = static_cast<int>(kCudaMaxWidth);
constexpr int kHeld = 4;        // weights that a lane keeps
constexpr int kSources = 1024;  // entries of the rows to be averaged that are kept in shared memory
constexpr int kGallery = 8192;  // gallery rows whose sums are kept in shared memory
constexpr int kScanThreads = 1024;
constexpr int kListCapacity = 192;  // at least k + 1, k up to 128
constexpr int kListRows = 8;        // gallery rows of a block, whose columns of q_g fill 32-byte sectors

__device__ __forceinline__ unsigned lanes_below() { return (1u << (threadIdx.x % kWarp)) - 1; }

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

// A set of columns first.. of one row, held by a block as bits.
struct Bits {
  unsigned* words;  // [kPaddedWords]
  int* partial;     // [kWarps]

  // A thread's words lie apart from its neighbours', so that a warp reads 32 banks.
  __device__ __forceinline__ unsigned& word(int w) const { return words[w + w / kWordsPerThread]; }
  __device__ __forceinline__ void clear() const {
    for (int w = threadIdx.x; w < kPaddedWords; w += kThreads) words[w] = 0;
    __syncthreads();
  }
  __device__ __forceinline__ void add(int64_t column, int64_t first) const {
    const int64_t at = column - first;
    if (at >= 0 && at < kColumns) atomicOr(&word(static_cast<int>(at / 32)), 1u << (at % 32));
  }
  // Writes the members in ascending order to out, if not null, and returns how many there are.
  __device__ __forceinline__ int64_t emit(int64_t first, int32_t* __restrict__ out) const {
    __syncthreads();
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, begin = threadIdx.x * kWordsPerThread;
    int own = 0;
    for (int w = 0; w < kWordsPerThread; ++w) own += __popc(word(begin + w));
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
      for (int w = 0; w < kWordsPerThread; ++w)
        for (unsigned bits = word(begin + w); bits; bits &= bits - 1)
          out[at++] = static_cast<int32_t>(first + (begin + w) * 32 + __ffs(static_cast<int>(bits)) - 1);
    __syncthreads();
    return total;
  }
};

// One block for each row. With index null, the sizes go to indptr[i + 1].
__global__ void k_reciprocal_expanded_kernel(const int32_t* __restrict__ reciprocal, const int32_t* __restrict__ size,
                                             int64_t width, const int32_t* __restrict__ half,
                                             const int32_t* __restrict__ half_size, int64_t half_width, int64_t rows,
                                             int64_t* __restrict__ indptr, int32_t* __restrict__ index) {
  __shared__ unsigned words[kPaddedWords];
  __shared__ int partial[kWarps];
  const Bits set{words, partial};
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t i = blockIdx.x;
  __shared__ int32_t own[kWidth];
  const int n = size[i];
  for (int c = threadIdx.x; c < n; c += kThreads) own[c] = reciprocal[i * width + c];
  int64_t total = 0;
  for (int64_t first = 0; first < rows; first += kColumns) {
    set.clear();
    for (int c = threadIdx.x; c < n; c += kThreads) set.add(own[c], first);
    for (int c = warp; c < n; c += kWarps) {
      const int64_t candidate = own[c];
      const int32_t* const theirs = half + candidate * half_width;
      const int m = half_size[candidate];
      int common = 0;
      for (int base = 0; base < m; base += kWarp) {
        const int32_t other = base + lane < m ? theirs[base + lane] : -1;
        bool inside = false;
        for (int e = 0; e < n; ++e) inside |= own[e] == other;
        common += __popc(__ballot_sync(kFullWarp, inside));
      }
      if (3 * common > 2 * m)
        for (int e = lane; e < m; e += kWarp) set.add(theirs[e], first);
    }
    total += set.emit(first, index ? index + indptr[i] + total : nullptr);
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

// One block for each row, one warp for each of its entries.
template <typename T>
__global__ void k_reciprocal_listed_distance_kernel(DeviceRows<T> x, int64_t D, const int32_t* __restrict__ neighbor,
                                                    const float* __restrict__ neighbor_distance, int64_t width,
                                                    const int64_t* __restrict__ indptr,
                                                    const int32_t* __restrict__ index, float* __restrict__ out) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t i = blockIdx.x;
  const int32_t first_listed = lane < width ? neighbor[i * width + lane] : -1;
  for (int64_t e = indptr[i] + warp; e < indptr[i + 1]; e += kWarps) {
    const int32_t j = index[e];
    int64_t at = -1;
    for (int64_t base = 0; base < width && at < 0; base += kWarp) {
      int32_t listed = first_listed;
      if (base > 0) listed = base + lane < width ? neighbor[i * width + base + lane] : -1;
      const bool here = listed == j;
      const unsigned mask = __ballot_sync(kFullWarp, here);
      if (mask) at = base + __ffs(static_cast<int>(mask)) - 1;
    }
    const float value =
        at >= 0 ? neighbor_distance[i * width + at] : static_cast<float>(warp_exact_distance(x, i, x, j, D));
    if (lane == 0) out[e] = value;
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
__global__ void k_reciprocal_expand_kernel(const int32_t* __restrict__ neighbor, int64_t rows, int64_t width, int n,
                                           const int64_t* __restrict__ indptr, const int32_t* __restrict__ index,
                                           const float* __restrict__ value, int64_t* __restrict__ new_indptr,
                                           int32_t* new_index, float* __restrict__ new_value) {
  __shared__ unsigned words[kPaddedWords];
  __shared__ int partial[kWarps];
  const Bits set{words, partial};
  const int64_t i = blockIdx.x;
  __shared__ int32_t columns[kSources];
  __shared__ float weights[kSources];
  int64_t entries = 0;  // of all rows to be averaged, one row after the other
  for (int t = 0; t < n; ++t) {
    const int64_t j = neighbor[i * width + t], begin = indptr[j], size = indptr[j + 1] - begin;
    for (int64_t e = threadIdx.x; e < size && entries + e < kSources; e += kThreads) {
      columns[entries + e] = index[begin + e];
      if (new_index) weights[entries + e] = value[begin + e];
    }
    entries += size;
  }
  const bool kept = entries <= kSources;
  int64_t total = 0;
  for (int64_t first = 0; first < rows; first += kColumns) {
    set.clear();
    if (kept) {
      for (int e = threadIdx.x; e < entries; e += kThreads) set.add(columns[e], first);
    } else {
      for (int t = 0; t < n; ++t) {
        const int64_t j = neighbor[i * width + t];
        for (int64_t e = indptr[j] + threadIdx.x; e < indptr[j + 1]; e += kThreads) set.add(index[e], first);
      }
    }
    total += set.emit(first, new_index ? new_index + new_indptr[i] + total : nullptr);
  }
  if (!new_index) {
    if (threadIdx.x == 0) new_indptr[i + 1] = total;
    return;
  }
  for (int64_t e = new_indptr[i] + threadIdx.x; e < new_indptr[i + 1]; e += kThreads) {
    const int32_t column = new_index[e];
    double sum = 0;
    if (kept) {
      for (int source = 0; source < entries; ++source)
        if (columns[source] == column) sum += weights[source];
    } else {
      for (int t = 0; t < n; ++t) {
        const int64_t j = neighbor[i * width + t];
        const int64_t at = find(index + indptr[j], indptr[j + 1] - indptr[j], column);
        if (at >= 0) sum += value[indptr[j] + at];
      }
    }
    new_value[e] = static_cast<float>(sum / n);
  }
}

__global__ void k_reciprocal_clear_kernel(int64_t* __restrict__ start, int64_t count) {
  for (int64_t c = blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x; c < count;
       c += static_cast<int64_t>(gridDim.x) * kThreads)
    start[c] = 0;
}

__global__ void k_reciprocal_count_kernel(const int64_t* __restrict__ indptr, const int32_t* __restrict__ index,
                                          int64_t first, int64_t rows, int64_t* start) {
  for (int64_t e = indptr[first] + blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x; e < indptr[rows];
       e += static_cast<int64_t>(gridDim.x) * kThreads)
    atomicAdd(reinterpret_cast<unsigned long long*>(start + index[e] + 1), 1ull);
}

// Entries go to their columns in any order. One warp for each row; `next` counts down from each column's size.
__global__ void k_reciprocal_scatter_kernel(const int64_t* __restrict__ indptr, const int32_t* __restrict__ index,
                                            const float* __restrict__ value, int64_t first, int64_t rows,
                                            const int64_t* __restrict__ start, int64_t* next,
                                            int32_t* __restrict__ owner, float* __restrict__ weight) {
  const int64_t r = first + blockIdx.x * static_cast<int64_t>(kRowWarps) + threadIdx.x / kWarp;
  if (r >= rows) return;
  for (int64_t e = indptr[r] + threadIdx.x % kWarp; e < indptr[r + 1]; e += kWarp) {
    const int64_t within =
        static_cast<int64_t>(atomicAdd(reinterpret_cast<unsigned long long*>(next + index[e]), 1ull));
    owner[start[index[e]] + within] = static_cast<int32_t>(r - first);
    weight[start[index[e]] + within] = value[e];
  }
}

// Each column's entries in the order of their rows. One warp for each column.
__global__ void k_reciprocal_order_kernel(const int64_t* __restrict__ start, int64_t columns,
                                          const int32_t* __restrict__ owner, const float* __restrict__ weight,
                                          int32_t* __restrict__ sorted_owner, float* __restrict__ sorted_weight) {
  const int64_t column = blockIdx.x * static_cast<int64_t>(kRowWarps) + threadIdx.x / kWarp;
  if (column >= columns) return;
  const int64_t begin = start[column], end = start[column + 1];
  for (int64_t e = begin + threadIdx.x % kWarp; e < end; e += kWarp) {
    const int32_t own = owner[e];
    int64_t rank = 0;
    for (int64_t other = begin; other < end; ++other) rank += owner[other] < own;
    sorted_owner[begin + rank] = own;
    sorted_weight[begin + rank] = weight[e];
  }
}

// The first entry of a column whose owner is at least `owner`.
__device__ __forceinline__ int64_t lower_bound(const int32_t* __restrict__ owners, int64_t low, int64_t high,
                                               int64_t owner) {
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (owners[middle] < owner)
      low = middle + 1;
    else
      high = middle;
  }
  return low;
}

// One block for each query. A column's owners are distinct, so its entries are added side by side; columns follow each
// other, so that every sum has one order.
__global__ void k_reciprocal_blend_kernel(float* __restrict__ distance, int64_t ld, int64_t gallery,
                                          const float* __restrict__ row_max, const int64_t* __restrict__ indptr,
                                          const int32_t* __restrict__ index, const float* __restrict__ value,
                                          const int64_t* __restrict__ start, const int32_t* __restrict__ owner,
                                          const float* __restrict__ weight, float lambda_value, double lambda_double) {
  __shared__ float shared[kGallery];
  const int64_t q = blockIdx.x;
  const float scale = static_cast<float>(row_max[q] > 0 ? lambda_double / row_max[q] : 0.0);
  for (int64_t first = 0; first < gallery; first += kGallery) {
    const int64_t size = min(static_cast<int64_t>(kGallery), gallery - first);
    for (int64_t g = threadIdx.x; g < size; g += kThreads) shared[g] = 0;
    __syncthreads();
    for (int64_t e = indptr[q]; e < indptr[q + 1]; ++e) {
      const float own = value[e];
      int64_t begin = start[index[e]], end = start[index[e] + 1];
      if (gallery > kGallery) {
        begin = lower_bound(owner, begin, end, first);
        end = lower_bound(owner, begin, end, first + size);
      }
      for (int64_t at = begin + threadIdx.x; at < end; at += kThreads)
        shared[owner[at] - first] += fminf(own, weight[at]);
      __syncthreads();
    }
    float* const row = distance + q * ld + first;
    for (int64_t g = threadIdx.x; g < size; g += kThreads) {
      const float m = fminf(shared[g], 1.0f);
      row[g] = (1.0f - lambda_value) * (1.0f - m / (2.0f - m)) + fminf(row[g] * scale, lambda_value);
    }
  }
}

// The k smallest values that a warp was shown, ties by the lower index: indices come in ascending order.
struct Smallest {
  double* value;
  int32_t* index;
  int k, count;
  double threshold, largest;

  __device__ __forceinline__ int rank_of(int c) const {
    int rank = 0;
    for (int other = 0; other < count; ++other)
      rank += value[other] < value[c] || (value[other] == value[c] && other < c);
    return rank;
  }
  __device__ void compact() {  // entries stay in the order of their indices
    __syncwarp();
    int kept = 0;
    double last = 0;
    bool stays[kListCapacity / kWarp];
    for (int base = 0; base < kListCapacity; base += kWarp) {
      const int c = base + static_cast<int>(threadIdx.x % kWarp);
      const int rank = c < count ? rank_of(c) : k;
      stays[base / kWarp] = rank < k;
      const unsigned mask = __ballot_sync(kFullWarp, rank == k - 1);
      if (mask) last = __shfl_sync(kFullWarp, rank == k - 1 ? value[c] : 0.0, __ffs(static_cast<int>(mask)) - 1);
    }
    for (int base = 0; base < kListCapacity; base += kWarp) {
      const int c = base + static_cast<int>(threadIdx.x % kWarp);
      const bool stay = stays[base / kWarp];
      const double own = stay ? value[c] : 0.0;
      const int32_t own_index = stay ? index[c] : 0;
      const unsigned mask = __ballot_sync(kFullWarp, stay);
      __syncwarp();
      if (stay) {
        value[kept + __popc(mask & lanes_below())] = own;
        index[kept + __popc(mask & lanes_below())] = own_index;
      }
      kept += __popc(mask);
    }
    count = kept;
    threshold = last;
  }
  // One value from each lane, at ascending indices.
  __device__ void show(bool valid, double own, int64_t at) {
    if (valid) largest = fmax(largest, own);
    bool hit = valid && own < threshold;
    unsigned pending = __ballot_sync(kFullWarp, hit);
    while (pending) {
      const int space = kListCapacity - count, place = __popc(pending & lanes_below());
      const bool taken = hit && place < space;
      if (taken) {
        value[count + place] = own;
        index[count + place] = static_cast<int32_t>(at);
      }
      count += min(__popc(pending), space);
      if (count == kListCapacity) compact();
      hit = hit && !taken && own < threshold;
      pending = __ballot_sync(kFullWarp, hit);
    }
  }
  __device__ void write(int32_t* __restrict__ out, double* __restrict__ maximum) {
    __syncwarp();
    for (int c = threadIdx.x % kWarp; c < count; c += kWarp) {
      const int rank = rank_of(c);
      if (rank < k) out[rank] = index[c];
    }
    for (int offset = kWarp / 2; offset > 0; offset /= 2)
      largest = fmax(largest, __shfl_xor_sync(kFullWarp, largest, offset));
    if (threadIdx.x % kWarp == 0) *maximum = largest;
  }
};

// One warp for each row: rows of `first` (Q values, stride first_row) and then of `second` (G values). With turned, the
// Q values are a column of `first`, read in tiles.
template <typename T, bool kTurned>
__global__ void k_reciprocal_matrix_neighbors_kernel(const T* __restrict__ first, const T* __restrict__ second,
                                                     int64_t rows, int64_t Q, int64_t G, int k,
                                                     int32_t* __restrict__ neighbor, double* __restrict__ row_max) {
  __shared__ double values[kListRows][kListCapacity];
  __shared__ int32_t indices[kListRows][kListCapacity];
  __shared__ double tile[kWarp][kListRows + 1];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t r0 = blockIdx.x * static_cast<int64_t>(kListRows), r = r0 + warp;
  const bool active = r < rows;
  Smallest list{values[warp], indices[warp], k, 0, INFINITY, 0.0};
  for (int64_t base = 0; base < Q; base += kWarp) {
    const int64_t c = base + lane;
    if (kTurned) {
      const int64_t q = base + threadIdx.x / kListRows, g = r0 + threadIdx.x % kListRows;
      if (q < Q && g < rows) tile[threadIdx.x / kListRows][threadIdx.x % kListRows] = widen(first[q * G + g]);
      __syncthreads();
    }
    if (active) {
      double own = 0;
      if (c < Q) own = kTurned ? tile[lane][warp] : static_cast<double>(widen(first[r * Q + c]));
      list.show(c < Q, own, c);
    }
    if (kTurned) __syncthreads();
  }
  if (!active) return;
  for (int64_t base = 0; base < G; base += kWarp) {
    const int64_t c = base + lane;
    list.show(c < G, c < G ? static_cast<double>(widen(second[r * G + c])) : 0.0, Q + c);
  }
  list.write(neighbor + r * k, row_max + r);
}

unsigned warp_grid(int64_t rows) { return grid_size((rows + kRowWarps - 1) / kRowWarps); }
unsigned thread_grid(int64_t items) {
  return grid_size(std::min<int64_t>((items + kThreads - 1) / kThreads, int64_t{1} << 16));
}

}  // namespace

void k_reciprocal_sets_cuda(const int32_t* neighbor, int64_t rows, int64_t width, int64_t k, int32_t* reciprocal,
                            int32_t* size, int device, void* stream) {
  const int64_t n = std::min(k + 1, width);
  if (n > kCudaMaxWidth) throw std::invalid_argument("k1: at most 1023 on a GPU");
  if (rows == 0) return;
  const DeviceGuard guard(device);
  launch(k_reciprocal_sets_kernel, warp_grid(rows), kRowWarps * kWarp, 0, static_cast<cudaStream_t>(stream), neighbor,
         rows, width, static_cast<int>(n), reciprocal, size);
}

void k_reciprocal_expanded_cuda(const int32_t* reciprocal, const int32_t* size, int64_t width, const int32_t* half,
                                const int32_t* half_size, int64_t half_width, int64_t rows, int64_t* indptr,
                                int32_t* index, int device, void* stream) {
  const DeviceGuard guard(device);
  if (rows > 0)
    launch(k_reciprocal_expanded_kernel, grid_size(rows), kThreads, 0, static_cast<cudaStream_t>(stream), reciprocal,
           size, width, half, half_size, half_width, rows, indptr, index);
  if (!index) launch(k_reciprocal_prefix_kernel, 1, kScanThreads, 0, static_cast<cudaStream_t>(stream), indptr, rows);
}

void k_reciprocal_listed_distance_cuda(const void* x, const double* x_factor, int64_t x_rows, int64_t x_stride,
                                       const void* y, const double* y_factor, int64_t y_rows, int64_t y_stride,
                                       DType dtype, int64_t D, const int32_t* neighbor, const float* neighbor_distance,
                                       int64_t width, const int64_t* indptr, const int32_t* index, float* out,
                                       int device, void* stream) {
  if (x_rows + y_rows == 0) return;
  const DeviceGuard guard(device);
  dispatch_device_float(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    launch(k_reciprocal_listed_distance_kernel<T>, grid_size(x_rows + y_rows), kThreads, 0,
           static_cast<cudaStream_t>(stream), device_rows<T>(x, x_factor, x_rows, x_stride, y, y_factor, y_stride), D,
           neighbor, neighbor_distance, width, indptr, index, out);
  });
}

void k_reciprocal_encode_cuda(const int64_t* indptr, const float* distance, const float* row_max, int64_t rows,
                              float* value, int device, void* stream) {
  if (rows == 0) return;
  const DeviceGuard guard(device);
  launch(k_reciprocal_encode_kernel, warp_grid(rows), kRowWarps * kWarp, 0, static_cast<cudaStream_t>(stream), indptr,
         distance, row_max, rows, value);
}

void k_reciprocal_expand_cuda(const int32_t* neighbor, int64_t rows, int64_t width, int64_t k2, const int64_t* indptr,
                              const int32_t* index, const float* value, int64_t* new_indptr, int32_t* new_index,
                              float* new_value, int device, void* stream) {
  const DeviceGuard guard(device);
  if (rows > 0)
    launch(k_reciprocal_expand_kernel, grid_size(rows), kThreads, 0, static_cast<cudaStream_t>(stream), neighbor, rows,
           width, static_cast<int>(std::min(k2, width)), indptr, index, value, new_indptr, new_index, new_value);
  if (!new_index)
    launch(k_reciprocal_prefix_kernel, 1, kScanThreads, 0, static_cast<cudaStream_t>(stream), new_indptr, rows);
}

void k_reciprocal_invert_cuda(const int64_t* indptr, const int32_t* index, const float* value, int64_t rows,
                              int64_t first, int64_t columns, int64_t entries, int64_t* start, int32_t* owner,
                              float* weight, void* workspace, int device, void* stream) {
  const DeviceGuard guard(device);
  const auto queue = static_cast<cudaStream_t>(stream);
  auto* const next = static_cast<int64_t*>(workspace);
  auto* const loose_owner = reinterpret_cast<int32_t*>(next + columns);
  auto* const loose_weight = reinterpret_cast<float*>(loose_owner + entries);
  launch(k_reciprocal_clear_kernel, thread_grid(columns + 1), kThreads, 0, queue, start, columns + 1);
  if (columns > 0) launch(k_reciprocal_clear_kernel, thread_grid(columns), kThreads, 0, queue, next, columns);
  if (entries > 0)
    launch(k_reciprocal_count_kernel, thread_grid(entries), kThreads, 0, queue, indptr, index, first, rows, start);
  launch(k_reciprocal_prefix_kernel, 1, kScanThreads, 0, queue, start, columns);
  if (entries == 0) return;
  launch(k_reciprocal_scatter_kernel, warp_grid(rows - first), kRowWarps * kWarp, 0, queue, indptr, index, value, first,
         rows, static_cast<const int64_t*>(start), next, loose_owner, loose_weight);
  launch(k_reciprocal_order_kernel, warp_grid(columns), kRowWarps * kWarp, 0, queue, static_cast<const int64_t*>(start),
         columns, static_cast<const int32_t*>(loose_owner), static_cast<const float*>(loose_weight), owner, weight);
}

void k_reciprocal_blend_cuda(float* distance, int64_t ld, int64_t queries, int64_t gallery, const float* row_max,
                             const int64_t* indptr, const int32_t* index, const float* value, const int64_t* start,
                             const int32_t* owner, const float* weight, double lambda_value, int device, void* stream) {
  if (queries == 0 || gallery == 0) return;
  const DeviceGuard guard(device);
  launch(k_reciprocal_blend_kernel, grid_size(queries), kThreads, 0, static_cast<cudaStream_t>(stream), distance, ld,
         gallery, row_max, indptr, index, value, start, owner, weight, static_cast<float>(lambda_value), lambda_value);
}

void k_reciprocal_matrix_neighbors_cuda(const void* q_g, const void* q_q, const void* g_g, DType dtype, int64_t Q,
                                        int64_t G, int64_t k, int32_t* neighbor, double* row_max, int device,
                                        void* stream) {
  if (k < 1 || k >= kListCapacity - kWarp) throw std::invalid_argument("k: 1 to 159 on a GPU");
  const DeviceGuard guard(device);
  const auto queue = static_cast<cudaStream_t>(stream);
  dispatch_device_float(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    if (Q > 0)
      launch(k_reciprocal_matrix_neighbors_kernel<T, false>, grid_size((Q + kListRows - 1) / kListRows),
             kListRows * kWarp, 0, queue, static_cast<const T*>(q_q), static_cast<const T*>(q_g), Q, Q, G,
             static_cast<int>(k), neighbor, row_max);
    if (G > 0)
      launch(k_reciprocal_matrix_neighbors_kernel<T, true>, grid_size((G + kListRows - 1) / kListRows),
             kListRows * kWarp, 0, queue, static_cast<const T*>(q_g), static_cast<const T*>(g_g), G, Q, G,
             static_cast<int>(k), neighbor + Q * k, row_max + Q);
  });
}

}  // namespace vareid
