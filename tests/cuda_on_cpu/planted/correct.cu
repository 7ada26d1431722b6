// Correct kernels in the style of csrc/cuda that exercise every feature the harness executes.
#include <cstdint>

#include "cuda/launch.h"
#include "export.h"

namespace vareid {
namespace {

constexpr int kThreads = 128;

__device__ __forceinline__ float warp_sum(float x) {
  for (int offset = 16; offset > 0; offset >>= 1) x += __shfl_xor_sync(0xffffffffu, x, offset);
  return x;
}

// One block a row; the row's sum goes through shared memory and a barrier.
template <typename T>
__global__ void softmax_kernel(const T* __restrict__ x, T* __restrict__ y, int64_t columns) {
  __shared__ float part[kThreads / 32];
  const T* row = x + static_cast<int64_t>(blockIdx.x) * columns;
  float sum = 0.0f;
  for (int64_t c = threadIdx.x; c < columns; c += blockDim.x) sum += expf(static_cast<float>(row[c]));
  sum = warp_sum(sum);
  if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = sum;
  __syncthreads();
  sum = 0.0f;
  for (unsigned w = 0; w < blockDim.x / 32; ++w) sum += part[w];
  for (int64_t c = threadIdx.x; c < columns; c += blockDim.x)
    y[static_cast<int64_t>(blockIdx.x) * columns + c] = static_cast<T>(expf(static_cast<float>(row[c])) / sum);
}

// Padding keeps the column reads free of bank conflicts; without it each is 32 wavefronts.
template <int kPadding>
__global__ void transpose_kernel(const float* __restrict__ x, float* __restrict__ y, int n) {
  __shared__ float tile[32][32 + kPadding];
  const int row = static_cast<int>(blockIdx.y * 32 + threadIdx.y),
            column = static_cast<int>(blockIdx.x * 32 + threadIdx.x);
  if (row < n && column < n) tile[threadIdx.y][threadIdx.x] = x[static_cast<int64_t>(row) * n + column];
  __syncthreads();
  const int row_out = static_cast<int>(blockIdx.x * 32 + threadIdx.y),
            column_out = static_cast<int>(blockIdx.y * 32 + threadIdx.x);
  if (row_out < n && column_out < n) y[static_cast<int64_t>(row_out) * n + column_out] = tile[threadIdx.x][threadIdx.y];
}

__global__ void naive_transpose_kernel(const float* __restrict__ x, float* __restrict__ y, int n) {
  const int row = static_cast<int>(blockIdx.y * 32 + threadIdx.y),
            column = static_cast<int>(blockIdx.x * 32 + threadIdx.x);
  if (row < n && column < n) y[static_cast<int64_t>(column) * n + row] = x[static_cast<int64_t>(row) * n + column];
}

__global__ void copy4_kernel(const float4* __restrict__ x, float4* __restrict__ y, int n) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (i < n) y[i] = x[i];
}

// The last block to arrive adds up the others' partial sums: fence and atomic order the blocks.
__global__ void grid_sum_kernel(const float* __restrict__ x, float* __restrict__ partial, unsigned* __restrict__ ticket,
                                float* __restrict__ y, int n) {
  DYN_SHARED(float, shared);
  __shared__ bool last;
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  shared[threadIdx.x] = i < n ? x[i] : 0.0f;
  __syncthreads();
  for (unsigned half = blockDim.x / 2; half > 0; half /= 2) {
    if (threadIdx.x < half) shared[threadIdx.x] += shared[threadIdx.x + half];
    __syncthreads();
  }
  if (threadIdx.x == 0) {
    partial[blockIdx.x] = shared[0];
    __threadfence();
    last = atomicAdd(ticket, 1u) == gridDim.x - 1;
    __threadfence();
  }
  __syncthreads();
  if (last && threadIdx.x == 0) {
    float sum = 0.0f;
    for (unsigned b = 0; b < gridDim.x; ++b) sum += partial[b];
    *y = sum;
    *ticket = 0;  // for the next launch
  }
}

// Lanes exchange through shared memory within their warp only.
__global__ void warp_reverse_kernel(const int* __restrict__ x, int* __restrict__ y, unsigned* __restrict__ odd) {
  __shared__ int buffer[64];
  const unsigned t = threadIdx.x, lane = t % 32;
  buffer[t] = x[t];
  __syncwarp();
  y[t] = buffer[t - lane + 31 - lane];
  const unsigned ballot = __ballot_sync(0xffffffffu, x[t] & 1);
  if (lane == 0) odd[t / 32] = static_cast<unsigned>(__popc(ballot));
}

// Half a warp at a time.
__global__ void equal_lanes_kernel(const int* __restrict__ x, unsigned* __restrict__ y) {
  const unsigned t = threadIdx.x, half = t % 32 < 16 ? 0x0000ffffu : 0xffff0000u;
  y[t] = __match_any_sync(half, x[t]);
  __syncwarp(half);
}

}  // namespace

