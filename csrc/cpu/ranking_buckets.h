// Counting the images before each of many matches: distances are counted by bucket, an increasing function of the
// distance, and only those that share a bucket with a match are compared with matches.
#pragma once

#include <algorithm>
#include <limits>

#include "cpu/ranked_rows.h"

namespace vareid {

// A match: its distance's key, its gallery index, and how many images come before it.
struct Hit {
  int64_t key, index, before;
};

inline bool operator<(const Hit& a, const Hit& b) { return a.key < b.key || (a.key == b.key && a.index < b.index); }

inline constexpr int32_t kBuckets = 8192;
inline constexpr int32_t kOutside = 16;  // the first are for images before every match, as many more for those after
inline constexpr int32_t kInside = kBuckets - kOutside;
inline constexpr int64_t kPlaced = 1024;  // images placed at once; they and the buckets stay in the first-level cache
inline constexpr int64_t kCounted = 63 * kPlaced;  // images that are counted in 16 bits

// A bucket that is not counted.
VAREID_INLINE uint16_t uncounted(int64_t index) { return static_cast<uint16_t>(kBuckets + index % kOutside); }

// The increasing function: from `smallest` to `largest` its whole parts are in [0, buckets).
template <typename T>
struct Scale {
  using Value = typename Accumulator<T>::type;
  Value low = 0, factor = 0;

