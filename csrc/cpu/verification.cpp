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
// finite and have no sign. *low receives the smallest bits.
template <typename T>
VAREID_INLINE bool count_digits(const T* x, int64_t n, int64_t* counts, Key<T>* low) {
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
    for (int64_t u = 0; u < kLine; ++u) ++counts[first_digit(x + j + u)];
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
    ++counts[first_digit(x + j)];
  }
  *low = least;
  return sign >= 0;
}

// matches and others point to the count of digit 0. False if a distance is NaN or Inf.
template <typename T>
VAREID_INLINE bool histogram_row(const T* row, const uint8_t* junk, int64_t G, const Group& group, int64_t* matches,
                                 int64_t* others, Nearest<T>* match, Nearest<T>* other) {
  using K = Key<T>;
  alignas(64) K key[kPart];
  int64_t next = 0;
  for (int64_t begin = 0; begin < G; begin += kPart) {
    const T* const x = row + begin;
    const int64_t size = std::min(kPart, G - begin);
    K low;
    const bool plain = count_digits(x, size, others, &low);
    if (!plain || junk)
      for (int64_t j = 0; j < size; ++j) others[first_digit(x + j)] -= !plain || junk[begin + j] ? 1 : 0;
    // Of few parts the nearest pair is looked for: those with distances below all before, mostly those of matches.
    const bool copied = !plain || low < other->key;
    if (copied && !keys_from(x, junk ? junk + begin : nullptr, size, key)) return false;
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
VAREID_INLINE void histogram(const T* row, int64_t q, const RankingLabels& labels, int64_t Q, int64_t G,
                             int64_t* counts, double* nearest_distance, int64_t* nearest_index) {
  Nearest<T> nearest[2];
  const bool finite = histogram_row(row, labels.junk, G, group_of(labels, q), counts + kDigitValues / 2,
                                    counts + kDigitValues / 2 + kDigitValues, &nearest[0], &nearest[1]);
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

// Appends the keys of those of n <= kPart distances whose bits begin with one of the digits; returns their end.
template <typename T>
VAREID_INLINE Key<T>* find_keys(const T* x, const uint8_t* junk, int64_t n, const LastDigits& digits, Key<T>* found) {
  constexpr int64_t kLine = 64 / sizeof(T);
  alignas(64) uint8_t hit[kPart] = {};
  for (int64_t j = 0; j < n; j += kLine) __builtin_prefetch(x + j + 4 * kPart);
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) {
    const auto high = static_cast<int16_t>(signed_bits(x + j) >> kLowBits<T>);
    const auto digit = static_cast<int16_t>(high ^ ((high >> 15) & kMagnitude<int16_t>));
    uint8_t any = 0;
    for (int p = 0; p <= kMostPrefixes; ++p) any |= digit == digits.value[p];
    hit[j] = any;
  }
  for (int64_t from = 0; from < n; from += 8) {
    uint64_t hits;
    std::memcpy(&hits, hit + from, sizeof(hits));
    for (int64_t j = from; hits; ++j, hits >>= 8) {
      *found = key_from_bits(signed_bits(x + j));
      found += hits & (junk && junk[j] ? 0 : 1);
    }
  }
  return found;
}

template <typename T>
VAREID_INLINE void refine_row(const T* row, const uint8_t* junk, int64_t G, const Group& group,
                              const Prefixes& prefixes, const LastDigits& digits, int64_t* matches, int64_t* others) {
  constexpr int64_t kMany = 2048;
  Key<T> keys[kMany + kPart + 1];
  Key<T>* end = keys;
  const auto count_all = [&] {
    for (const Key<T>* key = keys; key < end; ++key)
      if (const int64_t place = place_of(*key, prefixes); place >= 0) ++others[place];
    end = keys;
  };
  for (int64_t begin = 0; begin < G; begin += kPart) {
    end = find_keys(row + begin, junk ? junk + begin : nullptr, std::min(kPart, G - begin), digits, end);
    if (end > keys + kMany) count_all();
  }
  count_all();
  for (int64_t i = 0; i < group.size; ++i) {
    const int64_t place = place_of(key_from_bits(signed_bits(row + group.index[i])), prefixes);
    if (place < 0) continue;
    --others[place];
    matches[place] += group.left_out(i) ? 0 : 1;
  }
}

// Pairs of a row within the limit, of which those with the group's images are taken apart.
template <typename T>
VAREID_INLINE void accepted_row(const T* row, const uint8_t* junk, int64_t G, const Group& group,
                                typename Accumulator<T>::type limit, int64_t* matches, int64_t* others) {
  int64_t all = 0;
  if (junk) {
#pragma omp simd reduction(+ : all)
    for (int64_t j = 0; j < G; ++j) all += load(row + j) <= limit && !junk[j] ? 1 : 0;
  } else {
#pragma omp simd reduction(+ : all)
    for (int64_t j = 0; j < G; ++j) all += load(row + j) <= limit ? 1 : 0;
  }
  *matches = 0;
  for (int64_t i = 0; i < group.size; ++i) {
    const int64_t accepted = load(row + group.index[i]) <= limit ? 1 : 0;
    all -= accepted;
    if (!group.left_out(i)) *matches += accepted;
  }
  *others = all;
}

// target_clones does not reach templates: one plain function for each element type.
#define VAREID_VERIFICATION(T)                                                                                 \
  VAREID_MULTIVERSION void histogram_rows(const T* distances, int64_t row_stride, const RankingLabels& labels, \
                                          int64_t Q, int64_t G, int64_t* counts, double* nearest_distance,     \
                                          int64_t* nearest_index, int64_t begin, int64_t end) {                \
    for (int64_t q = begin; q < end; ++q)                                                                      \
      histogram(distances + q * row_stride, q, labels, Q, G, counts, nearest_distance, nearest_index);         \
  }                                                                                                            \
  VAREID_MULTIVERSION void accepted_rows(const T* distances, int64_t row_stride, const RankingLabels& labels,  \
                                         int64_t Q, int64_t G, Accumulator<T>::type limit, int64_t* accepted,  \
                                         int64_t begin, int64_t end) {                                         \
    for (int64_t q = begin; q < end; ++q)                                                                      \
      accepted_row(distances + q * row_stride, labels.junk, G, group_of(labels, q), limit, accepted + q,       \
                   accepted + Q + q);                                                                          \
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

// A thread with fewer pairs than this many times its counts is not worth starting.
constexpr int64_t kPairsPerCount = 2;

int threads_for(int64_t counts, int64_t Q, int64_t G, int threads) {
  return static_cast<int>(std::clamp<int64_t>(Q * G / (kPairsPerCount * counts), 1, std::max(1, threads)));
}

// Calls body(begin, end, counts) on parts of the rows, each thread with counts of its own, and adds them up.
template <typename Body>
void count_rows(int64_t Q, int64_t G, int threads, int64_t size, int64_t* counts, void* workspace, const Body& body) {
  const int used = threads_for(size, Q, G, threads);
  auto* const others = static_cast<int64_t*>(workspace);
  parallel_for(Q, used, [&](int64_t begin, int64_t end, int thread) {
    body(begin, end, thread ? others + (thread - 1) * size : counts);
  });
  if (used > 1)
    parallel_for(size, used, [&](int64_t begin, int64_t end, int) {
      for (int thread = 1; thread < used; ++thread)
        for (int64_t i = begin; i < end; ++i) counts[i] += others[(thread - 1) * size + i];
    });
}

}  // namespace

int64_t verification_workspace_bytes_cpu(int64_t prefixes, int64_t Q, int64_t G, int threads) {
  const int64_t size = 2 * prefixes * kDigitValues;
  return (threads_for(size, Q, G, threads) - 1) * size * static_cast<int64_t>(sizeof(int64_t));
}

void verification_histogram_cpu(const void* distances, int64_t row_stride, const RankingLabels& labels, int64_t* counts,
                                double* nearest_distance, int64_t* nearest_index, void* workspace, DType dtype,
                                int64_t Q, int64_t G, const Place& place) {
  dispatch_float(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    count_rows(Q, G, place.threads, 2 * kDigitValues, counts, workspace, [&](int64_t begin, int64_t end, int64_t* own) {
      histogram_rows(static_cast<const T*>(distances), row_stride, labels, Q, G, own, nearest_distance, nearest_index,
                     begin, end);
    });
  });
  counts[2 * kDigitValues - 1] = 0;  // what was left out
}

void verification_refine_cpu(const void* distances, int64_t row_stride, const RankingLabels& labels,
                             const Prefixes& prefixes, int64_t* counts, void* workspace, DType dtype, int64_t Q,
                             int64_t G, const Place& place) {
  const auto refine = [&](auto* rows) {
    count_rows(Q, G, place.threads, 2 * prefixes.count * kDigitValues, counts, workspace,
               [&](int64_t begin, int64_t end, int64_t* own) {
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
