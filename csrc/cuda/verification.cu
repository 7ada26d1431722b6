#include "verification.h"

#include <cmath>
#include <type_traits>

#include "cuda/distance_key.cuh"
#include "cuda/launch.h"
#include "cuda/left_out.cuh"
#include "cuda/reduce.cuh"

namespace vareid {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;                // a row for each
constexpr int kLoads = 4;                               // images that a lane has under way at once
constexpr int kWindow = 8192;                           // digits whose pairs a block counts in shared memory
constexpr int64_t kBlocks = 1024;                       // enough for any GPU
constexpr int64_t kMostPairs = (int64_t{1} << 32) - 1;  // of a block, in 32-bit counts

// The bits of a key below its first digit, and the first digit of the window: distances around 1.
template <typename T>
constexpr int kLowBits = 8 * sizeof(T) - 16;
template <typename T>
constexpr int kWindowBegin = 87 << 7;  // float32 and bfloat16: 2^-40 to 2^24
template <>
constexpr int kWindowBegin<double> = 767 << 4;  // 2^-256 to 2^256
template <>
constexpr int kWindowBegin<__half> = 9 << 10;  // 2^-6 to 2^2

__device__ __forceinline__ void add(int64_t* count, int64_t by) {
  atomicAdd(reinterpret_cast<unsigned long long*>(count), static_cast<unsigned long long>(by));
}

// Calls match(distance, image) and other(distance, image) for the pairs of row q; the whole warp calls it, each lane
// has pairs of its own. Whether all distances of the lane are finite.
template <typename T, typename Match, typename Other>
__device__ __forceinline__ bool visit_row(const T* __restrict__ row, const RankingLabels& labels, int64_t q, int64_t G,
                                          const Match& match, const Other& other) {
  constexpr int kTile = kLoads * kWarp;
  const int lane = threadIdx.x % kWarp;
  const int64_t begin = labels.group_begin[q], end = labels.group_end[q];
  const int64_t* const own_codes = labels.query_codes + q * labels.codes;
  bool finite = true;
  int64_t next = begin;
  for (int64_t start = 0; start < G; start += kTile) {
    T value[kLoads];
    unsigned counts = 0;  // one bit for each of the lane's images
#pragma unroll
    for (int u = 0; u < kLoads; ++u) {
      const int64_t image = start + u * kWarp + lane;
      if (image >= G) continue;
      value[u] = row[image];
      finite = finite && is_finite(value[u]);
      if (!labels.junk || !labels.junk[image]) counts |= 1u << u;
    }
    for (; next < end; ++next) {  // the images of the query's identity are in order
      const int64_t at = labels.gallery_order[next] - start;
      if (at >= kTile) break;
      if (at % kWarp == lane) counts &= ~(1u << (at / kWarp));
    }
#pragma unroll
    for (int u = 0; u < kLoads; ++u)
      if (counts >> u & 1u) other(value[u], start + u * kWarp + lane);
  }
#pragma unroll 1  // a few images; registers are dearer
  for (int64_t i = begin + lane; i < end; i += kWarp) {
    const int64_t image = labels.gallery_order[i];
    if (!left_out(labels, own_codes, image)) match(row[image], image);
  }
  return finite;
}

// A nearest image, ties by the lower index.
template <typename K>
struct Nearest {
  K key = 0;
  int image = -1;

