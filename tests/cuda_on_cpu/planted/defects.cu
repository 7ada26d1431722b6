// Kernels with one defect each, named after it, beside what the defect is. test_defects.py says what must be reported.
#include <cstdint>

#include "cuda/launch.h"
#include "export.h"

namespace vareid {
namespace {

constexpr int kThreads = 64;

// The neighbour's element is read without waiting for it.
__global__ void missing_syncthreads(const float* __restrict__ x, float* __restrict__ y, int n) {
  __shared__ float tile[kThreads];
  tile[threadIdx.x] = x[threadIdx.x];
  y[threadIdx.x] = tile[(threadIdx.x + 32) % n];
}

// The next round overwrites what a slower warp still reads.
__global__ void missing_second_syncthreads(const float* __restrict__ x, float* __restrict__ y, int n) {
  __shared__ float first;
  float sum = 0.0f;
  for (int round = 0; round < 3; ++round) {
    if (threadIdx.x == 0) first = x[round];
    __syncthreads();
    sum += first;
  }
  if (static_cast<int>(threadIdx.x) < n) y[threadIdx.x] = sum;
}

// A shuffle does not order the lanes' accesses to shared memory.
__global__ void missing_syncwarp(const float* __restrict__ x, float* __restrict__ y, int) {
  __shared__ float tile[kThreads];
  const unsigned lane = threadIdx.x % 32;
  tile[threadIdx.x] = x[threadIdx.x];
  const float other = __shfl_xor_sync(0xffffffffu, tile[threadIdx.x], 1);
  y[threadIdx.x] = tile[threadIdx.x - lane + (lane ^ 1)] + other;
}

// Both blocks write element 0.
__global__ void inter_block_race(const float* __restrict__ x, float* __restrict__ y, int n) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (i < n) y[i] = x[i];
  if (threadIdx.x == 0) y[0] = x[0];
}

// The second block reads what the first has written; the atomic lacks its fences.
__global__ void missing_fence(const float* __restrict__ x, float* __restrict__ y, unsigned* __restrict__ ticket,
                              int n) {
  if (threadIdx.x != 0) return;
  y[blockIdx.x] = x[blockIdx.x];
  if (atomicAdd(ticket, 1u) == gridDim.x - 1) y[n - 1] = y[0] + y[1];
}

__global__ void global_read_past_end(const float* __restrict__ x, float* __restrict__ y, int n) {
  if (static_cast<int>(threadIdx.x) < n) y[threadIdx.x] = x[threadIdx.x + 1];
}

__global__ void global_read_before_start(const float* __restrict__ x, float* __restrict__ y, int n) {
  if (static_cast<int>(threadIdx.x) < n) y[threadIdx.x] = x[static_cast<int>(threadIdx.x) - 1];
}

__global__ void global_write_past_end(const float* __restrict__ x, float* __restrict__ y, int n) {
  if (static_cast<int>(threadIdx.x) <= n) y[threadIdx.x] = x[0];
}

__global__ void static_shared_overflow(const float* __restrict__ x, float* __restrict__ y, int n) {
  __shared__ float tile[kThreads - 1];
  tile[threadIdx.x] = x[threadIdx.x];
  __syncthreads();
  if (static_cast<int>(threadIdx.x) < n) y[threadIdx.x] = tile[0];
}

// Launched with room for kThreads - 1 elements.
__global__ void dynamic_shared_overflow(const float* __restrict__ x, float* __restrict__ y, int n) {
  DYN_SHARED(float, tile);
  tile[threadIdx.x] = x[threadIdx.x];
  __syncthreads();
  if (static_cast<int>(threadIdx.x) < n) y[threadIdx.x] = tile[0];
}

__global__ void divergent_barrier(const float* __restrict__ x, float* __restrict__ y, int n) {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  if (static_cast<int>(threadIdx.x) < n) y[threadIdx.x] = x[threadIdx.x];
}

__global__ void barrier_after_exit(const float* __restrict__ x, float* __restrict__ y, int n) {
  if (static_cast<int>(threadIdx.x) >= n - 1) return;
  y[threadIdx.x] = x[threadIdx.x];
  __syncthreads();
}

__global__ void divergent_warp(const float* __restrict__ x, float* __restrict__ y, int) {
  float value = x[threadIdx.x];
  if (threadIdx.x % 2 == 0) {
    value = __shfl_xor_sync(0xffffffffu, value, 2);
  } else {
    __syncwarp();
  }
  y[threadIdx.x] = value;
}

__global__ void shuffle_from_exited_lane(const float* __restrict__ x, float* __restrict__ y, int n) {
  if (static_cast<int>(threadIdx.x) >= n - 1) return;
  y[threadIdx.x] = __shfl_down_sync(0xffffffffu, x[threadIdx.x], 1);
}

__global__ void shuffle_outside_mask(const float* __restrict__ x, float* __restrict__ y, int n) {
  float value = x[threadIdx.x];
  if (threadIdx.x % 32 < 16) value = __shfl_xor_sync(0x0000ffffu, value, 16);
  if (static_cast<int>(threadIdx.x) < n) y[threadIdx.x] = value;
}

__global__ void uninitialised_shared_read(const float* __restrict__ x, float* __restrict__ y, int n) {
  __shared__ float tile[kThreads];
  if (threadIdx.x != 5) tile[threadIdx.x] = x[threadIdx.x];
  __syncthreads();
  if (static_cast<int>(threadIdx.x) < n) y[threadIdx.x] = tile[threadIdx.x];
}

// Shared memory does not survive from one block to the next.
__global__ void shared_kept_between_blocks(const float* __restrict__ x, float* __restrict__ y, int n) {
  __shared__ float kept;
  if (blockIdx.x == 0 && threadIdx.x == 0) kept = x[0];
  __syncthreads();
  if (blockIdx.x == 1 && static_cast<int>(threadIdx.x) < n) y[threadIdx.x] = kept;
}

// y is an output: nobody has written it yet.
__global__ void uninitialised_global_read(const float* __restrict__ x, float* __restrict__ y, int n) {
  if (static_cast<int>(threadIdx.x) < n) y[threadIdx.x] += x[threadIdx.x];
}

__global__ void unwritten_output(const float* __restrict__ x, float* __restrict__ y, int n) {
  if (static_cast<int>(threadIdx.x) < n - 1) y[threadIdx.x] = x[threadIdx.x];
}

__global__ void misaligned_access(const float* __restrict__ x, float* __restrict__ y, int n) {
  if (threadIdx.x == 0) {
    const float2 pair = *reinterpret_cast<const float2*>(x + 1);
    for (int i = 0; i < n; ++i) y[i] = pair.x + pair.y;
  }
}

__global__ void other_threads_stack(const float* __restrict__ x, float* __restrict__ y, int n) {
  __shared__ float* address;
  float local = x[threadIdx.x];
  if (threadIdx.x == 0) address = &local;
  __syncthreads();
  if (static_cast<int>(threadIdx.x) < n) y[threadIdx.x] = *address;
}

__global__ void signed_overflow(const float* __restrict__ x, float* __restrict__ y, int n) {
  const int huge = static_cast<int>(x[0]) + 2147483647;
  if (static_cast<int>(threadIdx.x) < n) y[threadIdx.x] = static_cast<float>(huge - 1 + static_cast<int>(threadIdx.x));
}

__global__ void local_array_overflow(const float* __restrict__ x, float* __restrict__ y, int n) {
  float local[8] = {};
  for (int i = 0; i < 8; ++i) local[i] = x[i];
  if (static_cast<int>(threadIdx.x) < n) y[threadIdx.x] = local[threadIdx.x % 9];
}

// The next round's write overtakes another warp's read: one barrier in a loop that needs two.
__global__ void loop_carried_race(const float* __restrict__ x, float* __restrict__ y, int) {
  __shared__ float tile[kThreads];
  float sum = 0.0f;
  for (int round = 0; round < 3; ++round) {
    tile[threadIdx.x] = x[threadIdx.x] + static_cast<float>(round);
    __syncthreads();
    sum += tile[(threadIdx.x + 32) % kThreads];
  }
  y[threadIdx.x] = sum;
}

// Neighbouring bytes of one word: each lane reads its own, then one lane writes the first lane's.
__global__ void byte_race(const float* __restrict__ x, float* __restrict__ y, int) {
  __shared__ unsigned char flag[kThreads];
  flag[threadIdx.x] = static_cast<unsigned char>(x[threadIdx.x]);
  __syncthreads();
  y[threadIdx.x] = static_cast<float>(flag[threadIdx.x]);
  if (threadIdx.x == 3) flag[0] = 2;
}

// The counter is set by one thread, and nobody waits for that.
__global__ void unordered_initialisation(const float* __restrict__ x, float* __restrict__ y, int) {
  __shared__ int count;
  if (threadIdx.x == 0) count = 0;
  atomicAdd(&count, static_cast<int>(x[threadIdx.x]));
  __syncthreads();
  y[threadIdx.x] = static_cast<float>(count);
}

// Whichever block runs last: its atomic does not order the others'.
__global__ void plain_read_beside_atomics(const float* __restrict__ x, float* __restrict__ y, int n) {
  if (threadIdx.x == 0) atomicAdd(&y[0], x[0]);
  __syncthreads();
  if (blockIdx.x == gridDim.x - 1 && threadIdx.x > 0 && static_cast<int>(threadIdx.x) < n) y[threadIdx.x] = y[0];
}

// All warps of both blocks read what one block then writes.
__global__ void write_after_other_blocks_read(const float* __restrict__ x, float* __restrict__ y, int n) {
  const float first = y[0] + x[threadIdx.x];
  __syncthreads();
  if (blockIdx.x == 1 && static_cast<int>(threadIdx.x) < n) y[threadIdx.x] = first;
}

// Every lane writes three of the four floats that are then read at once.
__global__ void partly_written_vector(const float* __restrict__ x, float* __restrict__ y, int n) {
  __shared__ float4 tile[kThreads];
  float* const own = reinterpret_cast<float*>(tile + threadIdx.x);
  for (int i = 0; i < 3; ++i) own[i] = x[threadIdx.x];
  const float4 all = tile[threadIdx.x];
  if (static_cast<int>(threadIdx.x) < n) y[threadIdx.x] = all.x + all.y + all.z + all.w;
}

__global__ void constant_input_write(const float* __restrict__ x, float* __restrict__ y, int n) {
  if (static_cast<int>(threadIdx.x) < n) y[threadIdx.x] = x[threadIdx.x];
  if (threadIdx.x == 7) const_cast<float*>(x)[7] = 0.0f;
}

__device__ float device_variable_value;
__global__ void device_variable(const float* __restrict__ x, float* __restrict__ y, int n) {
  device_variable_value = x[threadIdx.x];
  __syncthreads();
  if (static_cast<int>(threadIdx.x) < n) y[threadIdx.x] = device_variable_value;
}

__device__ __forceinline__ float divergent_function_part(const float* x) {
  __syncthreads();
  return x[threadIdx.x];
}
// The two halves of the block wait at the same line, but at two barriers.
__global__ void divergent_function(const float* __restrict__ x, float* __restrict__ y, int) {
  float value;
  if (threadIdx.x < 32) {
    value = divergent_function_part(x) + 1.0f;
  } else {
    value = divergent_function_part(x) - 1.0f;
  }
  y[threadIdx.x] = value;
}

__device__ __forceinline__ float divergent_shuffle_part(float value) { return __shfl_xor_sync(0xffffffffu, value, 1); }
__global__ void divergent_shuffle(const float* __restrict__ x, float* __restrict__ y, int) {
  float value = x[threadIdx.x];
  if (threadIdx.x % 2 == 0) {
    value = divergent_shuffle_part(value) + 1.0f;
  } else {
    value = divergent_shuffle_part(value) - 1.0f;
  }
  y[threadIdx.x] = value;
}

// The halves of a warp name different lanes.
__global__ void different_masks(const float* __restrict__ x, float* __restrict__ y, int) {
  __syncwarp(threadIdx.x % 32 < 16 ? 0x0000ffffu : 0xffffffffu);
  __syncthreads();
  y[threadIdx.x] = x[threadIdx.x];
}

__global__ void mask_without_itself(const float* __restrict__ x, float* __restrict__ y, int) {
  __syncwarp(0x7fffffffu);
  y[threadIdx.x] = x[threadIdx.x];
}

// The stores step over one element.
__global__ void strided_stores(const float* __restrict__ x, float* __restrict__ y, int n) {
  for (int i = static_cast<int>(threadIdx.x) * 2; i < n; i += 2 * kThreads) {
    y[i] = x[i];
    if (i != 36) y[i + 1] = x[i + 1];
  }
}

// A row runs into the next one, inside the same variable.
__global__ void row_overflow(const float* __restrict__ x, float* __restrict__ y, int n) {
  __shared__ float tile[2][kThreads / 2];
  if (threadIdx.x == 0)
    for (int i = 0; i < n; ++i) tile[0][i] = x[i];
  __syncthreads();
  if (static_cast<int>(threadIdx.x) < n) y[threadIdx.x] = tile[1][threadIdx.x % 32];
}

}  // namespace

