// What the shim headers need from the machine that executes kernels (tests/cuda_on_cpu/runtime).
#pragma once

#include <cstddef>
#include <cstdint>

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

// Set by the scheduler whenever it switches to a thread.
extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;

namespace cuda_on_cpu {

struct Site {
  const char* file;
  int line;
};

enum class WarpOp { kSync, kShuffle, kVote, kMatch };

// __syncthreads and its relatives: returns how many threads gave a true predicate.
int block_barrier(bool predicate, Site site);

// Waits for every lane of `mask` and returns: kShuffle the source lane's value, kVote the ballot of value != 0, kMatch
// the mask of the lanes with an equal value.
uint64_t warp_operation(WarpOp op, unsigned mask, uint64_t value, unsigned source_lane, Site site);

unsigned lane_id();
void* dynamic_shared();
// Runs body(context) as every thread of the grid; the context, of `context_bytes`, holds the kernel's arguments.
void launch(const void* kernel, dim3 grid, dim3 block, size_t shared_bytes, void* stream, void (*body)(const void*),
            const void* context, size_t context_bytes);

// An atomic says what it is about to touch; elsewhere than in the checker build it need not.
#ifdef CUDA_ON_CPU_CHECKER
void atomic_access(const void* address, size_t bytes, void* pc);
void fence();
#else
inline void atomic_access(const void*, size_t, void*) {}
inline void fence() {}
#endif

}  // namespace cuda_on_cpu
