#include <cmath>
#include <stdexcept>

#include "cuda/exact_distance.cuh"
#include "cuda/k_reciprocal.cuh"
#include "cuda/launch.h"
#include "cuda/smallest.cuh"
#include "k_reciprocal.h"

namespace vareid {
namespace {

constexpr int kRowWarps = 4;
constexpr int kThreads = 128;
constexpr int kWarps = kThreads / kWarp;
// Sorting by column: every pass orders the entries by one digit of it and keeps the order of those that share the
// digit.
constexpr int kSortThreads = 512;
constexpr int kSortWarps = kSortThreads / kWarp;
constexpr int kRounds = static_cast<int>(kInvertTile) / kSortThreads;  // entries of a thread
constexpr int kTile = static_cast<int>(kInvertTile);
constexpr int kDigits = static_cast<int>(kInvertDigits);
constexpr int kSector = 32 / sizeof(int32_t);
constexpr int kGallery = 8192;  // gallery rows whose sums are kept in shared memory
constexpr int kBestPlaces = static_cast<int>(kCudaMaxTopk) + kWarp;

// The row of every entry from row `first` on. One warp for each row.
__global__ void k_reciprocal_owner_kernel(const int64_t* __restrict__ indptr, int64_t first, int64_t rows,
                                          int32_t* __restrict__ owner) {
  const int64_t r = first + blockIdx.x * static_cast<int64_t>(kRowWarps) + threadIdx.x / kWarp;
  if (r >= rows) return;
  const int64_t base = indptr[first], end = indptr[r + 1];
  for (int64_t e = indptr[r] + threadIdx.x % kWarp; e < end; e += kWarp)
    owner[e - base] = static_cast<int32_t>(r - first);
}

// How often each digit occurs in each tile, at [digit][tile]. One block for each tile; `base`, if not null, is where
// the entries begin in key.
__global__ void k_reciprocal_digits_kernel(const int32_t* __restrict__ key, const int64_t* __restrict__ base,
                                           int64_t entries, int shift, int digits, int64_t* __restrict__ counts) {
  __shared__ int count[kDigits];
  for (int d = threadIdx.x; d < digits; d += kSortThreads) count[d] = 0;
  __syncthreads();
  const int64_t first = blockIdx.x * static_cast<int64_t>(kTile), end = min(first + kTile, entries);
  const int64_t begin = base ? *base : 0;
  for (int64_t e = first - begin % kSector + threadIdx.x; e < end; e += kSortThreads)  // from a sector's beginning on
    if (e >= first) atomicAdd(&count[(key[begin + e] >> shift) & (digits - 1)], 1);
  __syncthreads();
  for (int d = threadIdx.x; d < digits; d += kSortThreads)
    counts[static_cast<int64_t>(d) * gridDim.x + blockIdx.x] = count[d];
}

// Moves a tile's entries to where their digits belong: offsets [digit][tile] says where the tile's first one goes. The
// tile is put in order in shared memory first, so that neighbours are written together. One block for each tile.
__global__ void k_reciprocal_sort_kernel(const int32_t* __restrict__ key, const int32_t* __restrict__ owner,
                                         const float* __restrict__ weight, const int64_t* __restrict__ base,
                                         int64_t entries, int shift, int digits, const int64_t* __restrict__ offsets,
                                         int32_t* __restrict__ new_key, int32_t* __restrict__ new_owner,
                                         float* __restrict__ new_weight) {
  __shared__ int32_t staged[kTile];
  __shared__ uint8_t digit_at[kTile];
  __shared__ int tile_start[kDigits];
  __shared__ int64_t target[kDigits];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t first = blockIdx.x * static_cast<int64_t>(kTile);
  const int size = static_cast<int>(min(static_cast<int64_t>(kTile), entries - first));
  const int64_t from = (base ? *base : 0) + first;
  // How often each of a warp's digits has occurred; until the places are known, this lies where the values go later.
  static_assert(kSortWarps * kDigits <= kTile, "the counts fit");
  int32_t* const seen = staged + warp * kDigits;
  for (int d = lane; d < digits; d += kWarp) seen[d] = 0;
  __syncwarp();
  int32_t column[kRounds];
  int place[kRounds];
#pragma unroll
  for (int round = 0; round < kRounds; ++round) {
    const int e = (warp * kRounds + round) * kWarp + lane;
    column[round] = e < size ? key[from + e] : 0;
    const int digit = e < size ? (column[round] >> shift) & (digits - 1) : -1;
    const unsigned same = __match_any_sync(kFullWarp, digit);
    place[round] = __popc(same & lanes_below()) + (e < size ? seen[digit] : 0);
    __syncwarp();
    if (e < size && (same & lanes_below()) == 0) seen[digit] += __popc(same);
    __syncwarp();
  }
  __syncthreads();
  for (int d = threadIdx.x; d < digits; d += kSortThreads) {  // sums over the warps before
    int total = 0;
    for (int w = 0; w < kSortWarps; ++w) {
      const int count = staged[w * kDigits + d];
      staged[w * kDigits + d] = total;
      total += count;
    }
    tile_start[d] = total;
    target[d] = offsets[static_cast<int64_t>(d) * gridDim.x + blockIdx.x];
  }
  __syncthreads();
  if (warp == 0) {  // and over the digits before
    int carry = 0;
    for (int d0 = 0; d0 < digits; d0 += kWarp) {
      const int own = d0 + lane < digits ? tile_start[d0 + lane] : 0;
      int before = own;
      for (int offset = 1; offset < kWarp; offset *= 2) {
        const int other = __shfl_up_sync(kFullWarp, before, offset);
        if (lane >= offset) before += other;
      }
      if (d0 + lane < digits) tile_start[d0 + lane] = carry + before - own;
      carry += __shfl_sync(kFullWarp, before, kWarp - 1);
    }
  }
  __syncthreads();
#pragma unroll
  for (int round = 0; round < kRounds; ++round) {
    const int digit = (column[round] >> shift) & (digits - 1);
    place[round] += tile_start[digit] + seen[digit];
  }
  __syncthreads();
  const auto stage = [&](const auto& bits_of) {
#pragma unroll
    for (int round = 0; round < kRounds; ++round) {
      const int e = (warp * kRounds + round) * kWarp + lane;
      if (e < size) staged[place[round]] = bits_of(round, e);
    }
    __syncthreads();
  };
  const auto target_of = [&](int s) { return target[digit_at[s]] + s - tile_start[digit_at[s]]; };
#pragma unroll
  for (int round = 0; round < kRounds; ++round)
    if ((warp * kRounds + round) * kWarp + lane < size)
      digit_at[place[round]] = static_cast<uint8_t>((column[round] >> shift) & (digits - 1));
  stage([&](int round, int) { return column[round]; });
  for (int s = threadIdx.x; s < size; s += kSortThreads) new_key[target_of(s)] = staged[s];
  __syncthreads();
  stage([&](int, int e) { return owner[first + e]; });
  for (int s = threadIdx.x; s < size; s += kSortThreads) new_owner[target_of(s)] = staged[s];
  __syncthreads();
  stage([&](int, int e) { return __float_as_int(weight[from + e]); });
  for (int s = threadIdx.x; s < size; s += kSortThreads) new_weight[target_of(s)] = __int_as_float(staged[s]);
}

// Where each column begins among the sorted keys.
__global__ void k_reciprocal_start_kernel(const int32_t* __restrict__ key, int64_t entries, int64_t columns,
                                          int64_t* __restrict__ start) {
  for (int64_t base = blockIdx.x * static_cast<int64_t>(kThreads); base <= entries;
       base += static_cast<int64_t>(gridDim.x) * kThreads) {
    const int64_t e = base + threadIdx.x;
    const int64_t own = e < entries ? key[e] : columns;
    int64_t previous = __shfl_up_sync(kFullWarp, static_cast<long long>(own), 1);
    if (threadIdx.x % kWarp == 0) previous = e > 0 && e <= entries ? key[e - 1] : -1;
    if (e > entries) continue;
    for (int64_t c = previous + 1; c <= own; ++c) start[c] = e;
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

// Sparse rows and their inverted index, by column.
struct Encodings {
  const int64_t* indptr;
  const int32_t* index;
  const float* value;
  const int64_t* start;
  const int32_t* owner;
  const float* weight;
};

// sum[g] = what row q and gallery row first + g share, for g below size. A column's owners are distinct, so its entries
// are added side by side; columns follow each other, so that every sum has one order. The whole block calls it.
__device__ __forceinline__ void add_shared(const Encodings& rows, int64_t q, int64_t gallery, int64_t first,
                                           int64_t size, float* sum) {
  __shared__ float own[kThreads];
  __shared__ int64_t begin[kThreads], end[kThreads];
  for (int64_t g = threadIdx.x; g < size; g += kThreads) sum[g] = 0;  // which this thread read last
  const int64_t row_begin = rows.indptr[q], row_end = rows.indptr[q + 1];
  for (int64_t base = row_begin; base < row_end; base += kThreads) {
    if (base + threadIdx.x < row_end) {
      const int32_t column = rows.index[base + threadIdx.x];
      int64_t from = rows.start[column], to = rows.start[column + 1];
      if (gallery > kGallery) {
        from = lower_bound(rows.owner, from, to, first);
        to = lower_bound(rows.owner, from, to, first + size);
      }
      own[threadIdx.x] = rows.value[base + threadIdx.x];
      begin[threadIdx.x] = from;
      end[threadIdx.x] = to;
    }
    __syncthreads();
    for (int c = 0; c < kThreads && base + c < row_end; ++c) {
      for (int64_t at = begin[c] + threadIdx.x; at < end[c]; at += kThreads)
        sum[rows.owner[at] - first] += fminf(own[c], rows.weight[at]);
      __syncthreads();
    }
  }
}

// One block for each query.
__global__ void k_reciprocal_blend_kernel(float* __restrict__ distance, int64_t ld, int64_t gallery,
                                          const float* __restrict__ row_max, Encodings rows, float lambda_value,
                                          double lambda_double) {
  __shared__ float sum[kGallery];
  const int64_t q = blockIdx.x;
  const float scale = static_cast<float>(row_max[q] > 0 ? lambda_double / row_max[q] : 0.0);
  for (int64_t first = 0; first < gallery; first += kGallery) {
    const int64_t size = min(static_cast<int64_t>(kGallery), gallery - first);
    add_shared(rows, q, gallery, first, size, sum);
    float* const row = distance + q * ld + first;
    for (int64_t g = threadIdx.x; g < size; g += kThreads) {
      const float m = fminf(sum[g], 1.0f);
      row[g] = (1.0f - lambda_value) * (1.0f - m / (2.0f - m)) + fminf(row[g] * scale, lambda_value);
    }
  }
}

// One block for each query; each warp keeps the best of those that it scores.
template <typename T>
__global__ void k_reciprocal_topk_kernel(DeviceRows<T> query, DeviceRows<T> gallery, int64_t G, int64_t D,
                                         const int32_t* __restrict__ nearest, const float* __restrict__ original,
                                         int64_t listed, const float* __restrict__ row_max, Encodings rows,
                                         double lambda_value, int k, float* __restrict__ distance,
                                         int64_t* __restrict__ gallery_index) {
  __shared__ float sum[kGallery];
  __shared__ double values[kWarps][kBestPlaces];
  __shared__ int32_t indices[kWarps][kBestPlaces];
  __shared__ int counts[kWarps];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t q = blockIdx.x;
  const double scale = row_max[q] > 0 ? lambda_value / row_max[q] : 0.0;
  const auto final_distance = [&](double squared, float shared) {
    const double m = fminf(shared, 1.0f);
    return (1 - lambda_value) * (1 - m / (2 - m)) + fmin(squared * scale, lambda_value);
  };
  // Those that share nothing are ordered by their original distance or, where that weighs nothing, by index.
  const bool by_index = !(scale > 0);
  const int64_t certain = by_index ? k : listed;
  Smallest<kBestPlaces> best{values[warp], indices[warp], k};
  for (int64_t first = 0; first < G; first += kGallery) {
    const int64_t size = min(static_cast<int64_t>(kGallery), G - first);
    add_shared(rows, q, G, first, size, sum);
    __syncthreads();
    for (int64_t base = warp * kWarp; base < certain; base += kThreads) {
      const int64_t c = base + lane;
      int64_t g = c;
      if (!by_index) g = c < certain ? nearest[q * listed + c] : -1;
      const bool here = c < certain && g >= first && g < first + size;
      double own = 0;
      if (here) {
        own = final_distance(by_index ? 0.0f : original[q * listed + c], sum[g - first]);
        sum[g - first] = 0;  // done
      }
      best.show(here, own, static_cast<int32_t>(g));
    }
    __syncthreads();
    for (int64_t base = warp * kWarp; base < size; base += kThreads) {
      const int64_t g = first + base + lane;
      const float shared = base + lane < size ? sum[base + lane] : 0.0f;
      double squared = 0;
      if (!by_index) {
        const unsigned sharing = __ballot_sync(kFullWarp, shared > 0);
        squared = static_cast<float>(warp_exact_distances(query, q, gallery, g, sharing, D));
      }
      best.show(shared > 0, final_distance(squared, shared), static_cast<int32_t>(g));
    }
  }
  merge_smallest<kWarps>(best, values, indices, counts, [&](int rank, double value, int32_t g) {
    distance[q * k + rank] = static_cast<float>(value);
    gallery_index[q * k + rank] = g;
  });
}

unsigned warp_grid(int64_t rows) { return grid_size((rows + kRowWarps - 1) / kRowWarps); }

}  // namespace

void k_reciprocal_invert_cuda(const int64_t* indptr, const int32_t* index, const float* value, int64_t rows,
                              int64_t first, int64_t columns, int64_t entries, int64_t* start, int32_t* owner,
                              float* weight, void* workspace, const Place& place) {
  const DeviceGuard guard(place.device);
  const auto queue = static_cast<cudaStream_t>(place.stream);
  const int64_t tiles = (entries + kTile - 1) / kTile;
  auto* const counts = static_cast<int64_t*>(workspace);
  auto* const spare = reinterpret_cast<int32_t*>(counts + kDigits * tiles + 4);
  const int64_t length = (entries + kSector - 1) / kSector * kSector;
  // The last pass ends in the result; passes before it take turns between the result and the spare arrays.
  int32_t* const keys[] = {spare, spare + length};
  int32_t* const owners[] = {owner, spare + 2 * length};
  float* const weights[] = {weight, reinterpret_cast<float*>(spare + 3 * length)};
  if (entries > 0) {
    int bits = 0;
    while (bits < 31 && (int64_t{1} << bits) < columns) ++bits;
    const int passes = std::max(1, (bits + kInvertBits - 1) / kInvertBits), width = (bits + passes - 1) / passes;
    int from = passes % 2, to = 1 - from;
    launch(k_reciprocal_owner_kernel, warp_grid(rows - first), kRowWarps * kWarp, 0, queue, indptr, first, rows,
           owners[from]);
    for (int pass = 0; pass < passes; ++pass) {
      const int64_t* const base = pass == 0 ? indptr + first : nullptr;
      const int32_t* const key = pass == 0 ? index : keys[from];
      const float* const values = pass == 0 ? value : weights[from];
      const int shift = pass * width, digits = 1 << width;
      launch(k_reciprocal_digits_kernel, grid_size(tiles), kSortThreads, 0, queue, key, base, entries, shift, digits,
             counts + 1);
      k_reciprocal_running_sums(counts, digits * tiles, queue);
      launch(k_reciprocal_sort_kernel, grid_size(tiles), kSortThreads, 0, queue, key,
             static_cast<const int32_t*>(owners[from]), values, base, entries, shift, digits,
             static_cast<const int64_t*>(counts), keys[to], owners[to], weights[to]);
      std::swap(from, to);
    }
  }
  launch(k_reciprocal_start_kernel, grid_size(std::min<int64_t>(entries / kThreads + 1, int64_t{1} << 16)), kThreads, 0,
         queue, static_cast<const int32_t*>(keys[0]), entries, columns, start);
}

void k_reciprocal_blend_cuda(float* distance, int64_t ld, int64_t queries, int64_t gallery, const float* row_max,
                             const int64_t* indptr, const int32_t* index, const float* value, const int64_t* start,
                             const int32_t* owner, const float* weight, double lambda_value, void*,
                             const Place& place) {
  if (queries == 0 || gallery == 0) return;
  const DeviceGuard guard(place.device);
  launch(k_reciprocal_blend_kernel, grid_size(queries), kThreads, 0, static_cast<cudaStream_t>(place.stream), distance,
         ld, gallery, row_max, Encodings{indptr, index, value, start, owner, weight}, static_cast<float>(lambda_value),
         lambda_value);
}

void k_reciprocal_topk_cuda(const Features& query, const Features& gallery, DType dtype, int64_t D,
                            const int32_t* nearest, const float* original, int64_t listed, const float* row_max,
                            const int64_t* indptr, const int32_t* index, const float* value, const int64_t* start,
                            const int32_t* owner, const float* weight, double lambda_value, int64_t k, float* distance,
                            int64_t* gallery_index, void*, const Place& place) {
  if (k < 1 || k > kCudaMaxTopk) throw std::invalid_argument("topk: 1 to 128 on a GPU");
  if (query.rows == 0) return;
  const DeviceGuard guard(place.device);
  dispatch_device_float(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    launch(k_reciprocal_topk_kernel<T>, grid_size(query.rows), kThreads, 0, static_cast<cudaStream_t>(place.stream),
           device_rows<T>(query), device_rows<T>(gallery), gallery.rows, D, nearest, original, listed, row_max,
           Encodings{indptr, index, value, start, owner, weight}, lambda_value, static_cast<int>(k), distance,
           gallery_index);
  });
}

}  // namespace vareid
