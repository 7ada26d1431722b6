// Keys are integers that order as the distances do, so that "<= key" is "< key + 1"; -0 has the key of 0.
#pragma once

#include <cstdint>
#include <cstring>
#include <limits>

#include "cpu/simd.h"

namespace vareid {

template <typename T>
struct KeyOf {
  using type = int32_t;
};
template <>
struct KeyOf<double> {
  using type = int64_t;
};
template <>
struct KeyOf<float16> {
  using type = int16_t;
};
template <>
struct KeyOf<bfloat16> {
  using type = int16_t;
};
template <typename T>
using Key = typename KeyOf<T>::type;

// Bits of the distances read in place.
template <typename K>
struct Alias {
  typedef K type __attribute__((may_alias));
};

template <typename K>
inline constexpr K kLast = std::numeric_limits<K>::max();  // after the key of every number: an image that is left out

template <typename T>
inline constexpr Key<T> kInfinity = 0x7f800000;
template <>
inline constexpr int64_t kInfinity<double> = 0x7ff0000000000000;
template <>
inline constexpr int16_t kInfinity<float16> = 0x7c00;
template <>
inline constexpr int16_t kInfinity<bfloat16> = 0x7f80;

template <typename K>
inline constexpr K kMagnitude = std::numeric_limits<K>::max();  // all bits but the sign

VAREID_INLINE int32_t signed_bits(const float* p) {
  int32_t bits;
  std::memcpy(&bits, p, sizeof(bits));
  return bits;
}
VAREID_INLINE int64_t signed_bits(const double* p) {
  int64_t bits;
  std::memcpy(&bits, p, sizeof(bits));
  return bits;
}
VAREID_INLINE int16_t signed_bits(const float16* p) { return static_cast<int16_t>(p->bits); }
VAREID_INLINE int16_t signed_bits(const bfloat16* p) { return static_cast<int16_t>(p->bits); }

template <typename K>
VAREID_INLINE K key_from_bits(K bits) {
  const K key = static_cast<K>(bits ^ ((bits >> (8 * sizeof(K) - 1)) & kMagnitude<K>));
  return key == -1 ? K(0) : key;
}

// The number that has this key; anything for keys that no number has.
template <typename T>
VAREID_INLINE typename Accumulator<T>::type value_from_key(Key<T> key) {
  using K = Key<T>;
  const K bits = static_cast<K>(key ^ ((key >> (8 * sizeof(K) - 1)) & kMagnitude<K>));
  if constexpr (sizeof(T) == 2) {
    T value;
    value.bits = static_cast<uint16_t>(bits);
    return load(&value);
  } else {
    T value;
    std::memcpy(&value, &bits, sizeof(value));
    return value;
  }
}

}  // namespace vareid