#define DEFECT(name, blocks, shared_bytes)                                                                \
  void name##_cuda(const float* x, float* y, int n, int device, void* stream) {                           \
    const DeviceGuard guard(device);                                                                      \
    launch(name, dim3(blocks), dim3(kThreads), shared_bytes, static_cast<cudaStream_t>(stream), x, y, n); \
  }
DEFECT(missing_syncthreads, 1, 0)
DEFECT(missing_second_syncthreads, 1, 0)
DEFECT(missing_syncwarp, 1, 0)
DEFECT(inter_block_race, 2, 0)
DEFECT(global_read_past_end, 1, 0)
DEFECT(global_read_before_start, 1, 0)
DEFECT(global_write_past_end, 1, 0)
DEFECT(static_shared_overflow, 1, 0)
DEFECT(dynamic_shared_overflow, 1, (kThreads - 1) * sizeof(float))
DEFECT(divergent_barrier, 1, 0)
DEFECT(barrier_after_exit, 1, 0)
DEFECT(divergent_warp, 1, 0)
DEFECT(shuffle_from_exited_lane, 1, 0)
DEFECT(shuffle_outside_mask, 1, 0)
DEFECT(uninitialised_shared_read, 1, 0)
DEFECT(shared_kept_between_blocks, 2, 0)
DEFECT(uninitialised_global_read, 1, 0)
DEFECT(unwritten_output, 1, 0)
DEFECT(misaligned_access, 1, 0)
DEFECT(other_threads_stack, 1, 0)
DEFECT(signed_overflow, 1, 0)
DEFECT(local_array_overflow, 1, 0)
DEFECT(loop_carried_race, 1, 0)
DEFECT(byte_race, 1, 0)
DEFECT(unordered_initialisation, 1, 0)
DEFECT(plain_read_beside_atomics, 2, 0)
DEFECT(write_after_other_blocks_read, 2, 0)
DEFECT(partly_written_vector, 1, 0)
DEFECT(constant_input_write, 1, 0)
DEFECT(device_variable, 1, 0)
DEFECT(divergent_function, 1, 0)
DEFECT(divergent_shuffle, 1, 0)
DEFECT(different_masks, 1, 0)
DEFECT(mask_without_itself, 1, 0)
DEFECT(strided_stores, 1, 0)
DEFECT(row_overflow, 1, 0)

