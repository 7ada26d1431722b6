// Deterministic sums over a warp and over a block.
#pragma once

#include <cuda_runtime.h>

namespace vareid {

constexpr int kWarp = 32;
constexpr unsigned kFullWarp = 0xffffffffu;

// The sum over the warp's lanes, in every lane.
template <typename T>
__device__ __forceinline__ T warp_sum(T value) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(kFullWarp, value, offset);
  return value;
}

// The sums of kCount values over the block's threads: lane i of warp 0 gets the i-th sum (i < kCount <= 32), the other
// lanes of warp 0 get 0. Blocks are whole warps. Calls that share `partial` need a __syncthreads() between them.
template <int kCount, int kMaxWarps, typename T>
__device__ __forceinline__ T block_sums(const T (&values)[kCount], T (&partial)[kCount][kMaxWarps + 1]) {
  static_assert(kCount <= kWarp, "one lane of the first warp for each sum");
  const int lane = threadIdx.x % kWarp;
  const int warp = threadIdx.x / kWarp;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const T sum = warp_sum(values[i]);
    if (lane == 0) partial[i][warp] = sum;
  }
  __syncthreads();
  T total = 0;
  if (warp == 0 && lane < kCount)
    for (int w = 0; w < static_cast<int>(blockDim.x) / kWarp; ++w) total += partial[lane][w];
  return total;
}

}  // namespace vareid
