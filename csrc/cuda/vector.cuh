// Element types on the device, and 16-byte accesses.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <initializer_list>

#include "dtype.h"

namespace vareid {

// kWidth neighbouring elements, moved by one access.
template <typename T, int kWidth>
struct alignas(sizeof(T) * kWidth) Pack {
  T value[kWidth];
};

template <typename T, int kWidth>
__device__ __forceinline__ Pack<T, kWidth> load_pack(const T* __restrict__ from) {
  return *reinterpret_cast<const Pack<T, kWidth>*>(from);
}
template <typename T, int kWidth>
__device__ __forceinline__ void store_pack(T* __restrict__ to, const Pack<T, kWidth>& pack) {
  *reinterpret_cast<Pack<T, kWidth>*>(to) = pack;
}

// The type in which an element type is accumulated, and the conversions.
template <typename T>
struct DeviceAccumulator {
  using type = float;
};
template <>
struct DeviceAccumulator<double> {
  using type = double;
};

__device__ __forceinline__ float widen(float value) { return value; }
__device__ __forceinline__ double widen(double value) { return value; }
__device__ __forceinline__ float widen(__half value) { return __half2float(value); }
__device__ __forceinline__ float widen(__nv_bfloat16 value) { return __bfloat162float(value); }

template <typename T>
__device__ __forceinline__ T narrow(typename DeviceAccumulator<T>::type value) {
  return static_cast<T>(value);
}
template <>
__device__ __forceinline__ __half narrow<__half>(float value) {
  return __float2half_rn(value);
}
template <>
__device__ __forceinline__ __nv_bfloat16 narrow<__nv_bfloat16>(float value) {
  return __float2bfloat16_rn(value);
}

template <typename T>
struct DeviceType {
  using type = T;
};

// Host: calls body(DeviceType<T>{}) with the element type T that `dtype` names.
template <typename Body>
void dispatch_device_float(DType dtype, const Body& body) {
  switch (dtype) {
    case DType::kFloat32:
      return body(DeviceType<float>{});
    case DType::kFloat64:
      return body(DeviceType<double>{});
    case DType::kFloat16:
      return body(DeviceType<__half>{});
    case DType::kBFloat16:
      return body(DeviceType<__nv_bfloat16>{});
  }
}

// Host: whether rows of `columns` elements that start at these addresses can be read 16 bytes at a time.
template <typename T>
bool rows_are_packed(int64_t columns, std::initializer_list<const void*> pointers) {
  if (columns % static_cast<int64_t>(16 / sizeof(T)) != 0) return false;
  for (const void* pointer : pointers)
    if (reinterpret_cast<uintptr_t>(pointer) % 16 != 0) return false;
  return true;
}

}  // namespace vareid
