// Atomics: threads are fibers of one OS thread, so a plain read and write is atomic. Each reports itself to the checker
// with the address it was called from; the checker must not also see the plain accesses.
#pragma once

#define CUDA_ON_CPU_ATOMIC inline __attribute__((noinline, no_sanitize("thread")))

#define CUDA_ON_CPU_UPDATE(name, T, value)                                         \
  CUDA_ON_CPU_ATOMIC T name(T* address, T operand) {                               \
    ::cuda_on_cpu::atomic_access(address, sizeof(T), __builtin_return_address(0)); \
    const T old = *address;                                                        \
    *address = (value);                                                            \
    return old;                                                                    \
  }
#define CUDA_ON_CPU_INTEGER(T)                                    \
  CUDA_ON_CPU_UPDATE(atomicMin, T, old < operand ? old : operand) \
  CUDA_ON_CPU_UPDATE(atomicMax, T, old > operand ? old : operand) \
  CUDA_ON_CPU_UPDATE(atomicAnd, T, old& operand)                  \
  CUDA_ON_CPU_UPDATE(atomicOr, T, old | operand)                  \
  CUDA_ON_CPU_UPDATE(atomicXor, T, old ^ operand)
#define CUDA_ON_CPU_EXCHANGE(T) CUDA_ON_CPU_UPDATE(atomicExch, T, operand)
#define CUDA_ON_CPU_COMPARE(T)                                                     \
  CUDA_ON_CPU_ATOMIC T atomicCAS(T* address, T compare, T value) {                 \
    ::cuda_on_cpu::atomic_access(address, sizeof(T), __builtin_return_address(0)); \
    const T old = *address;                                                        \
    if (old == compare) *address = value;                                          \
    return old;                                                                    \
  }

CUDA_ON_CPU_UPDATE(atomicAdd, int, static_cast<int>(static_cast<unsigned>(old) + static_cast<unsigned>(operand)))
CUDA_ON_CPU_UPDATE(atomicAdd, unsigned, old + operand)
CUDA_ON_CPU_UPDATE(atomicAdd, unsigned long long, old + operand)
CUDA_ON_CPU_UPDATE(atomicAdd, float, old + operand)
CUDA_ON_CPU_UPDATE(atomicAdd, double, old + operand)
CUDA_ON_CPU_UPDATE(atomicSub, int, static_cast<int>(static_cast<unsigned>(old) - static_cast<unsigned>(operand)))
CUDA_ON_CPU_UPDATE(atomicSub, unsigned, old - operand)
CUDA_ON_CPU_UPDATE(atomicInc, unsigned, old >= operand ? 0 : old + 1)
CUDA_ON_CPU_UPDATE(atomicDec, unsigned, old == 0 || old > operand ? operand : old - 1)
CUDA_ON_CPU_INTEGER(int)
CUDA_ON_CPU_INTEGER(unsigned)
CUDA_ON_CPU_INTEGER(long long)
CUDA_ON_CPU_INTEGER(unsigned long long)
CUDA_ON_CPU_EXCHANGE(int)
CUDA_ON_CPU_EXCHANGE(unsigned)
CUDA_ON_CPU_EXCHANGE(unsigned long long)
CUDA_ON_CPU_EXCHANGE(float)
CUDA_ON_CPU_COMPARE(int)
CUDA_ON_CPU_COMPARE(unsigned)
CUDA_ON_CPU_COMPARE(unsigned long long)
CUDA_ON_CPU_COMPARE(unsigned short)

#undef CUDA_ON_CPU_COMPARE
#undef CUDA_ON_CPU_EXCHANGE
#undef CUDA_ON_CPU_INTEGER
#undef CUDA_ON_CPU_UPDATE
#undef CUDA_ON_CPU_ATOMIC
