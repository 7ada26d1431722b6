// The k smallest of the values that a warp, or the warps of a block, were shown; ties by the lower index.
#pragma once

#include <cstdint>

#include "cuda/reduce.cuh"

namespace vareid {

__device__ __forceinline__ unsigned lanes_below() { return (1u << (threadIdx.x % kWarp)) - 1; }

// A warp's list in shared memory: every lane carries the same k, count and threshold. k is at most kPlaces - 32.
template <int kPlaces>
struct Smallest {
  static_assert(kPlaces % kWarp == 0, "whole warps");
  double* value;   // [kPlaces]
  int32_t* index;  // [kPlaces]
  int k;
  int count = 0;
  double threshold = INFINITY;  // what does not come before this pair is not among the k smallest
  int32_t threshold_index = -1;

  __device__ __forceinline__ bool precedes(double a, int32_t i, double b, int32_t j) const {
    return a < b || (a == b && i < j);
  }
  __device__ __forceinline__ int rank_of(double own, int32_t own_index) const {
    int rank = 0;
    for (int other = 0; other < count; ++other) rank += precedes(value[other], index[other], own, own_index);
    return rank;
  }
  // Leaves the k smallest, in no order.
  __device__ __forceinline__ void compact() {
    const int lane = threadIdx.x % kWarp;
    __syncwarp();
    unsigned stays = 0;  // one bit for each of the lane's places
    double last = 0;
    int32_t last_index = 0;
    for (int base = 0; base < kPlaces; base += kWarp) {
      const int c = base + lane;
      const double own = c < count ? value[c] : 0.0;
      const int32_t own_index = c < count ? index[c] : 0;
      const int rank = c < count ? rank_of(own, own_index) : kPlaces;
      if (rank < k) stays |= 1u << (base / kWarp);
      const unsigned mask = __ballot_sync(kFullWarp, rank == k - 1);
      if (mask) {
        last = __shfl_sync(kFullWarp, own, __ffs(static_cast<int>(mask)) - 1);
        last_index = __shfl_sync(kFullWarp, own_index, __ffs(static_cast<int>(mask)) - 1);
      }
    }
    int kept = 0;
    for (int base = 0; base < kPlaces; base += kWarp) {
      const bool stay = (stays >> (base / kWarp)) & 1u;
      const double own = stay ? value[base + lane] : 0.0;
      const int32_t own_index = stay ? index[base + lane] : 0;
      const unsigned mask = __ballot_sync(kFullWarp, stay);
      __syncwarp();
      if (stay) {
        value[kept + __popc(mask & lanes_below())] = own;
        index[kept + __popc(mask & lanes_below())] = own_index;
      }
      kept += __popc(mask);
    }
    if (count >= k) {
      threshold = last;
      threshold_index = last_index;
    }
    count = kept;
  }
  // One value from each lane, or none where it is not valid.
  __device__ __forceinline__ void show(bool valid, double own, int32_t own_index) {
    bool hit = valid && precedes(own, own_index, threshold, threshold_index);
    unsigned pending = __ballot_sync(kFullWarp, hit);
    while (pending) {
      const int space = kPlaces - count, place = __popc(pending & lanes_below());
      const bool taken = hit && place < space;
      if (taken) {
        value[count + place] = own;
        index[count + place] = own_index;
      }
      count += min(__popc(pending), space);
      if (count == kPlaces) compact();
      hit = hit && !taken && precedes(own, own_index, threshold, threshold_index);
      pending = __ballot_sync(kFullWarp, hit);
    }
  }
};

// Calls write(rank, value, index) for the k smallest of the block's lists, warp w's at [w][..]. All threads call it;
// counts [kWarps] is shared memory.
template <int kWarps, int kPlaces, typename Write>
__device__ __forceinline__ void merge_smallest(Smallest<kPlaces>& own, const double (*values)[kPlaces],
                                               const int32_t (*indices)[kPlaces], int* counts, const Write& write) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  if (own.count > own.k) own.compact();
  if (lane == 0) counts[warp] = own.count;
  __syncthreads();
  for (int c = lane; c < own.count; c += kWarp) {
    const double value = values[warp][c];
    const int32_t index = indices[warp][c];
    int rank = 0;
    for (int w = 0; w < kWarps; ++w)
      for (int other = 0; other < counts[w]; ++other)
        rank += own.precedes(values[w][other], indices[w][other], value, index);
    if (rank < own.k) write(rank, value, index);
  }
}

}  // namespace vareid
