// The CUDA runtime as the CUDA-on-CPU test build sees it: kernels are ordinary functions, a launch runs every CUDA
// thread as a fiber. Covers what the kernels of csrc/cuda may use; everything else is a compile error that says so.
#pragma once

#ifndef VAREID_CUDA_ON_CPU
#error "this cuda_runtime.h belongs to the CUDA-on-CPU tests: build through tests/cuda_on_cpu/build.py"
#endif

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmath>
#include <cstdint>
#include <tuple>
#include <type_traits>
#include <utility>

#include "cuda_on_cpu/machine.h"
#include "cuda_on_cpu/vector_types.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
#define __constant__ static
#define __grid_constant__
// The huge alignment marks shared variables in the symbol table and leaves a gap behind each, which is checked.
#ifdef CUDA_ON_CPU_ASAN
#define __shared__ static __attribute__((aligned(16)))
#else
#define __shared__ static __attribute__((aligned(32768)))
#endif
#define DYN_SHARED(T, name) T* const name = static_cast<T*>(::cuda_on_cpu::dynamic_shared())

constexpr int warpSize = 32;

#include "cuda_on_cpu/api.h"
#include "cuda_on_cpu/atomics.h"
#include "cuda_on_cpu/intrinsics.h"
#include "cuda_on_cpu/unsupported.h"

namespace vareid {

// What csrc/cuda/launch.h does through cudaLaunchKernelEx under nvcc.
template <typename... Params, typename... Args>
void launch(void (*kernel)(Params...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream,
            Args&&... args) {
  std::tuple<std::decay_t<Params>...> values(std::forward<Args>(args)...);
  auto body = [&] { std::apply(kernel, values); };
  cuda_on_cpu::launch(
      reinterpret_cast<const void*>(kernel), grid, block, shared_bytes, stream,
      [](void* context) { (*static_cast<decltype(body)*>(context))(); }, &body);
}

}  // namespace vareid
