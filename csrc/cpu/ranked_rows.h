// What the kernels that walk rows of distances share: a chunk of a row as keys, and the images of the query's identity.
#pragma once

#include "cpu/distance_key.h"
#include "ranking.h"

namespace vareid {

inline constexpr int64_t kChunk = 2048;  // distances handled at once; they and their keys stay in the first-level cache

// The keys of n distances; junk ones get kLast. False if a distance is NaN or Inf.
template <typename T>
VAREID_INLINE bool keys_from(const T* x, const uint8_t* junk, int64_t n, Key<T>* key) {
  using K = Key<T>;
  K largest = 0;
  if (junk) {
#pragma omp simd reduction(max : largest)
    for (int64_t j = 0; j < n; ++j) {
      const K bits = signed_bits(x + j);
      const K magnitude = bits & kMagnitude<K>;
      largest = magnitude > largest ? magnitude : largest;
      key[j] = junk[j] ? kLast<K> : key_from_bits(bits);
    }
  } else {
#pragma omp simd reduction(max : largest)
    for (int64_t j = 0; j < n; ++j) {
      const K bits = signed_bits(x + j);
      const K magnitude = bits & kMagnitude<K>;
      largest = magnitude > largest ? magnitude : largest;
      key[j] = key_from_bits(bits);
    }
  }
  return largest < kInfinity<T>;
}

// Asks for the next distances while the present ones are counted.
template <typename T>
VAREID_INLINE void prefetch(const T* x, int64_t n) {
  constexpr int64_t kLine = 64 / sizeof(T);
  for (int64_t j = 0; j < n; j += kLine) __builtin_prefetch(x + j);
}

// The images of a query's identity, in order of index, of which those with one of its codes are left out.
struct Group {
  const int64_t* index;
  int64_t size;
  const int64_t* query_codes;
  const int64_t* gallery_codes;
  int64_t codes;  // 0: none is left out

  VAREID_INLINE bool left_out(int64_t i) const {
    for (int64_t c = 0; c < codes; ++c)
      if (query_codes[c] != -1 && gallery_codes[index[i] * codes + c] == query_codes[c]) return true;
    return false;
  }
};

VAREID_INLINE Group group_of(const RankingLabels& labels, int64_t q) {
  return {labels.gallery_order + labels.group_begin[q], labels.group_end[q] - labels.group_begin[q],
          labels.query_codes + q * labels.codes, labels.gallery_codes, labels.codes};
}

}  // namespace vareid
