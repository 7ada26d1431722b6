#include "ranking.h"

#include <stdexcept>

#include "cuda/distance_key.cuh"
#include "cuda/exact_distance.cuh"
#include "cuda/launch.h"
#include "cuda/left_out.cuh"

namespace vareid {
namespace {

constexpr int kThreads = 256;  // also the images of a query's identity that are ranked in one pass over the row
constexpr int kLoads = 4;      // images that a thread has under way at once

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

// What orders a query's images: given distances.
template <typename T>
struct GivenDistances {
  using Key = typename DeviceKey<T>::type;
  using Value = T;
  static constexpr bool kMeasures = false;
  const T* distances;
  int64_t row_stride;

  __device__ __forceinline__ GivenDistances of(int64_t q) const { return {distances + q * row_stride, row_stride}; }
  __device__ __forceinline__ Value load(int64_t image) const { return distances[image]; }
  __device__ __forceinline__ bool finite(Value value) const { return is_finite(value); }
  // The key of an image, where it is valid; the whole warp calls it.
  __device__ __forceinline__ Key key(int64_t image, bool valid) const {
    return valid ? key_of(distances[image]) : Key(0);
  }
  // How many of the sorted matches do not come after an image; -1 if its distance must be measured.
  __device__ __forceinline__ int place(Value value, int index, const Key* match_key, const int* match_index,
                                       int size) const {
    return position(key_of(value), index, match_key, match_index, size);
  }
};

// What orders them: float64 distances of features, measured where the bounds of float32 products do not decide.
template <typename T>
struct MeasuredDistances {
  using Key = int64_t;
  struct Value {
    float product, norm, window;
  };
  static constexpr bool kMeasures = true;
  const float* products;
  int64_t ld;
  DeviceRows<T> x, y;
  int64_t D;
  const float *x_norm, *x_window, *y_norm, *y_window;
  int64_t q;

