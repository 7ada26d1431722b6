#include "verification.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "cpu/parallel.h"
#include "cpu/ranked_rows.h"

namespace vareid {
namespace {

constexpr int64_t kPart = 256;  // distances handled at once

// The bits of a key below its first digit.
template <typename T>
constexpr int kLowBits = 8 * sizeof(T) - 16;

template <typename T>
struct Nearest {
  Key<T> key = kLast<Key<T>>;
  int64_t index = -1;
};

// The first digit of a key, or of the bits of a distance without a sign.
template <typename T>
VAREID_INLINE int64_t first_digit(const T* x) {
  return signed_bits(x) >> kLowBits<T>;
}

// Some keys at once.
template <typename K>
struct Lanes {
  typedef K type __attribute__((vector_size(32)));
};

// Counts the first digits of n distances as if their bits were their keys, and tells whether they are: if all are
// finite and have no sign. *low receives the smallest bits. Neighbours, often of one digit, are counted in two tables,
// so that neither count waits for the other.
template <typename T>
VAREID_INLINE bool count_digits(const T* x, int64_t n, int64_t* even, int64_t* odd, Key<T>* low) {
  using K = Key<T>;
  using V = typename Lanes<K>::type;
  constexpr int64_t kLine = 64 / sizeof(T), kAhead = 64 * kLine, kLanes = sizeof(V) / sizeof(K);
  V signs = V{}, smallest = V{} + kLast<K>;
  int64_t j = 0;
  for (; j + kLine <= n; j += kLine) {
    __builtin_prefetch(x + j + kAhead);
    for (int64_t u = 0; u < kLine; u += kLanes) {
      V bits;
      std::memcpy(&bits, x + j + u, sizeof(bits));
      signs |= bits | (static_cast<K>(kInfinity<T> - 1) - bits);
      smallest = bits < smallest ? bits : smallest;
    }
    for (int64_t u = 0; u < kLine; u += 2) {
      ++even[first_digit(x + j + u)];
      ++odd[first_digit(x + j + u + 1)];
    }
  }
  K sign = 0, least = kLast<K>;
  for (int64_t u = 0; u < kLanes; ++u) {
    sign |= signs[u];
    least = std::min(least, static_cast<K>(smallest[u]));
  }
  for (; j < n; ++j) {
    const K bits = signed_bits(x + j);
    sign |= static_cast<K>(bits | (kInfinity<T> - 1 - bits));
    least = std::min(least, bits);
    ++even[first_digit(x + j)];
  }
  *low = least;
  return sign >= 0;
}

// The images that are left out for every query: of one identity, they lie side by side in the gallery's order.
Group junk_group(const RankingLabels& labels, int64_t G) {
  const auto is_junk = [&](int64_t index) { return labels.junk && labels.junk[index]; };
  const int64_t* const end = labels.gallery_order + G;
  const int64_t* const first = std::find_if(labels.gallery_order, end, is_junk);
  return {first, std::find_if_not(first, end, is_junk) - first, nullptr, nullptr, 0};
}

// matches, others and odd, whose counts are part of the others', point to the count of digit 0. False if a distance is
// NaN or Inf.
template <typename T>
VAREID_INLINE bool histogram_row(const T* row, const Group& junk, int64_t G, const Group& group, int64_t* matches,
                                 int64_t* others, int64_t* odd, Nearest<T>* match, Nearest<T>* other) {
  using K = Key<T>;
  alignas(64) K key[kPart];
  int64_t next = 0, next_junk = 0;
  for (int64_t begin = 0; begin < G; begin += kPart) {
    const T* const x = row + begin;
    const int64_t size = std::min(kPart, G - begin);
    K low;
    const bool plain = count_digits(x, size, others, odd, &low);
    if (!plain)
      for (int64_t j = 0; j < size; ++j) --others[first_digit(x + j)];
    // Of few parts the nearest pair is looked for: those with distances below all before, mostly those of matches.
    const bool copied = !plain || low < other->key;
    if (copied && !keys_from(x, nullptr, size, key)) return false;
    for (; next_junk < junk.size && junk.index[next_junk] < begin + size; ++next_junk) {
      const int64_t index = junk.index[next_junk];
      if (plain) --others[first_digit(row + index)];
      if (copied) key[index - begin] = kLast<K>;
    }
    for (; next < group.size && group.index[next] < begin + size; ++next) {
      const int64_t index = group.index[next];
      const K own = key_from_bits(signed_bits(row + index));
      if (plain) --others[own >> kLowBits<T>];
      if (copied) key[index - begin] = kLast<K>;
      if (group.left_out(next)) continue;
      ++matches[own >> kLowBits<T>];
      if (own < match->key) *match = {own, index};
    }
    if (!copied) continue;
    low = kLast<K>;
#pragma omp simd reduction(min : low)
    for (int64_t j = 0; j < size; ++j) low = key[j] < low ? key[j] : low;
    if (low < other->key) *other = {low, begin + (std::find(key, key + size, low) - key)};
    if (!plain)
      for (int64_t j = 0; j < size; ++j) ++others[key[j] >> kLowBits<T>];
  }
  return true;
}

template <typename T>
VAREID_INLINE void histogram(const T* row, int64_t q, const RankingLabels& labels, const Group& junk, int64_t Q,
                             int64_t G, int64_t* counts, double* nearest_distance, int64_t* nearest_index) {
  Nearest<T> nearest[2];
  int64_t* const zero = counts + kDigitValues / 2;
  const bool finite = histogram_row(row, junk, G, group_of(labels, q), zero, zero + kDigitValues,
                                    zero + 2 * kDigitValues, &nearest[0], &nearest[1]);
  for (int kind = 0; kind < 2; ++kind) {
    const Nearest<T>& pair = nearest[kind];
    nearest_index[kind * Q + q] = finite ? pair.index : -1;
    nearest_distance[kind * Q + q] = !finite          ? std::numeric_limits<double>::quiet_NaN()
                                     : pair.index < 0 ? std::numeric_limits<double>::infinity()
                                                      : static_cast<double>(value_from_key<T>(pair.key));
  }
}

// The last digit of the first ones of each prefix, to find the pairs that may be meant by 16 bits of each distance.
struct LastDigits {
  int16_t value[kMostPrefixes + 1];

