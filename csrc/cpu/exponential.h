// exp for arguments that are never large: vectorised by the compiler, exactly 0 for -inf, NaN for NaN.
#pragma once

#include <cstdint>
#include <cstring>

#include "cpu/simd.h"

namespace vareid {

// For x <= 80. Relative error below 2^-22.9 (1.1 units in the last place) where the result is a normal number; 0 below
// -87.3, where it would be smaller. exp(x) = 2^n exp(r) with n = round(x / ln 2), and on |r| <= ln(2) / 2
// exp(r) = 1 + r + r^2 q(r) with q minimax in the relative error of exp (3.1e-9).
VAREID_INLINE float exponential(float x) {
  const float shifted = x * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: rounds, and leaves n in the lowest bits
  const float n = shifted - 12582912.0f;
  const float r = (x - n * 0.693145752f) - n * 1.42860677e-6f;  // ln 2 in two parts; the first has 16 bits
  float q = 0.00138145406f;
  q = q * r + 0.00836874545f;
  q = q * r + 0.041668389f;
  q = q * r + 0.166665211f;
  q = q * r + 0.49999994f;
  const float power = float_from_bits((bits_from_float(shifted) << 23) + 0x3f800000u);
  const float value = ((q * r) * r + r + 1.0f) * power;
  return x < -87.3f ? 0.0f : value;
}

VAREID_INLINE double double_from_bits(uint64_t bits) {
  double value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}
VAREID_INLINE uint64_t bits_from_double(double value) {
  uint64_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

// For x <= 700. Relative error below 2^-51.9 (1.1 units in the last place) where the result is a normal number; 0 below
// -708. As above, with q minimax to 3.7e-18.
VAREID_INLINE double exponential(double x) {
  const double shifted = x * 1.4426950408889634 + 6755399441055744.0;  // 1.5 * 2^52
  const double n = shifted - 6755399441055744.0;
  const double r = (x - n * 0x1.62e42fee00000p-1) - n * 0x1.a39ef35793c76p-33;
  double q = 2.5000018853083342e-8;
  q = q * r + 2.76303062556478574e-7;
  q = q * r + 2.75575868038470707e-6;
  q = q * r + 2.48014929496170708e-5;
  q = q * r + 1.9841269505773807e-4;
  q = q * r + 1.3888888943759984e-3;
  q = q * r + 8.33333333349497726e-3;
  q = q * r + 4.16666666665297281e-2;
  q = q * r + 1.66666666666664115e-1;
  q = q * r + 5.00000000000001067e-1;
  const double power = double_from_bits((bits_from_double(shifted) << 52) + 0x3ff0000000000000u);
  const double value = ((q * r) * r + r + 1.0) * power;
  return x < -708.0 ? 0.0 : value;
}

}  // namespace vareid