void missing_fence_cuda(const float* x, float* y, unsigned* ticket, int n, int device, void* stream) {
  const DeviceGuard guard(device);
  check_cuda(cudaMemsetAsync(ticket, 0, sizeof(unsigned), static_cast<cudaStream_t>(stream)), "cudaMemsetAsync");
  launch(missing_fence, dim3(2), dim3(kThreads), 0, static_cast<cudaStream_t>(stream), x, y, ticket, n);
}

// Launchers with a defect of their own; the kernel is harmless.
__global__ void harmless(const float* __restrict__ x, float* __restrict__ y, int n) {
  if (static_cast<int>(threadIdx.x) < n) y[threadIdx.x] = x[threadIdx.x];
}
void host_pointer_cuda(const float* x, float* y, int n, int device, void* stream) {
  const DeviceGuard guard(device);
  const float on_the_host[kThreads] = {1.0f};
  launch(harmless, dim3(1), dim3(kThreads), 0, static_cast<cudaStream_t>(stream), on_the_host, y, n);
}
void host_read_cuda(const float* x, float* y, int n, int device, void* stream) {
  const DeviceGuard guard(device);
  if (x[n - 1] > 0) launch(harmless, dim3(1), dim3(kThreads), 0, static_cast<cudaStream_t>(stream), x, y, n);
}
void wrong_device_cuda(const float* x, float* y, int n, int, void* stream) {
  launch(harmless, dim3(1), dim3(kThreads), 0, static_cast<cudaStream_t>(stream), x, y, n);
}
void wrong_stream_cuda(const float* x, float* y, int n, int device, void*) {
  const DeviceGuard guard(device);
  launch(harmless, dim3(1), dim3(kThreads), 0, nullptr, x, y, n);
}
void too_much_shared_cuda(const float* x, float* y, int n, int device, void* stream) {
  const DeviceGuard guard(device);
  launch(harmless, dim3(1), dim3(kThreads), 50000, static_cast<cudaStream_t>(stream), x, y, n);
}
void empty_grid_cuda(const float* x, float* y, int n, int device, void* stream) {
  const DeviceGuard guard(device);
  launch(harmless, dim3(static_cast<unsigned>(n) - kThreads), dim3(kThreads), 0, static_cast<cudaStream_t>(stream), x,
         y, n);
}
void memset_past_end_cuda(const float* x, float* y, int n, int device, void* stream) {
  const DeviceGuard guard(device);
  check_cuda(cudaMemsetAsync(y, 0, sizeof(float) * static_cast<size_t>(n + 1), static_cast<cudaStream_t>(stream)),
             "memset");
  launch(harmless, dim3(1), dim3(kThreads), 0, static_cast<cudaStream_t>(stream), x, y, n);
}

}  // namespace vareid