#define ROWS_LAUNCHER(name, T)                                                                                     \
  void name(const T* x, T* y, int64_t rows, int64_t columns, int device, void* stream) {                           \
    const DeviceGuard guard(device);                                                                               \
    if (rows > 0)                                                                                                  \
      launch(softmax_kernel<T>, dim3(grid_size(rows)), dim3(kThreads), 0, static_cast<cudaStream_t>(stream), x, y, \
             columns);                                                                                             \
  }
ROWS_LAUNCHER(softmax_cuda, float)
ROWS_LAUNCHER(softmax_double_cuda, double)

void transpose_cuda(const float* x, float* y, int n, int variant, int device, void* stream) {
  const DeviceGuard guard(device);
  const unsigned tiles = static_cast<unsigned>((n + 31) / 32);
  const auto kernel = variant == 0 ? transpose_kernel<1> : variant == 1 ? transpose_kernel<0> : naive_transpose_kernel;
  launch(kernel, dim3(tiles, tiles), dim3(32, 32), 0, static_cast<cudaStream_t>(stream), x, y, n);
}

void copy4_cuda(const float* x, float* y, int64_t n, int device, void* stream) {
  const DeviceGuard guard(device);
  launch(copy4_kernel, dim3(static_cast<unsigned>((n / 4 + 63) / 64)), dim3(64), 0, static_cast<cudaStream_t>(stream),
         reinterpret_cast<const float4*>(x), reinterpret_cast<float4*>(y), static_cast<int>(n / 4));
}

void grid_sum_cuda(const float* x, float* partial, unsigned* ticket, float* y, int n, int device, void* stream) {
  const DeviceGuard guard(device);
  check_cuda(cudaMemsetAsync(ticket, 0, sizeof(unsigned), static_cast<cudaStream_t>(stream)), "cudaMemsetAsync");
  launch(grid_sum_kernel, dim3(static_cast<unsigned>((n + 63) / 64)), dim3(64), 64 * sizeof(float),
         static_cast<cudaStream_t>(stream), x, partial, ticket, y, n);
}

void warp_reverse_cuda(const int* x, int* y, unsigned* odd, int device, void* stream) {
  const DeviceGuard guard(device);
  launch(warp_reverse_kernel, dim3(1), dim3(64), 0, static_cast<cudaStream_t>(stream), x, y, odd);
}

void equal_lanes_cuda(const int* x, unsigned* y, int device, void* stream) {
  const DeviceGuard guard(device);
  launch(equal_lanes_kernel, dim3(1), dim3(64), 0, static_cast<cudaStream_t>(stream), x, y);
}

void complaint_cuda(int device, void*) {
  const DeviceGuard guard(device);
  check_cuda(cudaErrorInvalidValue, "cudaMemsetAsync");
}

}  // namespace vareid

EXPORT(softmax_cuda)
EXPORT(softmax_double_cuda)
EXPORT(transpose_cuda)
EXPORT(copy4_cuda)
EXPORT(grid_sum_cuda)
EXPORT(warp_reverse_cuda)
EXPORT(equal_lanes_cuda)
EXPORT(complaint_cuda)
