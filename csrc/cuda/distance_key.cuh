// Integers that order distances, as csrc/cpu/distance_key.h makes them, on the device.
#pragma once

#include "cuda/vector.cuh"

namespace vareid {

// Keys are integers that order as the distances do; -0 has the key of 0.
template <typename T>
struct DeviceKey {
  using type = int32_t;
};
template <>
struct DeviceKey<double> {
  using type = int64_t;
};

__device__ __forceinline__ int32_t signed_bits(float value) { return __float_as_int(value); }
__device__ __forceinline__ int64_t signed_bits(double value) { return __double_as_longlong(value); }
__device__ __forceinline__ int32_t signed_bits(__half value) { return static_cast<int16_t>(__half_as_ushort(value)); }
__device__ __forceinline__ int32_t signed_bits(__nv_bfloat16 value) {
  return static_cast<int16_t>(__bfloat16_as_ushort(value));
}

template <typename T>
constexpr int64_t kInfinityBits = 0;
template <>
constexpr int64_t kInfinityBits<float> = 0x7f800000;
template <>
constexpr int64_t kInfinityBits<double> = 0x7ff0000000000000;
template <>
constexpr int64_t kInfinityBits<__half> = 0x7c00;
template <>
constexpr int64_t kInfinityBits<__nv_bfloat16> = 0x7f80;

template <typename T>
__device__ __forceinline__ bool is_finite(T value) {
  using K = typename DeviceKey<T>::type;
  constexpr K kMagnitude = sizeof(T) == 2 ? K(0x7fff) : static_cast<K>(~(K(1) << (8 * sizeof(K) - 1)));
  return (signed_bits(value) & kMagnitude) < static_cast<K>(kInfinityBits<T>);
}

template <typename T>
__device__ __forceinline__ typename DeviceKey<T>::type key_of(T value) {
  using K = typename DeviceKey<T>::type;
  constexpr K kMagnitude = sizeof(T) == 2 ? K(0x7fff) : static_cast<K>(~(K(1) << (8 * sizeof(K) - 1)));
  const K bits = signed_bits(value);
  const K key = bits ^ ((bits >> (8 * sizeof(K) - 1)) & kMagnitude);
  return key == -1 ? K(0) : key;
}

}  // namespace vareid
