#include "ranking.h"

#include <stdexcept>

#include "cuda/launch.h"
#include "cuda/reduce.cuh"
#include "cuda/vector.cuh"

namespace vareid {
namespace {

constexpr int kThreads = 256;  // also the images of a query's identity that are ranked in one pass over the row
constexpr int kLoads = 4;      // distances that a thread has under way at once

// Keys are integers that order as the distances do; -0 has the key of 0.
template <typename T>
struct DeviceKey {
  using type = int32_t;
};
template <>
struct DeviceKey<double> {
  using type = int64_t;
};

__device__ __forceinline__ int32_t signed_bits(float value) { return __float_as_int(value); }
__device__ __forceinline__ int64_t signed_bits(double value) { return __double_as_longlong(value); }
__device__ __forceinline__ int32_t signed_bits(__half value) { return static_cast<int16_t>(__half_as_ushort(value)); }
__device__ __forceinline__ int32_t signed_bits(__nv_bfloat16 value) {
  return static_cast<int16_t>(__bfloat16_as_ushort(value));
}

template <typename T>
constexpr int64_t kInfinityBits = 0;
template <>
constexpr int64_t kInfinityBits<float> = 0x7f800000;
template <>
constexpr int64_t kInfinityBits<double> = 0x7ff0000000000000;
template <>
constexpr int64_t kInfinityBits<__half> = 0x7c00;
template <>
constexpr int64_t kInfinityBits<__nv_bfloat16> = 0x7f80;

template <typename T>
__device__ __forceinline__ bool is_finite(T value) {
  using K = typename DeviceKey<T>::type;
  constexpr K kMagnitude = sizeof(T) == 2 ? K(0x7fff) : static_cast<K>(~(K(1) << (8 * sizeof(K) - 1)));
  return (signed_bits(value) & kMagnitude) < static_cast<K>(kInfinityBits<T>);
}

template <typename T>
__device__ __forceinline__ typename DeviceKey<T>::type key_of(T value) {
  using K = typename DeviceKey<T>::type;
  constexpr K kMagnitude = sizeof(T) == 2 ? K(0x7fff) : static_cast<K>(~(K(1) << (8 * sizeof(K) - 1)));
  const K bits = signed_bits(value);
  const K key = bits ^ ((bits >> (8 * sizeof(K) - 1)) & kMagnitude);
  return key == -1 ? K(0) : key;
}

template <typename K>
__device__ __forceinline__ bool precedes(K key, int index, K other_key, int other_index) {
  return key < other_key || (key == other_key && index < other_index);
}

// How many of the first `size` sorted matches do not come after (key, index).
template <typename K>
__device__ __forceinline__ int position(K key, int index, const K* match_key, const int* match_index, int size) {
  int low = 0;
  for (int high = size; low < high;) {
    const int middle = (low + high) / 2;
    if (precedes(key, index, match_key[middle], match_index[middle]))
      high = middle;
    else
      low = middle + 1;
  }
  return low;
}

// Turns counts into their running sums and returns that of the thread's own slot. Every thread calls it.
__device__ __forceinline__ int running_sum(int* count) {
  const int slot = threadIdx.x;
  for (int offset = 1; offset < kThreads; offset *= 2) {
    const int other = slot >= offset ? count[slot - offset] : 0;
    __syncthreads();
    count[slot] += other;
    __syncthreads();
  }
  return count[slot];
}

// One block for each query.
template <typename T>
__global__ void ranking_forward_kernel(
    const T* __restrict__ distances, int64_t row_stride, const int64_t* __restrict__ gallery_order,
    const int64_t* __restrict__ group_begin, const int64_t* __restrict__ group_end, const uint8_t* __restrict__ junk,
    const int64_t* __restrict__ query_camera, const int64_t* __restrict__ gallery_camera,
    double* __restrict__ average_precision, double* __restrict__ inverse_negative_penalty,
    int64_t* __restrict__ first_match_rank, int64_t* __restrict__ num_matches, int64_t G) {
  using K = typename DeviceKey<T>::type;
  constexpr K kLast = static_cast<K>(~(K(1) << (8 * sizeof(K) - 1)));  // after the key of every number
  __shared__ K match_key[kThreads];
  __shared__ int match_index[kThreads];
  __shared__ int images_before[kThreads];   // images at or before a match, but not at or before the previous one
  __shared__ int matches_before[kThreads];  // the same for the query's matches
  __shared__ double partial[1][kThreads / kWarp + 1];
  __shared__ int first_rank, last_rank, matches, not_finite;
  const int64_t q = blockIdx.x;
  const int slot = threadIdx.x;
  const T* const row = distances + q * row_stride;
  const int64_t begin = group_begin[q];
  const int64_t size = group_end[q] - begin;
  const int64_t camera = query_camera ? query_camera[q] : -1;
  if (slot == 0) {
    first_rank = static_cast<int>(G);
    last_rank = matches = not_finite = 0;
  }
  double precision[1] = {0};
  for (int64_t base = 0; base == 0 || base < size; base += kThreads) {
    // This pass's matches, sorted. Images by the query's own camera are left out.
    K key = kLast;
    int index = static_cast<int>(G);
    if (base + slot < size) {
      const int64_t image = gallery_order[begin + base + slot];
      if (camera == -1 || gallery_camera[image] != camera) {
        key = key_of(row[image]);
        index = static_cast<int>(image);
      }
    }
    match_key[slot] = key;
    match_index[slot] = index;
    images_before[slot] = matches_before[slot] = 0;
    const int in_pass = __syncthreads_count(index < G);
    if (in_pass > 1) {
      // A bitonic sort of the slots in use; those behind them hold kLast already.
      for (int length = 2; length / 2 < kThreads && length / 2 < size - base; length *= 2) {
        for (int stride = length / 2; stride > 0; stride /= 2) {
          const int other = slot ^ stride;
          if (other > slot) {
            const K a = match_key[slot], b = match_key[other];
            const int i = match_index[slot], j = match_index[other];
            const bool ascending = (slot & length) == 0;
            if (ascending ? precedes(b, j, a, i) : precedes(a, i, b, j)) {
              match_key[slot] = b;
              match_key[other] = a;
              match_index[slot] = j;
              match_index[other] = i;
            }
          }
          __syncthreads();
        }
      }
    } else if (in_pass == 1) {
      if (index < G) {
        match_key[0] = key;
        match_index[0] = index;
      }
      __syncthreads();
    }
    // Where every image of the row falls among them.
    int ahead = 0;
    bool finite = true;
    for (int64_t start = slot; start < G; start += kLoads * kThreads) {
      T value[kLoads];
      bool counts[kLoads];
#pragma unroll
      for (int u = 0; u < kLoads; ++u) {
        const int64_t image = start + u * kThreads;
        counts[u] = image < G;
        if (counts[u]) value[u] = row[image];
        if (counts[u] && junk) counts[u] = !junk[image];
      }
#pragma unroll
      for (int u = 0; u < kLoads; ++u) {
        const int64_t image = start + u * kThreads;
        if (image < G) finite = finite && is_finite(value[u]);
        if (!counts[u] || in_pass == 0) continue;
        const int at = position(key_of(value[u]), static_cast<int>(image), match_key, match_index, in_pass);
        if (at == 0)
          ++ahead;
        else if (at < in_pass)
          atomicAdd(&images_before[at], 1);
      }
    }
    if (ahead > 0) atomicAdd(&images_before[0], ahead);
    if (!finite) atomicOr(&not_finite, 1);
    if (in_pass > 0) {
      // The images of the query's identity: matches are counted once more, the others are taken out again.
      for (int64_t i = slot; i < size; i += kThreads) {
        const int64_t image = gallery_order[begin + i];
        const int at = position(key_of(row[image]), static_cast<int>(image), match_key, match_index, in_pass);
        if (at == in_pass) continue;
        if (camera == -1 || gallery_camera[image] != camera)
          atomicAdd(&matches_before[at], 1);
        else
          atomicAdd(&images_before[at], -1);
      }
      __syncthreads();
      const int rank = running_sum(images_before) + 1;
      const int hits = running_sum(matches_before) + 1;
      if (slot < in_pass) {
        precision[0] += static_cast<double>(hits) / static_cast<double>(rank);
        atomicMin(&first_rank, rank);
        atomicMax(&last_rank, rank);
      }
      if (slot == 0) matches += in_pass;
    }
  }
  const double sum = block_sums<1, kThreads / kWarp>(precision, partial);
  if (slot == 0) {
    const bool found = matches > 0 && !not_finite;
    average_precision[q] = found ? sum / matches : 0;
    inverse_negative_penalty[q] = found ? static_cast<double>(matches) / last_rank : 0;
    first_match_rank[q] = found ? first_rank : 0;
    num_matches[q] = not_finite ? -1 : matches;
  }
}

}  // namespace

void ranking_forward_cuda(const void* distances, int64_t row_stride, const RankingLabels& labels,
                          const RankingResults& results, void*, DType dtype, int64_t Q, int64_t G, int64_t,
                          const Place& place) {
  if (Q > kMostBlocks) throw std::invalid_argument("distances: at most 2^31 - 1 rows on a GPU");
  if (Q == 0) return;
  const DeviceGuard guard(place.device);
  dispatch_device_float(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    launch(ranking_forward_kernel<T>, dim3(grid_size(Q)), dim3(kThreads), 0, static_cast<cudaStream_t>(place.stream),
           static_cast<const T*>(distances), row_stride, labels.gallery_order, labels.group_begin, labels.group_end,
           labels.junk, labels.query_camera, labels.gallery_camera, results.average_precision,
           results.inverse_negative_penalty, results.first_match_rank, results.num_matches, G);
  });
}

}  // namespace vareid
