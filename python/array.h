// An array that arrived as a DLPack capsule, which stays the owner, and the checks that name the argument.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <stdexcept>
#include <string>

#include "dtype.h"
#include "place.h"

namespace vareid {

// DLPack's C structures (protocol version 0.x capsules, "dltensor").
struct DLTensor {
  void* data;
  int32_t device_type;
  int32_t device_id;
  int32_t ndim;
  uint8_t type_code;
  uint8_t type_bits;
  uint16_t type_lanes;
  int64_t* shape;
  int64_t* strides;
  uint64_t byte_offset;
};

constexpr int32_t kDeviceCpu = 1;
constexpr int32_t kDeviceCuda = 2;
constexpr int kMaxDims = 4;

struct Array {
  void* data = nullptr;
  int32_t device_type = kDeviceCpu;
  int32_t device_id = 0;
  int32_t ndim = 0;
  uint8_t type_code = 0;
  uint8_t type_bits = 0;
  bool contiguous = true;
  int64_t shape[kMaxDims] = {};
  int64_t strides[kMaxDims] = {};

  int64_t numel() const {
    int64_t n = 1;
    for (int d = 0; d < ndim; ++d) n *= shape[d];
    return n;
  }
  bool is_float() const {
    return (type_code == 2 && (type_bits == 32 || type_bits == 64 || type_bits == 16)) ||
           (type_code == 4 && type_bits == 16);
  }
  bool is_int64() const { return type_code == 0 && type_bits == 64; }
  bool is_int32() const { return type_code == 0 && type_bits == 32; }
  bool is_bool() const { return (type_code == 6 || type_code == 1) && type_bits == 8; }
  bool is_byte() const { return type_bits == 8; }
  DType dtype() const {
    if (type_code == 4) return DType::kBFloat16;
    return type_bits == 64 ? DType::kFloat64 : type_bits == 16 ? DType::kFloat16 : DType::kFloat32;
  }
  template <typename T>
  T* as() const {
    return static_cast<T*>(data);
  }
};

using OptionalArray = std::optional<Array>;

inline std::string shape_text(const Array& array) {
  std::string text = "[";
  for (int d = 0; d < array.ndim; ++d) text += (d ? ", " : "") + std::to_string(array.shape[d]);
  return text + "]";
}

[[noreturn]] inline void refuse(const char* name, const std::string& why) {
  throw std::invalid_argument(std::string(name) + ": " + why);
}

inline void check_shape(const Array& array, const char* name, std::initializer_list<int64_t> expected) {
  bool same = static_cast<size_t>(array.ndim) == expected.size();
  int d = 0;
  for (const int64_t size : expected) same = same && array.shape[d++] == size;
  if (same) return;
  std::string text = "[";
  for (const int64_t size : expected) text += (text.size() > 1 ? ", " : "") + std::to_string(size);
  refuse(name, "shape " + shape_text(array) + ", expected " + text + "]");
}

inline void check_contiguous(const Array& array, const char* name) {
  if (!array.contiguous) refuse(name, "must be contiguous");
}

inline void check_double(const Array& array, const char* name) {
  if (!(array.type_code == 2 && array.type_bits == 64)) refuse(name, "must be float64");
}

inline void check_float(const Array& array, const char* name) {
  if (!array.is_float()) refuse(name, "must be float32, float64, float16 or bfloat16");
}

inline void check_float32(const Array& array, const char* name) {
  if (!(array.type_code == 2 && array.type_bits == 32)) refuse(name, "must be float32");
}

inline void check_int64(const Array& array, const char* name) {
  if (!array.is_int64()) refuse(name, "must be int64");
}

inline void check_same_dtype(const Array& array, const char* name, const Array& other, const char* other_name) {
  if (array.type_code != other.type_code || array.type_bits != other.type_bits)
    refuse(name, std::string("must have the dtype of ") + other_name);
}

// Results of a reduction are float64 for float64 inputs, else float32.
inline void check_accumulator(const Array& array, const char* name, const Array& input) {
  const bool wide = input.type_code == 2 && input.type_bits == 64;
  if (array.type_code != 2 || array.type_bits != (wide ? 64 : 32))
    refuse(name, wide ? "must be float64" : "must be float32");
}

inline void check_device(const Array& array, const char* name, int32_t device_type, int32_t device_id) {
  if (array.device_type != device_type || (device_type != kDeviceCpu && array.device_id != device_id))
    refuse(name, "is on another device");
}

// A contiguous array of one type and at least `size` elements; a null pointer for None.
template <typename T>
T* pointer(const Array& array, const char* name, int64_t size) {
  const bool fits = sizeof(T) == array.type_bits / 8 && (std::is_floating_point<T>::value == (array.type_code == 2));
  if (!fits) refuse(name, "has another element type");
  if (array.numel() < size) refuse(name, "shape " + shape_text(array) + ", too few elements");
  check_contiguous(array, name);
  return array.as<T>();
}
template <typename T>
T* pointer(const OptionalArray& array, const char* name, int64_t size) {
  return array ? pointer<T>(*array, name, size) : nullptr;
}

// A workspace of so many bytes; a GPU needs none.
inline void* scratch(const OptionalArray& workspace, int64_t bytes, const Array& leader) {
  if (leader.device_type == kDeviceCpu && (!workspace || !workspace->is_byte() || workspace->numel() < bytes))
    refuse("workspace", "is too small");
  return workspace ? workspace->data : nullptr;
}

// Calls the one of two functions that runs where the leader lies: call(W, KERNELS(op), arguments of op_cpu and
// op_cuda).
template <typename... Params, typename... Args>
void call(const Array& leader, void (*cpu)(Params...), void (*cuda)(Params...), Args&&... arguments) {
  const auto function = leader.device_type == kDeviceCpu ? cpu : leader.device_type == kDeviceCuda ? cuda : nullptr;
  if (!function) refuse("device", "the arrays lie where this build has no kernels");
  function(std::forward<Args>(arguments)...);
}
#ifdef VAREID_WITH_CUDA
#define KERNELS(op) op##_cpu, op##_cuda
#else
#define KERNELS(op) op##_cpu, static_cast<decltype(&op##_cpu)>(nullptr)
#endif

}  // namespace vareid