  explicit LastDigits(const Prefixes& prefixes) {
    std::fill(value, value + kMostPrefixes + 1, first_digit(prefixes, 0));
    for (int p = 1; p < prefixes.count; ++p) value[p] = first_digit(prefixes, p);
    for (int p = 0; p < prefixes.count; ++p)
      if (value[p] == 0) value[kMostPrefixes] = -1;  // that of -0 before it gets the key of 0
  }
  static int16_t first_digit(const Prefixes& prefixes, int p) {
    return static_cast<int16_t>(prefixes.value[p] >> (16 * (prefixes.digits - 1)));
  }
};

// Where the count of a key is, or -1 if it has none of the prefixes. Without a branch for each prefix: nobody could
// predict them.
template <typename K>
VAREID_INLINE int64_t place_of(K key, const Prefixes& prefixes) {
  const int below = static_cast<int>(8 * sizeof(K)) - 16 * prefixes.digits;
  int64_t table = -1;
  for (int p = 0; p < kMostPrefixes; ++p) table = key >> below == prefixes.value[p] && p < prefixes.count ? p : table;
  return table < 0 ? -1 : table * kDigitValues + ((key >> (below - 16)) & (kDigitValues - 1));
}

// Appends where the counts of those of n <= kPart distances are that have one of the prefixes; returns their end.
template <typename T>
VAREID_INLINE int64_t* find_places(const T* x, const uint8_t* junk, int64_t n, const Prefixes& prefixes,
                                   const LastDigits& digits, int64_t* found) {
  using K = Key<T>;
  constexpr int64_t kLine = 64 / sizeof(T);
  const int below = static_cast<int>(8 * sizeof(K)) - 16 * prefixes.digits;
  alignas(64) uint8_t hit[kPart] = {};  // one more than the number of a prefix of this digit
  for (int64_t j = 0; j < n; j += kLine) __builtin_prefetch(x + j + 4 * kPart);
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) {
    const auto high = static_cast<int16_t>(signed_bits(x + j) >> kLowBits<T>);
    const auto digit = static_cast<int16_t>(high ^ ((high >> 15) & kMagnitude<int16_t>));
    uint8_t number = 0;
    for (int p = kMostPrefixes; p >= 0; --p) number = digit == digits.value[p] ? static_cast<uint8_t>(p + 1) : number;
    hit[j] = number;
  }
  for (int64_t from = 0; from < kPart; from += 8) {
    uint64_t hits;
    std::memcpy(&hits, hit + from, sizeof(hits));
    while (hits) {
      const int bit = __builtin_ctzll(hits) & ~7;
      const int64_t j = from + bit / 8;
      hits &= ~(uint64_t{0xff} << bit);
      if (junk && junk[j]) continue;
      const K key = key_from_bits(signed_bits(x + j));
      const int p = hit[j] - 1;
      const int64_t place = p < prefixes.count && key >> below == prefixes.value[p]
                                ? p * kDigitValues + ((key >> (below - 16)) & (kDigitValues - 1))
                                : place_of(key, prefixes);
      *found = place;
      found += place >= 0;
    }
  }
  return found;
}

template <typename T>
VAREID_INLINE void refine_row(const T* row, const uint8_t* junk, int64_t G, const Group& group,
                              const Prefixes& prefixes, const LastDigits& digits, int64_t* matches, int64_t* others) {
  // Many at once: the counts are seldom in the cache, and do not wait for each other.
  constexpr int64_t kMany = 2048;
  int64_t places[kMany + kPart];
  int64_t* end = places;
  for (int64_t begin = 0; begin < G; begin += kPart) {
    const int64_t size = std::min(kPart, G - begin);
    end = find_places(row + begin, junk ? junk + begin : nullptr, size, prefixes, digits, end);
    if (end <= places + kMany && begin + size < G) continue;
    for (const int64_t* place = places; place < end; ++place) ++others[*place];
    end = places;
  }
  for (int64_t i = 0; i < group.size; ++i) {
    const int64_t place = place_of(key_from_bits(signed_bits(row + group.index[i])), prefixes);
    if (place < 0) continue;
    --others[place];
    matches[place] += group.left_out(i) ? 0 : 1;
  }
}

// Pairs of a row within the limit, of which those with the group's images are taken apart.
template <typename T>
VAREID_INLINE void accepted_row(const T* row, const Group& junk, int64_t G, const Group& group,
                                typename Accumulator<T>::type limit, int64_t* matches, int64_t* others) {
  const auto accepts = [&](int64_t j) { return load(row + j) <= limit ? 1 : 0; };
  int64_t all = 0;
  for (int64_t begin = 0; begin < G; begin += kPart) {
    const int64_t end = std::min(begin + kPart, G);
    int32_t part = 0;  // as wide as a float32 distance
#pragma omp simd reduction(+ : part)
    for (int64_t j = begin; j < end; ++j) part += accepts(j);
    all += part;
  }
  for (int64_t i = 0; i < junk.size; ++i) all -= accepts(junk.index[i]);
  *matches = 0;
  for (int64_t i = 0; i < group.size; ++i) {
    const int accepted = accepts(group.index[i]);
    all -= accepted;
    if (!group.left_out(i)) *matches += accepted;
  }
  *others = all;
}

// target_clones does not reach templates: one plain function for each element type.
#define VAREID_VERIFICATION(T)                                                                                       \
  VAREID_MULTIVERSION void histogram_rows(const T* distances, int64_t row_stride, const RankingLabels& labels,       \
                                          int64_t Q, int64_t G, int64_t* counts, double* nearest_distance,           \
                                          int64_t* nearest_index, int64_t begin, int64_t end) {                      \
    const Group junk = junk_group(labels, G);                                                                        \
    for (int64_t q = begin; q < end; ++q)                                                                            \
      histogram(distances + q * row_stride, q, labels, junk, Q, G, counts, nearest_distance, nearest_index);         \
  }                                                                                                                  \
  VAREID_MULTIVERSION void accepted_rows(const T* distances, int64_t row_stride, const RankingLabels& labels,        \
                                         int64_t Q, int64_t G, Accumulator<T>::type limit, int64_t* accepted,        \
                                         int64_t begin, int64_t end) {                                               \
    const Group junk = junk_group(labels, G);                                                                        \
    for (int64_t q = begin; q < end; ++q)                                                                            \
      accepted_row(distances + q * row_stride, junk, G, group_of(labels, q), limit, accepted + q, accepted + Q + q); \
  }
#define VAREID_REFINE(T)                                                                                               \
  VAREID_MULTIVERSION void refine_rows(const T* distances, int64_t row_stride, const RankingLabels& labels, int64_t G, \
                                       const Prefixes& prefixes, int64_t* counts, int64_t begin, int64_t end) {        \
    const LastDigits digits(prefixes);                                                                                 \
    for (int64_t q = begin; q < end; ++q)                                                                              \
      refine_row(distances + q * row_stride, labels.junk, G, group_of(labels, q), prefixes, digits, counts,            \
                 counts + prefixes.count * kDigitValues);                                                              \
  }

VAREID_VERIFICATION(float)
VAREID_VERIFICATION(double)
VAREID_VERIFICATION(float16)
VAREID_VERIFICATION(bfloat16)
VAREID_REFINE(float)
VAREID_REFINE(double)
#undef VAREID_VERIFICATION
#undef VAREID_REFINE

constexpr int kHistogramTables = 3;  // of matches and, in two parts, of the others

// A thread with fewer pairs than this many times its counts is not worth starting.
constexpr int64_t kPairsPerCount = 2;

int threads_for(int64_t tables, int64_t Q, int64_t G, int threads) {
  const int64_t worth = Q * G / (kPairsPerCount * tables * kDigitValues);
  return static_cast<int>(std::clamp<int64_t>(worth, 1, std::max(1, threads)));
}

// Calls body(begin, end, tables) on parts of the rows, each thread with tables of its own, and adds them to `results`
// tables of counts; those beyond are parts of the last.
template <typename Body>
void count_rows(int64_t Q, int64_t G, int threads, int64_t tables, int64_t results, int64_t* counts, void* workspace,
                const Body& body) {
  const int used = threads_for(tables, Q, G, threads);
  auto* const all = static_cast<int64_t*>(workspace);
  parallel_for(used * tables, used, [&](int64_t begin, int64_t end, int) {
    std::fill(all + begin * kDigitValues, all + end * kDigitValues, 0);
  });
  parallel_for(Q, used,
               [&](int64_t begin, int64_t end, int thread) { body(begin, end, all + thread * tables * kDigitValues); });
  parallel_for(kDigitValues, used, [&](int64_t begin, int64_t end, int) {
    for (int64_t table = 0; table < used * tables; ++table) {
      const int64_t* const from = all + table * kDigitValues;
      int64_t* const to = counts + std::min(table % tables, results - 1) * kDigitValues;
      for (int64_t i = begin; i < end; ++i) to[i] += from[i];
    }
  });
}

}  // namespace

