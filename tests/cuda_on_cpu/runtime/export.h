// EXPORT(angular_center_forward_cuda) makes vareid::angular_center_forward_cuda callable from Python by its name, with
// its own C++ signature. See ../README.md.
#pragma once

#include <cstdint>
#include <exception>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>

#include "dtype.h"
#include "nearest_neighbors.h"
#include "place.h"

namespace cuda_on_cpu {

union Value {
  void* pointer;
  int64_t integer;
  double real;
};

struct Export {
  const char* name;
  std::string signature;  // "const float*,float*,int64,double,...->void"
  void (*call)(const Value* values, int64_t* result);
};
void add_export(Export entry);

// What a parameter is made of: itself, or the fields of a structure, which are arguments of their own.
template <typename T>
struct Fields {
  using types = std::tuple<T>;
  static T make(T value) { return value; }
};
template <>
struct Fields<vareid::Bounds> {
  using types = std::tuple<const float*, const float*>;
  static vareid::Bounds make(const float* norm, const float* window) { return {norm, window}; }
};
template <>
struct Fields<vareid::Features> {
  using types = std::tuple<const void*, const double*, int64_t, int64_t>;
  static vareid::Features make(const void* data, const double* factor, int64_t rows, int64_t stride) {
    return {data, factor, rows, stride};
  }
};
template <>
struct Fields<vareid::Place> {
  using types = std::tuple<int, void*>;
  static vareid::Place make(int device, void* stream) { return {1, device, stream}; }
};

template <typename T>
std::string type_text() {
  if constexpr (std::is_pointer_v<T>) {
    using Element = std::remove_pointer_t<T>;
    const std::string prefix = std::is_const_v<Element> ? "const " : "";
    if constexpr (std::is_void_v<Element>)
      return prefix + "void*";
    else
      return prefix + type_text<std::remove_const_t<Element>>() + "*";
  } else if constexpr (std::is_void_v<T>) {
    return "void";
  } else if constexpr (std::is_enum_v<T>) {
    return "int32";
  } else if constexpr (std::is_same_v<T, bool>) {
    return "bool";
  } else if constexpr (std::is_integral_v<T>) {
    return (std::is_signed_v<T> ? "int" : "uint") + std::to_string(8 * sizeof(T));
  } else {
    static_assert(std::is_floating_point_v<T>,
                  "EXPORT takes functions of pointers, integers, enums and floats: wrap others in a function of those");
    return "float" + std::to_string(8 * sizeof(T));
  }
}

template <typename T>
T unpack(const Value& value) {
  if constexpr (std::is_pointer_v<T>)
    return static_cast<T>(value.pointer);
  else if constexpr (std::is_floating_point_v<T>)
    return static_cast<T>(value.real);
  else
    return static_cast<T>(value.integer);
}

template <typename... T>
std::string types_text(std::tuple<T...>*) {
  std::string text;
  ((text += (text.empty() ? "" : ",") + type_text<std::remove_cv_t<T>>()), ...);
  return text;
}

inline const Value& next(const Value*& values) { return *values++; }

// Makes a parameter of the next values.
template <typename T, typename... Parts>
T take(const Value*& values, std::tuple<Parts...>*) {
  std::tuple<Parts...> parts{unpack<Parts>(next(values))...};  // in order: they stand in braces
  return std::apply([](Parts... part) { return Fields<T>::make(part...); }, parts);
}

template <auto kFunction, typename Signature>
struct Adapter;
template <auto kFunction, typename Result, typename... Params>
struct Adapter<kFunction, Result (*)(Params...)> {
  template <typename T>
  using Plain = std::remove_cv_t<std::remove_reference_t<T>>;

  static std::string signature() {
    using All = decltype(std::tuple_cat(std::declval<typename Fields<Plain<Params>>::types>()...));
    return types_text(static_cast<All*>(nullptr)) + "->" + type_text<Result>();
  }
  static void call(const Value* values, int64_t* result) {
    const std::tuple<Plain<Params>...> arguments{
        take<Plain<Params>>(values, static_cast<typename Fields<Plain<Params>>::types*>(nullptr))...};
    if constexpr (std::is_void_v<Result>) {
      std::apply(kFunction, arguments);
      *result = 0;
    } else {
      *result = static_cast<int64_t>(std::apply(kFunction, arguments));
    }
  }
};

struct AddExport {
  explicit AddExport(Export entry) { add_export(std::move(entry)); }
};

}  // namespace cuda_on_cpu

#define EXPORT(function)                                                                                   \
  static const ::cuda_on_cpu::AddExport export_##function(                                                 \
      {#function, ::cuda_on_cpu::Adapter<&::vareid::function, decltype(&::vareid::function)>::signature(), \
       &::cuda_on_cpu::Adapter<&::vareid::function, decltype(&::vareid::function)>::call});
