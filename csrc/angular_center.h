// Angular center regularizer: the formula is in vareid_ext/reference/angular_center.py.
//
// Arrays are dense and row-major. W is [K, D], U is [K, V, D], mask is [K, V] bytes (0 = the pair does not exist) or
// null. `dtype` is the type of W, U and their gradients; everything else is float32, or float64 when dtype is float64.
// Forward writes cosine [K, V] (0 for pairs that do not exist), identity_norm [K], viewpoint_norm [K, V] (0 for pairs
// that do not exist) and loss [1], the sum of 1 - cosine over the existing pairs. Backward reads them, and the upstream
// gradient [1], and overwrites the gradients of W and U; a null gradient pointer is not computed.
#pragma once

#include <cstdint>

#include "dtype.h"
#include "place.h"

namespace vareid {

using AngularCenterForward = void(const void* W, const void* U, const uint8_t* mask, void* loss, void* cosine,
                                  void* identity_norm, void* viewpoint_norm, DType dtype, int64_t K, int64_t V,
                                  int64_t D, const Place& place);
AngularCenterForward angular_center_forward_cpu, angular_center_forward_cuda;

using AngularCenterBackward = void(const void* upstream, const void* W, const void* U, const uint8_t* mask,
                                   const void* cosine, const void* identity_norm, const void* viewpoint_norm,
                                   void* grad_W, void* grad_U, DType dtype, int64_t K, int64_t V, int64_t D,
                                   const Place& place);
AngularCenterBackward angular_center_backward_cpu, angular_center_backward_cuda;

// On a GPU K > 2^31 - 1 and V > 2048 throw std::invalid_argument.

}  // namespace vareid