  __device__ __forceinline__ MeasuredDistances of(int64_t query) const {
    MeasuredDistances own = *this;
    own.products += query * ld;
    own.q = query;
    return own;
  }
  __device__ __forceinline__ Value load(int64_t image) const {
    return {products[image], y_norm[image], y_window[image]};
  }
  __device__ __forceinline__ bool finite(const Value&) const { return true; }
  __device__ __forceinline__ Key key(int64_t image, bool valid) const {
    const int lane = threadIdx.x % kWarp;
    double own = 0;
    for (unsigned pending = __ballot_sync(kFullWarp, valid); pending; pending &= pending - 1) {
      const int source = __ffs(static_cast<int>(pending)) - 1;
      const int64_t j = __shfl_sync(kFullWarp, static_cast<long long>(image), source);
      const double exact = warp_exact_distance(x, q, y, j, D);
      if (lane == source) own = exact;
    }
    return key_of(own);
  }
  __device__ __forceinline__ int place(const Value& value, int index, const Key* match_key, const int* match_index,
                                       int size) const {
    const double middle = static_cast<double>(x_norm[q]) + value.norm - 2.0 * value.product;
    const double reach = static_cast<double>(x_window[q]) + value.window;
    const int low = position(key_of(middle - reach), index, match_key, match_index, size);
    const int high = position(key_of(middle + reach), index, match_key, match_index, size);
    if (low == high) return low;
    for (int at = low; at < high; ++at)
      if (match_index[at] == index) return at + 1;
    return -1;
  }
};

// One block for each query.
template <typename Source>
__global__ void ranking_kernel(Source sources, RankingLabels labels, RankingResults results, int64_t G) {
  using K = typename Source::Key;
  constexpr K kLast = static_cast<K>(~(K(1) << (8 * sizeof(K) - 1)));  // after the key of every number
  __shared__ K match_key[kThreads];
  __shared__ int match_index[kThreads];
  __shared__ int images_before[kThreads];   // images at or before a match, but not at or before the previous one
  __shared__ int matches_before[kThreads];  // the same for the query's matches
  __shared__ double partial[1][kThreads / kWarp + 1];
  __shared__ int first_rank, last_rank, matches, not_finite;
  const int64_t q = blockIdx.x;
  const int slot = threadIdx.x;
  // Which of a pass's images the thread takes: where they are measured, every warp takes some.
  const int item = Source::kMeasures ? slot % kWarp * (kThreads / kWarp) + slot / kWarp : slot;
  const Source source = sources.of(q);
  const int64_t begin = labels.group_begin[q];
  const int64_t size = labels.group_end[q] - begin;
  const int64_t* const own_codes = labels.query_codes + q * labels.codes;
  if (slot == 0) {
    first_rank = static_cast<int>(G);
    last_rank = matches = not_finite = 0;
  }
  double precision[1] = {0};
  for (int64_t base = 0; base == 0 || base < size; base += kThreads) {
    // This pass's matches, sorted.
    const bool here = base + item < size;
    const int64_t own_image = here ? labels.gallery_order[begin + base + item] : 0;
    const K own_key = source.key(own_image, here);
    const bool is_match = here && !left_out(labels, own_codes, own_image);
    const K key = is_match ? own_key : kLast;
    const int index = static_cast<int>(is_match ? own_image : G);
    match_key[item] = key;
    match_index[item] = index;
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
    const auto count = [&](int at) {
      if (at == 0)
        ++ahead;
      else if (at < in_pass)
        atomicAdd(&images_before[at], 1);
    };
    for (int64_t start = 0; start < G; start += kLoads * kThreads) {
      typename Source::Value value[kLoads];
      bool counts[kLoads];
#pragma unroll
      for (int u = 0; u < kLoads; ++u) {
        const int64_t image = start + u * kThreads + slot;
        counts[u] = image < G;
        if (counts[u]) value[u] = source.load(image);
        if (counts[u] && labels.junk) counts[u] = !labels.junk[image];
      }
      unsigned open = 0;  // one bit for each of the thread's images
#pragma unroll
      for (int u = 0; u < kLoads; ++u) {
        const int64_t image = start + u * kThreads + slot;
        if (image < G) finite = finite && source.finite(value[u]);
        if (!counts[u] || in_pass == 0) continue;
        const int at = source.place(value[u], static_cast<int>(image), match_key, match_index, in_pass);
        if (Source::kMeasures && at < 0)
          open |= 1u << u;
        else
          count(at);
      }
      if constexpr (Source::kMeasures) {
        if (__ballot_sync(kFullWarp, open != 0) == 0) continue;
#pragma unroll 1
        for (int u = 0; u < kLoads; ++u) {
          const int64_t image = start + u * kThreads + slot;
          const bool measured = (open >> u) & 1u;
          const K exact = source.key(image, measured);
          if (measured) count(position(exact, static_cast<int>(image), match_key, match_index, in_pass));
        }
      }
    }
    if (ahead > 0) atomicAdd(&images_before[0], ahead);
    if (!finite) atomicOr(&not_finite, 1);
    if (in_pass > 0) {
      // The images of the query's identity: matches are counted once more, the others are taken out again.
      for (int64_t from = 0; from < size; from += kThreads) {
        const bool inside = from + item < size;
        const int64_t image = inside ? labels.gallery_order[begin + from + item] : 0;
        const K value = from == base ? own_key : source.key(image, inside);
        const int at = inside ? position(value, static_cast<int>(image), match_key, match_index, in_pass) : in_pass;
        if (at == in_pass) continue;
        if (left_out(labels, own_codes, image))
          atomicAdd(&images_before[at], -1);
        else
          atomicAdd(&matches_before[at], 1);
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
    results.average_precision[q] = found ? sum / matches : 0;
    results.inverse_negative_penalty[q] = found ? static_cast<double>(matches) / last_rank : 0;
    results.first_match_rank[q] = found ? first_rank : 0;
    results.num_matches[q] = not_finite ? -1 : matches;
  }
}

template <typename Source>
void rank(const Source& source, const RankingLabels& labels, const RankingResults& results, int64_t Q, int64_t G,
          const Place& place) {
  launch(ranking_kernel<Source>, dim3(grid_size(Q)), dim3(kThreads), 0, static_cast<cudaStream_t>(place.stream), source,
         labels, results, G);
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
    rank(GivenDistances<T>{static_cast<const T*>(distances), row_stride}, labels, results, Q, G, place);
  });
}

void ranking_features_cuda(float* products, int64_t ld, const Features& x, const Features& y, DType dtype, int64_t D,
                           const Bounds& x_bounds, const Bounds& y_bounds, const RankingLabels& labels,
                           const RankingResults& results, void*, int64_t, const Place& place) {
  if (x.rows > kMostBlocks) throw std::invalid_argument("products: at most 2^31 - 1 rows on a GPU");
  if (x.rows == 0) return;
  const DeviceGuard guard(place.device);
  dispatch_device_float(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    rank(MeasuredDistances<T>{products, ld, device_rows<T>(x), device_rows<T>(y), D, x_bounds.norm, x_bounds.window,
                              y_bounds.norm, y_bounds.window, 0},
         labels, results, x.rows, y.rows, place);
  });
}

}  // namespace vareid
