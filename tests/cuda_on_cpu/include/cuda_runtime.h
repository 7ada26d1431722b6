// The CUDA runtime as the CUDA-on-CPU test build sees it: kernels are ordinary functions, a launch runs every CUDA
// thread as a fiber. Holds what the kernels of csrc/cuda use; build.py says what to do about anything else.
#pragma once

#ifndef VAREID_CUDA_ON_CPU
#error "this cuda_runtime.h belongs to the CUDA-on-CPU tests: build through tests/cuda_on_cpu/build.py"
#endif

#include <math.h>

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <tuple>
#include <type_traits>
#include <utility>

#include "cuda_on_cpu/machine.h"

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
// The huge alignment marks shared variables in the symbol table and leaves a gap behind each, which is checked.
#ifdef CUDA_ON_CPU_ASAN
#define __shared__ static __attribute__((aligned(16)))
#else
#define __shared__ static __attribute__((aligned(32768)))
#endif
#define DYN_SHARED(T, name) T* const name = static_cast<T*>(::cuda_on_cpu::dynamic_shared())
// A pragma takes one string, so the text must fit into a line.
#define asm _Pragma("GCC error \"CUDA-on-CPU: inline PTX (asm) is not supported: use an intrinsic\"") __asm__

struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};

// g++ does not instrument `*p = f()` for a class: assigning member by member lets the checker see the store.
#define CUDA_ON_CPU_SMALL_FLOAT(T)                       \
  struct alignas(2) T {                                  \
    unsigned short bits;                                 \
    T() = default;                                       \
    T(unsigned short b) : bits(b) {}                     \
    T(const T&) = default;                               \
    T& operator=(const T&) = default;                    \
    __attribute__((always_inline)) T& operator=(T&& b) { \
      bits = b.bits;                                     \
      return *this;                                      \
    }                                                    \
  };

#include "cuda_on_cpu/api.h"
#include "cuda_on_cpu/atomics.h"
#include "cuda_on_cpu/intrinsics.h"

namespace vareid {

// What csrc/cuda/launch.h does through cudaLaunchKernelEx under nvcc.
template <typename... Params, typename... Args>
void launch(void (*kernel)(Params...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream,
            Args&&... args) {
  const auto body = [kernel, values = std::tuple<std::decay_t<Params>...>(std::forward<Args>(args)...)] {
    std::apply(kernel, values);
  };
  cuda_on_cpu::launch(
      reinterpret_cast<const void*>(kernel), grid, block, shared_bytes, stream,
      [](const void* context) { (*static_cast<decltype(&body)>(context))(); }, &body, sizeof body);
}

}  // namespace vareid