namespace pybind11::detail {

template <>
struct type_caster<vareid::Array> {
  PYBIND11_TYPE_CASTER(vareid::Array, const_name("DLPackCapsule"));

  bool load(handle source, bool) {
    if (!PyCapsule_IsValid(source.ptr(), "dltensor")) return false;
    const auto* tensor = static_cast<const vareid::DLTensor*>(PyCapsule_GetPointer(source.ptr(), "dltensor"));
    if (tensor->ndim > vareid::kMaxDims) return false;
    value.data = static_cast<char*>(tensor->data) + tensor->byte_offset;
    value.device_type = tensor->device_type;
    value.device_id = tensor->device_id;
    value.ndim = tensor->ndim;
    value.type_code = tensor->type_code;
    value.type_bits = tensor->type_bits;
    int64_t expected = 1;
    value.contiguous = true;
    for (int d = tensor->ndim - 1; d >= 0; --d) {
      value.shape[d] = tensor->shape[d];
      value.strides[d] = tensor->strides ? tensor->strides[d] : expected;
      if (value.shape[d] != 1 && value.strides[d] != expected) value.contiguous = false;
      expected *= value.shape[d];
    }
    if (value.numel() == 0) value.contiguous = true;
    return true;
  }
};

template <>
struct type_caster<vareid::Place> {
  PYBIND11_TYPE_CASTER(vareid::Place, const_name("tuple[int, int, int]"));

  bool load(handle source, bool) {
    if (!isinstance<tuple>(source) || len(source) != 3) return false;
    const auto place = reinterpret_borrow<tuple>(source);
    value.threads = place[0].cast<int>();
    value.device = place[1].cast<int>();
    value.stream = reinterpret_cast<void*>(place[2].cast<uintptr_t>());
    return true;
  }
};

}  // namespace pybind11::detail