  VAREID_INLINE Scale(int64_t smallest, int64_t largest, int32_t buckets) {
    constexpr Value kMax = std::numeric_limits<Value>::max();
    const Value first = value_from_key<T>(static_cast<Key<T>>(smallest));
    const Value span = value_from_key<T>(static_cast<Key<T>>(largest)) - first;
    if (!(span > 0 && span <= kMax && buckets / span <= kMax)) return;  // one bucket, as no difference may overflow
    low = first;
    factor = (buckets - 1) / span;
  }
  VAREID_INLINE Value operator()(Value distance) const { return (distance - low) * factor; }
  VAREID_INLINE int32_t operator()(const Hit& hit) const {
    const Value distance = value_from_key<T>(static_cast<Key<T>>(hit.key));
    return factor > 0 ? static_cast<int32_t>((*this)(distance)) : 0;  // the distance may be NaN or Inf
  }
};

// Orders matches: by bucket first, which leaves little to compare.
template <typename T>
VAREID_INLINE void sort_by_bucket(Hit* hits, Hit* spare, int64_t n) {
  constexpr int32_t kDigits = 256;
  int64_t smallest = hits[0].key, largest = hits[0].key;
  for (int64_t h = 1; h < n; ++h) {
    smallest = std::min(smallest, hits[h].key);
    largest = std::max(largest, hits[h].key);
  }
  const Scale<T> scale(smallest, largest, kDigits);
  int32_t end[kDigits] = {};
  for (int64_t h = 0; h < n; ++h) ++end[scale(hits[h])];
  int32_t begin = 0;
  for (int32_t& count : end) {
    const int32_t size = count;
    count = begin;
    begin += size;
  }
  std::copy(hits, hits + n, spare);
  for (int64_t h = 0; h < n; ++h) hits[end[scale(spare[h])]++] = spare[h];
  begin = 0;
  for (const int32_t e : end) {
    if (e - begin > 1) std::sort(hits + begin, hits + e);
    begin = e;
  }
}

// The buckets of n distances. False if one is NaN or Inf. Images before or after every match take kOutside buckets in
// turn, as adding to the same one again waits.
template <typename T>
VAREID_INLINE bool find_places(const T* x, int64_t n, const Scale<T>& scale, uint16_t* place) {
  using K = Key<T>;
  using Value = typename Accumulator<T>::type;
  Value before[kOutside], after[kOutside];
  for (int32_t t = 0; t < kOutside; ++t) {
    before[t] = static_cast<Value>(-1 - t);
    after[t] = static_cast<Value>(kInside + t);
  }
  K largest[kOutside] = {};
  const auto find = [&](int64_t begin, int64_t size) __attribute__((always_inline)) {
#pragma omp simd
    for (int64_t t = 0; t < size; ++t) {
      const T* const at = x + begin + t;
      const K magnitude = signed_bits(at) & kMagnitude<K>;
      largest[t] = magnitude > largest[t] ? magnitude : largest[t];
      const Value number =
          std::max(before[t], std::min(after[t], scale(load(at))));  // in this order NaN is in range too
      place[begin + t] = static_cast<uint16_t>(static_cast<int32_t>(number) + kOutside);
    }
  };
  if (n < kOutside) find(0, n);
  for (int64_t j = 0; n >= kOutside && j < n; j += kOutside) find(std::min(j, n - kOutside), kOutside);
  return *std::max_element(largest, largest + kOutside) < kInfinity<T>;
}

// Adds images to their buckets, given the bucket of each (n is a multiple of 64). Which are in buckets that hold a
// match is written to `shared` (of n), how many returned. Asks for the distances `ahead` meanwhile.
template <typename T>
VAREID_INLINE int64_t count_places(const uint16_t* place, int64_t n, const T* ahead, const uint8_t* holds,
                                   uint16_t* buckets, uint16_t* shared) {
  constexpr uint64_t kLastBit = uint64_t{1} << 63;
  int64_t found = 0;
  for (int64_t begin = 0; begin < n; begin += 64) {
    uint64_t with_match = 0;
    for (int64_t end = begin + 64; end > begin; end -= 8) {
      __builtin_prefetch(ahead + end - 8, 0, 2);
#pragma GCC unroll 8
      for (int64_t j = end - 1; j >= end - 8; --j) {
        with_match = 2 * with_match + holds[place[j]];
        ++buckets[place[j]];
      }
    }
    const int64_t end = found + __builtin_popcountll(with_match);
    do {  // four at a time, as how many there are cannot be predicted
#pragma GCC unroll 4
      for (int t = 0; t < 4; ++t, with_match &= with_match - 1)
        shared[found++] = static_cast<uint16_t>(begin + __builtin_ctzll(with_match | kLastBit));
    } while (with_match != 0);
    found = end;
  }
  return found;
}

// Adds to each match the images in the buckets from the previous match's on to its own, and empties the buckets.
template <typename T>
VAREID_INLINE void add_buckets(uint16_t* buckets, const Scale<T>& scale, Hit* hits, int64_t n) {
  constexpr int32_t kBlock = 64;
  uint16_t before_block[kBuckets / kBlock + 1] = {};
  for (int64_t h = 0; h < n; ++h) buckets[kOutside + scale(hits[h])] = 0;
  for (int32_t b = 0; b < kBuckets / kBlock; ++b) {
    uint16_t sum = 0;
    for (int32_t i = 0; i < kBlock; ++i) sum += buckets[b * kBlock + i];
    before_block[b + 1] = before_block[b] + sum;
  }
  uint16_t first[2 * kBlock] = {};  // first + kBlock - n masks all but the first n of a block
  std::fill_n(first, kBlock, uint16_t{0xffff});
  uint16_t previous = 0;
  for (int64_t h = 0; h < n; ++h) {
    const int32_t bucket = kOutside + scale(hits[h]);
    const uint16_t* const block = buckets + bucket / kBlock * kBlock;
    const uint16_t* const mask = first + kBlock - bucket % kBlock;
    uint16_t sum = before_block[bucket / kBlock];
    for (int32_t i = 0; i < kBlock; ++i) sum += block[i] & mask[i];
    hits[h].before += sum - previous;
    previous = sum;
  }
  std::fill_n(buckets, kBuckets, uint16_t{0});
}

// Fills in how many images come before each match, given in order. `own`: the matches are images of the row.
template <typename T>
VAREID_INLINE bool count_buckets(const T* row, const uint8_t* junk, int64_t G, const Group& group, Hit* hits, int64_t n,
                                 bool own) {
  const Scale<T> scale(hits[0].key, hits[n - 1].key, kInside);
  uint16_t buckets[kBuckets + kOutside] = {};
  uint8_t holds[kBuckets + kOutside] = {};
  struct Matches {
    int32_t begin, end;
  } matches[kBuckets];  // of the buckets that hold some
  for (int64_t h = 0; h < n; ++h) {
    const int32_t bucket = kOutside + scale(hits[h]);
    if (!holds[bucket]) matches[bucket].begin = static_cast<int32_t>(h);
    matches[bucket].end = static_cast<int32_t>(h + 1);
    holds[bucket] = 1;
  }
  alignas(64) uint16_t place[kPlaced];
  uint16_t shared[kPlaced];
  int64_t next = 0;
  for (int64_t begin = 0; begin < G; begin += kPlaced) {
    const T* const x = row + begin;
    const int64_t size = std::min(kPlaced, G - begin);
    if (!find_places(x, size, scale, place)) return false;
    for (int64_t j = 0; junk && j < size; ++j) place[j] = junk[begin + j] ? uncounted(j) : place[j];
    int64_t counted = size;
    for (; counted % 64 != 0; ++counted) place[counted] = uncounted(counted);
    for (; next < group.size && group.index[next] < begin + size; ++next)
      if (own || group.left_out(next)) place[group.index[next] - begin] = uncounted(next);
    const int64_t found = count_places(place, counted, x + 2 * kPlaced, holds, buckets, shared);
    for (int64_t c = 0; c < found; ++c) {
      const int64_t j = shared[c];
      const Hit image{key_from_bits(signed_bits(x + j)), begin + j, 0};
      const Matches among = matches[place[j]];
      int64_t later = among.begin;
      later += hits[later].key < image.key ? 1 : 0;  // no branch: images lie on either side of a bucket's only match
      if (later < n && !(image < hits[later]))
        later = std::upper_bound(hits + later + 1, hits + among.end, image) - hits;
      if (later < n) ++hits[later].before;
    }
    if ((begin + kPlaced) % kCounted == 0) add_buckets(buckets, scale, hits, n);
  }
  add_buckets(buckets, scale, hits, n);
  int64_t before = 0;
  for (int64_t h = 0; h < n; ++h) {
    before += hits[h].before;
    hits[h].before = before + (own ? h : 0);
  }
  return true;
}

}  // namespace vareid
