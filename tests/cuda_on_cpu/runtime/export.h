// EXPORT(angular_center_forward_cuda) makes vareid::angular_center_forward_cuda callable from Python by its name, with
// its own C++ signature. See ../README.md.
#pragma once

#include <cstdint>
#include <exception>
#include <string>
#include <type_traits>
#include <utility>

#include "dtype.h"

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

template <auto kFunction, typename Signature>
struct Adapter;
template <auto kFunction, typename Result, typename... Params>
struct Adapter<kFunction, Result (*)(Params...)> {
  static std::string signature() {
    std::string text;
    ((text += (text.empty() ? "" : ",") + type_text<std::remove_cv_t<Params>>()), ...);
    return text + "->" + type_text<Result>();
  }
  template <size_t... I>
  static void apply(const Value* values, int64_t* result, std::index_sequence<I...>) {
    if constexpr (std::is_void_v<Result>) {
      kFunction(unpack<Params>(values[I])...);
      *result = 0;
    } else {
      *result = static_cast<int64_t>(kFunction(unpack<Params>(values[I])...));
    }
  }
  static void call(const Value* values, int64_t* result) {
    apply(values, result, std::index_sequence_for<Params...>{});
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
