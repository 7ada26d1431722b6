// CUDA features the CPU execution does not have: using one is a compile error that names it and the way out.
#pragma once

namespace cuda_on_cpu {
template <typename...>
inline constexpr bool kNever = false;
}

#define CUDA_ON_CPU_UNSUPPORTED(name, advice)                                                        \
  template <typename... Args>                                                                        \
  int name(Args...) {                                                                                \
    static_assert(cuda_on_cpu::kNever<Args...>, "CUDA-on-CPU: " #name " is not supported: " advice); \
    return 0;                                                                                        \
  }
CUDA_ON_CPU_UNSUPPORTED(__activemask, "state the mask of the lanes that take part")
CUDA_ON_CPU_UNSUPPORTED(__shfl, "use the _sync form with a mask")
CUDA_ON_CPU_UNSUPPORTED(__ballot, "use __ballot_sync")
CUDA_ON_CPU_UNSUPPORTED(__any, "use __any_sync")
CUDA_ON_CPU_UNSUPPORTED(__all, "use __all_sync")
CUDA_ON_CPU_UNSUPPORTED(__reduce_add_sync, "sm_80 and newer only; reduce with shuffles")
CUDA_ON_CPU_UNSUPPORTED(__reduce_min_sync, "sm_80 and newer only; reduce with shuffles")
CUDA_ON_CPU_UNSUPPORTED(__reduce_max_sync, "sm_80 and newer only; reduce with shuffles")
CUDA_ON_CPU_UNSUPPORTED(__nanosleep, "blocks run one after another: never wait for another block")
CUDA_ON_CPU_UNSUPPORTED(clock64, "kernels are timed from outside (benchmarks)")
CUDA_ON_CPU_UNSUPPORTED(cudaLaunchKernel, "launch through vareid::launch (csrc/cuda/launch.h)")
CUDA_ON_CPU_UNSUPPORTED(cudaLaunchCooperativeKernel, "split the work into two launches")
CUDA_ON_CPU_UNSUPPORTED(tex2D, "read global memory")
#undef CUDA_ON_CPU_UNSUPPORTED

// A pragma takes one string, so the text must fit into a line.
#define asm _Pragma("GCC error \"CUDA-on-CPU: inline PTX (asm) is not supported: use an intrinsic\"") __asm__