EXPORT(missing_syncthreads_cuda)
EXPORT(missing_second_syncthreads_cuda)
EXPORT(missing_syncwarp_cuda)
EXPORT(inter_block_race_cuda)
EXPORT(global_read_past_end_cuda)
EXPORT(global_read_before_start_cuda)
EXPORT(global_write_past_end_cuda)
EXPORT(static_shared_overflow_cuda)
EXPORT(dynamic_shared_overflow_cuda)
EXPORT(divergent_barrier_cuda)
EXPORT(barrier_after_exit_cuda)
EXPORT(divergent_warp_cuda)
EXPORT(shuffle_from_exited_lane_cuda)
EXPORT(shuffle_outside_mask_cuda)
EXPORT(uninitialised_shared_read_cuda)
EXPORT(shared_kept_between_blocks_cuda)
EXPORT(uninitialised_global_read_cuda)
EXPORT(unwritten_output_cuda)
EXPORT(misaligned_access_cuda)
EXPORT(other_threads_stack_cuda)
EXPORT(signed_overflow_cuda)
EXPORT(local_array_overflow_cuda)
EXPORT(missing_fence_cuda)
EXPORT(loop_carried_race_cuda)
EXPORT(byte_race_cuda)
EXPORT(unordered_initialisation_cuda)
EXPORT(plain_read_beside_atomics_cuda)
EXPORT(write_after_other_blocks_read_cuda)
EXPORT(partly_written_vector_cuda)
EXPORT(constant_input_write_cuda)
EXPORT(device_variable_cuda)
EXPORT(divergent_function_cuda)
EXPORT(divergent_shuffle_cuda)
EXPORT(different_masks_cuda)
EXPORT(mask_without_itself_cuda)
EXPORT(strided_stores_cuda)
EXPORT(row_overflow_cuda)
EXPORT(host_pointer_cuda)
EXPORT(host_read_cuda)
EXPORT(wrong_device_cuda)
EXPORT(wrong_stream_cuda)
EXPORT(too_much_shared_cuda)
EXPORT(empty_grid_cuda)
EXPORT(memset_past_end_cuda)