  __device__ __forceinline__ void show(K other_key, int other) {
    const bool nearer = image < 0 || other_key < key || (other_key == key && other < image);
    if (other < 0 || !nearer) return;
    key = other_key;
    image = other;
  }
  // That of the whole warp, in every lane.
  __device__ __forceinline__ void combine() {
#pragma unroll
    for (int offset = kWarp / 2; offset > 0; offset /= 2) {
      const K other_key = __shfl_xor_sync(kFullWarp, key, offset);
      const int other = __shfl_xor_sync(kFullWarp, image, offset);
      show(other_key, other);
    }
  }
};

template <typename T>
__global__ void verification_histogram_kernel(const T* __restrict__ distances, int64_t row_stride, RankingLabels labels,
                                              int64_t* counts, double* __restrict__ nearest_distance,
                                              int64_t* __restrict__ nearest_index, int64_t Q, int64_t G) {
  using K = typename DeviceKey<T>::type;
  __shared__ unsigned window[kWindow];
  for (int i = threadIdx.x; i < kWindow; i += kThreads) window[i] = 0;
  __syncthreads();
  const int64_t step = static_cast<int64_t>(gridDim.x) * kWarps;
  for (int64_t q = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp; q < Q; q += step) {
    const T* const row = distances + q * row_stride;
    Nearest<K> nearest[2];
    const bool finite = visit_row(
        row, labels, q, G,
        [&](T value, int64_t image) {
          const K key = key_of(value);
          nearest[0].show(key, static_cast<int>(image));
          add(counts + kDigitValues / 2 + (key >> kLowBits<T>), 1);
        },
        [&](T value, int64_t image) {
          const K key = key_of(value);
          nearest[1].show(key, static_cast<int>(image));
          const int64_t digit = key >> kLowBits<T>, at = digit - kWindowBegin<T>;
          if (at >= 0 && at < kWindow)
            atomicAdd(&window[at], 1u);
          else
            add(counts + kDigitValues + kDigitValues / 2 + digit, 1);
        });
    const bool all_finite = __ballot_sync(kFullWarp, !finite) == 0;
    nearest[0].combine();
    nearest[1].combine();
    const int kind = threadIdx.x % kWarp;
    if (kind < 2) {
      const int image = kind == 0 ? nearest[0].image : nearest[1].image;
      const double distance = image < 0 ? INFINITY : static_cast<double>(widen(row[image])) + 0.0;  // -0 becomes 0
      nearest_index[kind * Q + q] = all_finite ? image : -1;
      nearest_distance[kind * Q + q] = all_finite ? distance : NAN;
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < kWindow; i += kThreads)
    if (window[i] > 0) add(counts + kDigitValues + kDigitValues / 2 + kWindowBegin<T> + i, window[i]);
}

template <typename T>
__global__ void verification_refine_kernel(const T* __restrict__ distances, int64_t row_stride, RankingLabels labels,
                                           Prefixes prefixes, int64_t* counts, int64_t Q, int64_t G) {
  const int below = 8 * sizeof(T) - 16 * prefixes.digits;
  const auto count = [&](T value, int64_t* tables) {
    const auto key = key_of(value);
    int table = -1;
#pragma unroll
    for (int p = 0; p < kMostPrefixes; ++p)
      if (p < prefixes.count && (key >> below) == prefixes.value[p]) table = p;
    if (table >= 0) add(tables + table * kDigitValues + ((key >> (below - 16)) & (kDigitValues - 1)), 1);
  };
  const int64_t step = static_cast<int64_t>(gridDim.x) * kWarps;
  for (int64_t q = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp; q < Q; q += step)
    visit_row(
        distances + q * row_stride, labels, q, G, [&](T value, int64_t) { count(value, counts); },
        [&](T value, int64_t) { count(value, counts + prefixes.count * kDigitValues); });
}

template <typename T>
__global__ void verification_accepted_kernel(const T* __restrict__ distances, int64_t row_stride, RankingLabels labels,
                                             double threshold, int64_t* __restrict__ accepted, int64_t Q, int64_t G) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * kWarps;
  for (int64_t q = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp; q < Q; q += step) {
    int matches = 0, others = 0;
    visit_row(
        distances + q * row_stride, labels, q, G,
        [&](T value, int64_t) { matches += static_cast<double>(widen(value)) <= threshold; },
        [&](T value, int64_t) { others += static_cast<double>(widen(value)) <= threshold; });
    matches = warp_sum(matches);
    others = warp_sum(others);
    if (threadIdx.x % kWarp == 0) {
      accepted[q] = matches;
      accepted[Q + q] = others;
    }
  }
}

// Blocks for so many rows, each of which counts no more pairs than 32 bits hold.
unsigned row_blocks(int64_t Q, int64_t G) {
  const int64_t full = (Q + kWarps - 1) / kWarps;
  const int64_t rounds = std::max<int64_t>(1, kMostPairs / (kWarps * std::max<int64_t>(1, G)));
  return grid_size(std::max(std::min(full, kBlocks), (full + rounds - 1) / rounds));
}

}  // namespace

void verification_histogram_cuda(const void* distances, int64_t row_stride, const RankingLabels& labels,
                                 int64_t* counts, double* nearest_distance, int64_t* nearest_index, void*, DType dtype,
                                 int64_t Q, int64_t G, const Place& place) {
  if (Q == 0) return;
  const DeviceGuard guard(place.device);
  dispatch_device_float(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    launch(verification_histogram_kernel<T>, dim3(row_blocks(Q, G)), dim3(kThreads), 0,
           static_cast<cudaStream_t>(place.stream), static_cast<const T*>(distances), row_stride, labels, counts,
           nearest_distance, nearest_index, Q, G);
  });
}

void verification_refine_cuda(const void* distances, int64_t row_stride, const RankingLabels& labels,
                              const Prefixes& prefixes, int64_t* counts, void*, DType dtype, int64_t Q, int64_t G,
                              const Place& place) {
  if (Q == 0) return;
  const DeviceGuard guard(place.device);
  const auto refine = [&](auto* rows) {
    using T = std::remove_const_t<std::remove_pointer_t<decltype(rows)>>;
    launch(verification_refine_kernel<T>, dim3(row_blocks(Q, G)), dim3(kThreads), 0,
           static_cast<cudaStream_t>(place.stream), rows, row_stride, labels, prefixes, counts, Q, G);
  };
  if (dtype == DType::kFloat32)
    refine(static_cast<const float*>(distances));
  else
    refine(static_cast<const double*>(distances));
}

void verification_accepted_cuda(const void* distances, int64_t row_stride, const RankingLabels& labels,
                                double threshold, int64_t* accepted, DType dtype, int64_t Q, int64_t G,
                                const Place& place) {
  if (Q == 0) return;
  const DeviceGuard guard(place.device);
  dispatch_device_float(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    launch(verification_accepted_kernel<T>, dim3(row_blocks(Q, G)), dim3(kThreads), 0,
           static_cast<cudaStream_t>(place.stream), static_cast<const T*>(distances), row_stride, labels, threshold,
           accepted, Q, G);
  });
}

}  // namespace vareid
