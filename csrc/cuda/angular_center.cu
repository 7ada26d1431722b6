#include "angular_center.h"

#include <stdexcept>

#include "cuda/launch.h"
#include "cuda/reduce.cuh"
#include "cuda/vector.cuh"

namespace vareid {
namespace {

constexpr int kMaxThreads = 256;
constexpr int kMaxWarps = kMaxThreads / kWarp;
constexpr int kViewTile = 4;  // views whose sums are kept in registers at once; W is read once for each tile
constexpr int kSumThreads = 256;
constexpr int64_t kMaxViews = 2048;  // their coefficients must fit in shared memory

// One block for each identity.
template <typename T, int kWidth>
__global__ void angular_center_forward_kernel(const T* __restrict__ W, const T* __restrict__ U,
                                              const uint8_t* __restrict__ mask,
                                              typename DeviceAccumulator<T>::type* __restrict__ cosine,
                                              typename DeviceAccumulator<T>::type* __restrict__ identity_norm,
                                              typename DeviceAccumulator<T>::type* __restrict__ viewpoint_norm,
                                              int64_t V, int64_t D) {
  using Acc = typename DeviceAccumulator<T>::type;
  constexpr int kSums = 1 + 2 * kViewTile;  // |W|^2, the dots, the |U|^2
  __shared__ Acc partial[kSums][kMaxWarps + 1];
  const int64_t j = blockIdx.x;
  const T* const w_row = W + j * D;
  for (int64_t first = 0; first == 0 || first < V; first += kViewTile) {
    bool exists[kViewTile];
#pragma unroll
    for (int t = 0; t < kViewTile; ++t) exists[t] = first + t < V && (!mask || mask[j * V + first + t]);
    Acc sums[kSums] = {};
    for (int64_t d = static_cast<int64_t>(threadIdx.x) * kWidth; d < D;
         d += static_cast<int64_t>(blockDim.x) * kWidth) {
      const Pack<T, kWidth> w = load_pack<T, kWidth>(w_row + d);
#pragma unroll
      for (int i = 0; i < kWidth; ++i) sums[0] += widen(w.value[i]) * widen(w.value[i]);
#pragma unroll
      for (int t = 0; t < kViewTile; ++t) {
        if (!exists[t]) continue;
        const Pack<T, kWidth> u = load_pack<T, kWidth>(U + (j * V + first + t) * D + d);
#pragma unroll
        for (int i = 0; i < kWidth; ++i) {
          const Acc value = widen(u.value[i]);
          sums[1 + t] += widen(w.value[i]) * value;
          sums[1 + kViewTile + t] += value * value;
        }
      }
    }
    if (first > 0) __syncthreads();  // the previous tile's sums have been read
    const Acc total = block_sums<kSums, kMaxWarps>(sums, partial);
    if (threadIdx.x < kWarp) {
      const int lane = threadIdx.x;
      const Acc w_norm = sqrt(__shfl_sync(kFullWarp, total, 0));
      const Acc dot = __shfl_sync(kFullWarp, total, 1 + lane % kViewTile);
      const Acc u_norm = sqrt(__shfl_sync(kFullWarp, total, 1 + kViewTile + lane % kViewTile));
      if (lane < kViewTile && first + lane < V) {
        const int64_t pair = j * V + first + lane;
        const Acc product = w_norm * u_norm;
        cosine[pair] = product == Acc(0) ? Acc(0) : dot / product;
        viewpoint_norm[pair] = u_norm;
      }
      if (lane == 0 && first == 0) identity_norm[j] = w_norm;
    }
  }
}

// One block: the sum of 1 - cosine over the existing pairs, in an order that depends on nothing but their number.
template <typename Acc>
__global__ void angular_center_sum_kernel(const Acc* __restrict__ cosine, const uint8_t* __restrict__ mask,
                                          Acc* __restrict__ loss, int64_t pairs) {
  __shared__ double partial[1][kSumThreads / kWarp + 1];
  double sums[1] = {0.0};
  for (int64_t pair = threadIdx.x; pair < pairs; pair += kSumThreads)
    if (!mask || mask[pair]) sums[0] += 1.0 - static_cast<double>(cosine[pair]);
  const double total = block_sums<1, kSumThreads / kWarp>(sums, partial);
  if (threadIdx.x == 0) loss[0] = static_cast<Acc>(total);
}

// One block for each identity. Every thread owns columns, so that both gradients are written in one pass over W and U.
template <typename T, int kWidth>
__global__ void angular_center_backward_kernel(const typename DeviceAccumulator<T>::type* __restrict__ upstream,
                                               const T* __restrict__ W, const T* __restrict__ U,
                                               const uint8_t* __restrict__ mask,
                                               const typename DeviceAccumulator<T>::type* __restrict__ cosine,
                                               const typename DeviceAccumulator<T>::type* __restrict__ identity_norm,
                                               const typename DeviceAccumulator<T>::type* __restrict__ viewpoint_norm,
                                               T* __restrict__ grad_W, T* __restrict__ grad_U, int64_t V, int64_t D) {
  using Acc = typename DeviceAccumulator<T>::type;
  DYN_SHARED(Acc, coefficients);  // for each view: factor of W in grad U, of U in grad U, of W in grad W
  const int64_t j = blockIdx.x;
  const Acc g = upstream[0];
  const Acc w_norm = identity_norm[j];
  const Acc w_inverse = w_norm == Acc(0) ? Acc(0) : 1 / w_norm;
  for (int64_t v = threadIdx.x; v < V; v += blockDim.x) {
    const Acc u_norm = viewpoint_norm[j * V + v];
    const Acc u_inverse = u_norm == Acc(0) ? Acc(0) : 1 / u_norm;
    const Acc scaled = u_norm == Acc(0) || w_norm == Acc(0) ? Acc(0) : g * cosine[j * V + v];
    coefficients[3 * v] = -g * w_inverse * u_inverse;
    coefficients[3 * v + 1] = scaled * u_inverse * u_inverse;
    coefficients[3 * v + 2] = scaled * w_inverse * w_inverse;
  }
  __syncthreads();
  Acc along_w = 0;
  for (int64_t v = 0; v < V; ++v) along_w += coefficients[3 * v + 2];
  for (int64_t d = static_cast<int64_t>(threadIdx.x) * kWidth; d < D; d += static_cast<int64_t>(blockDim.x) * kWidth) {
    const Pack<T, kWidth> w = load_pack<T, kWidth>(W + j * D + d);
    Acc sum[kWidth];
#pragma unroll
    for (int i = 0; i < kWidth; ++i) sum[i] = along_w * widen(w.value[i]);
    for (int64_t v = 0; v < V; ++v) {
      const int64_t at = (j * V + v) * D + d;
      Pack<T, kWidth> out;
      if (!mask || mask[j * V + v]) {
        const Acc across = coefficients[3 * v];
        const Acc along_u = coefficients[3 * v + 1];
        const Pack<T, kWidth> u = load_pack<T, kWidth>(U + at);
#pragma unroll
        for (int i = 0; i < kWidth; ++i) {
          const Acc value = widen(u.value[i]);
          out.value[i] = narrow<T>(across * widen(w.value[i]) + along_u * value);
          sum[i] += across * value;
        }
      } else {
#pragma unroll
        for (int i = 0; i < kWidth; ++i) out.value[i] = narrow<T>(Acc(0));
      }
      if (grad_U) store_pack<T, kWidth>(grad_U + at, out);
    }
    if (grad_W) {
      Pack<T, kWidth> out;
#pragma unroll
      for (int i = 0; i < kWidth; ++i) out.value[i] = narrow<T>(sum[i]);
      store_pack<T, kWidth>(grad_W + j * D + d, out);
    }
  }
}

void check_sizes(int64_t K, int64_t V) {
  if (K > kMostBlocks) throw std::invalid_argument("identity_centers: at most 2^31 - 1 rows on a GPU");
  if (V > kMaxViews) throw std::invalid_argument("viewpoint_centers: at most 2048 viewpoints on a GPU");
}

unsigned block_size(int64_t D, int width) {
  const int64_t warps = (D + static_cast<int64_t>(width) * kWarp - 1) / (static_cast<int64_t>(width) * kWarp);
  return static_cast<unsigned>(std::min<int64_t>(std::max<int64_t>(warps, 1), kMaxWarps) * kWarp);
}

template <typename T, int kWidth>
void forward(const void* W, const void* U, const uint8_t* mask, void* cosine, void* identity_norm, void* viewpoint_norm,
             int64_t K, int64_t V, int64_t D, cudaStream_t stream) {
  using Acc = typename DeviceAccumulator<T>::type;
  launch(angular_center_forward_kernel<T, kWidth>, dim3(grid_size(K)), dim3(block_size(D, kWidth)), 0, stream,
         static_cast<const T*>(W), static_cast<const T*>(U), mask, static_cast<Acc*>(cosine),
         static_cast<Acc*>(identity_norm), static_cast<Acc*>(viewpoint_norm), V, D);
}

template <typename T, int kWidth>
void backward(const void* upstream, const void* W, const void* U, const uint8_t* mask, const void* cosine,
              const void* identity_norm, const void* viewpoint_norm, void* grad_W, void* grad_U, int64_t K, int64_t V,
              int64_t D, cudaStream_t stream) {
  using Acc = typename DeviceAccumulator<T>::type;
  launch(angular_center_backward_kernel<T, kWidth>, dim3(grid_size(K)), dim3(block_size(D, kWidth)),
         static_cast<size_t>(3 * V) * sizeof(Acc), stream, static_cast<const Acc*>(upstream), static_cast<const T*>(W),
         static_cast<const T*>(U), mask, static_cast<const Acc*>(cosine), static_cast<const Acc*>(identity_norm),
         static_cast<const Acc*>(viewpoint_norm), static_cast<T*>(grad_W), static_cast<T*>(grad_U), V, D);
}

}  // namespace

void angular_center_forward_cuda(const void* W, const void* U, const uint8_t* mask, void* loss, void* cosine,
                                 void* identity_norm, void* viewpoint_norm, DType dtype, int64_t K, int64_t V,
                                 int64_t D, const Place& place) {
  check_sizes(K, V);
  const DeviceGuard guard(place.device);
  const cudaStream_t queue = static_cast<cudaStream_t>(place.stream);
  dispatch_device_float(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    using Acc = typename DeviceAccumulator<T>::type;
    if (K > 0 && rows_are_packed<T>(D, {W, U}))
      forward<T, 16 / sizeof(T)>(W, U, mask, cosine, identity_norm, viewpoint_norm, K, V, D, queue);
    else if (K > 0)
      forward<T, 1>(W, U, mask, cosine, identity_norm, viewpoint_norm, K, V, D, queue);
    launch(angular_center_sum_kernel<Acc>, dim3(1), dim3(kSumThreads), 0, queue, static_cast<const Acc*>(cosine), mask,
           static_cast<Acc*>(loss), K * V);
  });
}

void angular_center_backward_cuda(const void* upstream, const void* W, const void* U, const uint8_t* mask,
                                  const void* cosine, const void* identity_norm, const void* viewpoint_norm,
                                  void* grad_W, void* grad_U, DType dtype, int64_t K, int64_t V, int64_t D,
                                  const Place& place) {
  check_sizes(K, V);
  if (K == 0 || D == 0) return;
  const DeviceGuard guard(place.device);
  const cudaStream_t queue = static_cast<cudaStream_t>(place.stream);
  dispatch_device_float(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    if (rows_are_packed<T>(D, {W, U, grad_W, grad_U}))
      backward<T, 16 / sizeof(T)>(upstream, W, U, mask, cosine, identity_norm, viewpoint_norm, grad_W, grad_U, K, V, D,
                                  queue);
    else
      backward<T, 1>(upstream, W, U, mask, cosine, identity_norm, viewpoint_norm, grad_W, grad_U, K, V, D, queue);
  });
}

}  // namespace vareid