int64_t verification_workspace_bytes_cpu(int64_t prefixes, int64_t Q, int64_t G, int threads) {
  const int64_t tables = prefixes ? 2 * prefixes : kHistogramTables;
  return threads_for(tables, Q, G, threads) * tables * kDigitValues * static_cast<int64_t>(sizeof(int64_t));
}

void verification_histogram_cpu(const void* distances, int64_t row_stride, const RankingLabels& labels, int64_t* counts,
                                double* nearest_distance, int64_t* nearest_index, void* workspace, DType dtype,
                                int64_t Q, int64_t G, const Place& place) {
  dispatch_float(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    count_rows(Q, G, place.threads, kHistogramTables, 2, counts, workspace,
               [&](int64_t begin, int64_t end, int64_t* own) {
                 histogram_rows(static_cast<const T*>(distances), row_stride, labels, Q, G, own, nearest_distance,
                                nearest_index, begin, end);
               });
  });
  counts[2 * kDigitValues - 1] = 0;  // what was left out
}

void verification_refine_cpu(const void* distances, int64_t row_stride, const RankingLabels& labels,
                             const Prefixes& prefixes, int64_t* counts, void* workspace, DType dtype, int64_t Q,
                             int64_t G, const Place& place) {
  const auto refine = [&](auto* rows) {
    const int64_t tables = 2 * prefixes.count;
    count_rows(Q, G, place.threads, tables, tables, counts, workspace, [&](int64_t begin, int64_t end, int64_t* own) {
      refine_rows(rows, row_stride, labels, G, prefixes, own, begin, end);
    });
  };
  if (dtype == DType::kFloat32)
    refine(static_cast<const float*>(distances));
  else
    refine(static_cast<const double*>(distances));
}

void verification_accepted_cpu(const void* distances, int64_t row_stride, const RankingLabels& labels, double threshold,
                               int64_t* accepted, DType dtype, int64_t Q, int64_t G, const Place& place) {
  dispatch_float(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    using Value = typename Accumulator<T>::type;
    Value limit = static_cast<Value>(threshold);
    if (limit > threshold) limit = std::nextafter(limit, -std::numeric_limits<Value>::infinity());
    parallel_for(Q, place.threads, [&](int64_t begin, int64_t end, int) {
      accepted_rows(static_cast<const T*>(distances), row_stride, labels, Q, G, limit, accepted, begin, end);
    });
  });
}

}  // namespace vareid
