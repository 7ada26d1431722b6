// Atomics: threads are fibers of one OS thread, so a plain read and write is atomic. Each reports itself to the checker
// with the address it was called from; the checker must not also see the plain accesses.
#pragma once

#define CUDA_ON_CPU_ATOMIC(name, T, value)                                                \
  inline __attribute__((noinline, no_sanitize("thread"))) T name(T* address, T operand) { \
    ::cuda_on_cpu::atomic_access(address, sizeof(T), __builtin_return_address(0));        \
    const T old = *address;                                                               \
    *address = (value);                                                                   \
    return old;                                                                           \
  }
#define CUDA_ON_CPU_INTEGER(T)                                                                     \
  CUDA_ON_CPU_ATOMIC(atomicAdd, T, static_cast<T>(static_cast<unsigned long long>(old) + operand)) \
  CUDA_ON_CPU_ATOMIC(atomicMin, T, old < operand ? old : operand)                                  \
  CUDA_ON_CPU_ATOMIC(atomicMax, T, old > operand ? old : operand)                                  \
  CUDA_ON_CPU_ATOMIC(atomicOr, T, old | operand)

CUDA_ON_CPU_INTEGER(int)
CUDA_ON_CPU_INTEGER(unsigned)
CUDA_ON_CPU_INTEGER(unsigned long long)
CUDA_ON_CPU_ATOMIC(atomicAdd, float, old + operand)

#undef CUDA_ON_CPU_INTEGER
#undef CUDA_ON_CPU_ATOMIC
