// Element types of the native functions. Pointers are untyped at the contract's level and dispatched once per call.
#pragma once

#include <cstdint>

namespace vareid {

enum class DType : int32_t { kFloat32 = 0, kFloat64 = 1, kFloat16 = 2, kBFloat16 = 3 };

}  // namespace vareid
