#include <cmath>
#include <stdexcept>

#include "cuda/launch.h"
#include "cuda/smallest.cuh"
#include "cuda/vector.cuh"
#include "k_reciprocal.h"

namespace vareid {
namespace {

constexpr int kListPlaces = 192;
constexpr int kListRows = 8;  // gallery rows of a block, whose columns of q_g fill 32-byte sectors

// One warp for each row: rows of `first` (Q values, stride first_row) and then of `second` (G values). With turned, the
// Q values are a column of `first`, read in tiles.
template <typename T, bool kTurned>
__global__ void k_reciprocal_matrix_neighbors_kernel(const T* __restrict__ first, const T* __restrict__ second,
                                                     int64_t rows, int64_t Q, int64_t G, int k,
                                                     int32_t* __restrict__ neighbor, double* __restrict__ row_max) {
  __shared__ double values[kListRows][kListPlaces];
  __shared__ int32_t indices[kListRows][kListPlaces];
  __shared__ double tile[kWarp][kListRows + 1];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t r0 = blockIdx.x * static_cast<int64_t>(kListRows), r = r0 + warp;
  const bool active = r < rows;
  Smallest<kListPlaces> list{values[warp], indices[warp], k};
  double largest = 0;
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
      largest = fmax(largest, own);
      list.show(c < Q, own, static_cast<int32_t>(c));
    }
    if (kTurned) __syncthreads();
  }
  if (!active) return;
  for (int64_t base = 0; base < G; base += kWarp) {
    const int64_t c = base + lane;
    const double own = c < G ? static_cast<double>(widen(second[r * G + c])) : 0.0;
    largest = fmax(largest, own);
    list.show(c < G, own, static_cast<int32_t>(Q + c));
  }
  __syncwarp();
  for (int c = lane; c < list.count; c += kWarp) {
    const int rank = list.rank_of(list.value[c], list.index[c]);
    if (rank < k) neighbor[r * k + rank] = list.index[c];
  }
  for (int offset = kWarp / 2; offset > 0; offset /= 2)
    largest = fmax(largest, __shfl_xor_sync(kFullWarp, largest, offset));
  if (lane == 0) row_max[r] = largest;
}

}  // namespace

void k_reciprocal_matrix_neighbors_cuda(const void* q_g, const void* q_q, const void* g_g, DType dtype, int64_t Q,
                                        int64_t G, int64_t k, int32_t* neighbor, double* row_max, void*,
                                        const Place& place) {
  if (k < 1 || k >= kListPlaces - kWarp) throw std::invalid_argument("k: 1 to 159 on a GPU");
  const DeviceGuard guard(place.device);
  const auto queue = static_cast<cudaStream_t>(place.stream);
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
