// Device functions: barriers, warp operations, bits, arithmetic that the compiler must not contract.
#pragma once

#define CUDA_ON_CPU_SITE const char *file = __builtin_FILE(), int line = __builtin_LINE()

inline void __syncthreads(CUDA_ON_CPU_SITE) { cuda_on_cpu::block_barrier(false, {file, line}); }
inline int __syncthreads_count(int predicate, CUDA_ON_CPU_SITE) {
  return cuda_on_cpu::block_barrier(predicate != 0, {file, line});
}
inline void __syncwarp(unsigned mask = 0xffffffffu, CUDA_ON_CPU_SITE) {
  cuda_on_cpu::warp_operation(cuda_on_cpu::WarpOp::kSync, mask, 0, 0, {file, line});
}
inline void __threadfence() { cuda_on_cpu::fence(); }

namespace cuda_on_cpu {
template <typename T>
__attribute__((no_sanitize("thread"))) T shuffle(unsigned mask, T value, unsigned source, Site site) {
  static_assert(sizeof(T) <= 8 && std::is_trivially_copy_constructible_v<T>, "shuffles move at most 8 bytes");
  uint64_t bits = 0;
  __builtin_memcpy(&bits, &value, sizeof(T));
  bits = warp_operation(WarpOp::kShuffle, mask, bits, source, site);
  __builtin_memcpy(static_cast<void*>(&value), &bits, sizeof(T));
  return value;
}
template <typename T>
__attribute__((no_sanitize("thread"))) unsigned match(unsigned mask, T value, Site site) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "match compares 4 or 8 bytes");
  uint64_t bits = 0;
  __builtin_memcpy(&bits, &value, sizeof(T));
  return static_cast<unsigned>(warp_operation(WarpOp::kMatch, mask, bits, 0, site));
}
}  // namespace cuda_on_cpu

template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, CUDA_ON_CPU_SITE) {
  const unsigned lane = cuda_on_cpu::lane_id(), w = static_cast<unsigned>(width);
  return cuda_on_cpu::shuffle(mask, value, (lane & ~(w - 1)) | (static_cast<unsigned>(source) & (w - 1)), {file, line});
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, CUDA_ON_CPU_SITE) {
  const unsigned lane = cuda_on_cpu::lane_id(), inside = lane & (static_cast<unsigned>(width) - 1);
  return cuda_on_cpu::shuffle(mask, value, inside < delta ? lane : lane - delta, {file, line});
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, CUDA_ON_CPU_SITE) {
  const unsigned lane = cuda_on_cpu::lane_id(), w = static_cast<unsigned>(width), inside = lane & (w - 1);
  return cuda_on_cpu::shuffle(mask, value, inside + delta >= w ? lane : lane + delta, {file, line});
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32, CUDA_ON_CPU_SITE) {
  const unsigned lane = cuda_on_cpu::lane_id(), source = lane ^ static_cast<unsigned>(lane_mask);
  const unsigned last = lane | (static_cast<unsigned>(width) - 1);
  return cuda_on_cpu::shuffle(mask, value, source > last ? lane : source, {file, line});
}
inline unsigned __ballot_sync(unsigned mask, int predicate, CUDA_ON_CPU_SITE) {
  return static_cast<unsigned>(
      cuda_on_cpu::warp_operation(cuda_on_cpu::WarpOp::kVote, mask, predicate != 0, 0, {file, line}));
}
template <typename T>
unsigned __match_any_sync(unsigned mask, T value, CUDA_ON_CPU_SITE) {
  return cuda_on_cpu::match(mask, value, {file, line});
}

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __float_as_int(float x) { return __builtin_bit_cast(int, x); }
inline float __int_as_float(int x) { return __builtin_bit_cast(float, x); }
inline long long __double_as_longlong(double x) { return __builtin_bit_cast(long long, x); }
inline double __longlong_as_double(long long x) { return __builtin_bit_cast(double, x); }
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __dsub_rn(double a, double b) { return a - b; }
inline double __dmul_rn(double a, double b) { return a * b; }

#define CUDA_ON_CPU_MIN_MAX(T)                     \
  inline T min(T a, T b) { return b < a ? b : a; } \
  inline T max(T a, T b) { return a < b ? b : a; }
CUDA_ON_CPU_MIN_MAX(int)
CUDA_ON_CPU_MIN_MAX(unsigned)
CUDA_ON_CPU_MIN_MAX(long)
CUDA_ON_CPU_MIN_MAX(unsigned long)
#undef CUDA_ON_CPU_MIN_MAX
