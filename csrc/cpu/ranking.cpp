#include "ranking.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "cpu/exact_distance.h"
#include "cpu/parallel.h"
#include "cpu/ranking_buckets.h"
#include "cpu/simd.h"

namespace vareid {
namespace {

constexpr int kHitsAtOnce = 8;       // matches whose counts are kept in registers
constexpr int64_t kFewLeftOut = 64;  // images left out one by one, without a copy of the row

// From so many matches on, counting by bucket beats one comparison for each match. In two bytes distances tie, and more
// of them share a bucket with a match.
template <typename T>
inline constexpr int64_t kManyHits = sizeof(T) == 2 ? 80 : 96 / sizeof(T);

// Whether n distances are finite and have no sign: then their bits are their keys.
template <typename T>
VAREID_INLINE bool bits_are_keys(const T* x, int64_t n) {
  using K = Key<T>;
  K signs = 0;
#pragma omp simd reduction(| : signs)
  for (int64_t j = 0; j < n; ++j) {
    const K bits = signed_bits(x + j);
    signs |= static_cast<K>(bits | (kInfinity<T> - 1 - bits));
  }
  return signs >= 0;
}

template <typename T>
VAREID_INLINE bool all_finite(const T* x, int64_t n) {
  using K = Key<T>;
  K largest = 0;
#pragma omp simd reduction(max : largest)
  for (int64_t j = 0; j < n; ++j) {
    const K magnitude = signed_bits(x + j) & kMagnitude<K>;
    largest = magnitude > largest ? magnitude : largest;
  }
  return largest < kInfinity<T>;
}

// count[h] += the number of keys below limit[h]. Functions of their own, so that every loop is vectorised by itself.
template <int N, typename K>
VAREID_INLINE void count_below_body(const typename Alias<K>::type* key, int64_t n, const K* limit, K* count) {
  K sum[N], bound[N];
  for (int h = 0; h < N; ++h) {
    sum[h] = 0;
    bound[h] = limit[h];
  }
  for (int64_t j = 0; j < n; ++j) {
    const K value = key[j];
    for (int h = 0; h < N; ++h) sum[h] += value < bound[h] ? K(1) : K(0);
  }
  for (int h = 0; h < N; ++h) count[h] += sum[h];
}

template <int N>
struct Matches {};

#define VAREID_COUNT_BELOW(N, K)                                                                              \
  VAREID_MULTIVERSION_AVX2 void count_below(Matches<N>, const Alias<K>::type* key, int64_t n, const K* limit, \
                                            K* count) {                                                       \
    count_below_body<N, K>(key, n, limit, count);                                                             \
  }
#define VAREID_COUNT_BELOW_ALL(K) \
  VAREID_COUNT_BELOW(1, K)        \
  VAREID_COUNT_BELOW(2, K)        \
  VAREID_COUNT_BELOW(3, K)        \
  VAREID_COUNT_BELOW(4, K)        \
  VAREID_COUNT_BELOW(5, K)        \
  VAREID_COUNT_BELOW(6, K)        \
  VAREID_COUNT_BELOW(7, K)        \
  VAREID_COUNT_BELOW(8, K)
VAREID_COUNT_BELOW_ALL(int16_t)
VAREID_COUNT_BELOW_ALL(int32_t)
VAREID_COUNT_BELOW_ALL(int64_t)
#undef VAREID_COUNT_BELOW_ALL
#undef VAREID_COUNT_BELOW

// Adds to N matches, in order of index, the images among [begin, begin + n) that come before them.
template <int N, typename K>
void count_before(const typename Alias<K>::type* key, int64_t begin, int64_t n, Hit* hits) {
  K limit[N], count[N];
  for (int h = 0; h < N; ++h) {
    limit[h] = static_cast<K>(hits[h].key + 1);  // before a match's index, equal distances come before it
    count[h] = 0;
  }
  int64_t from = 0;
  for (int h = 0; h < N; ++h) {
    const int64_t at = std::clamp<int64_t>(hits[h].index - begin, from, n);
    if (at > from) count_below(Matches<N>{}, key + from, at - from, limit, count);
    from = at;
    if (hits[h].index < begin + n) limit[h] -= 1;
  }
  if (n > from) count_below(Matches<N>{}, key + from, n - from, limit, count);
  for (int h = 0; h < N; ++h) hits[h].before += count[h];
}

// The same for any number of matches.
template <typename K>
void count_chunk(const typename Alias<K>::type* key, int64_t begin, int64_t n, Hit* hits, int64_t num_hits) {
  const int64_t groups = (num_hits + kHitsAtOnce - 1) / kHitsAtOnce;
  for (int64_t g = 0; g < groups; ++g) {
    const int64_t first = num_hits * g / groups;
    Hit* const group = hits + first;
    switch (num_hits * (g + 1) / groups - first) {
      case 1:
        count_before<1, K>(key, begin, n, group);
        break;
      case 2:
        count_before<2, K>(key, begin, n, group);
        break;
      case 3:
        count_before<3, K>(key, begin, n, group);
        break;
      case 4:
        count_before<4, K>(key, begin, n, group);
        break;
      case 5:
        count_before<5, K>(key, begin, n, group);
        break;
      case 6:
        count_before<6, K>(key, begin, n, group);
        break;
      case 7:
        count_before<7, K>(key, begin, n, group);
        break;
      default:
        count_before<kHitsAtOnce, K>(key, begin, n, group);
    }
  }
}

// Gives kLast to the group's images that are left out in [begin, end); `next` walks through the group.
template <typename K>
VAREID_INLINE void leave_out(const Group& group, int64_t begin, int64_t end, K* key, int64_t* next) {
  for (; *next < group.size && group.index[*next] < end; ++*next)
    if (group.left_out(*next)) key[group.index[*next] - begin] = kLast<K>;
}

// Takes one image out of the counts.
VAREID_INLINE void discount(int64_t key, int64_t index, Hit* hits, int64_t n) {
  for (int64_t h = 0; h < n; ++h)
    hits[h].before -= key < hits[h].key || (key == hits[h].key && index < hits[h].index) ? 1 : 0;
}

// A few matches: every distance is compared with every match.
template <typename T>
VAREID_INLINE bool compare_all(const T* row, const uint8_t* junk, int64_t G, const Group& group, Hit* hits, int64_t n) {
  using K = Key<T>;
  alignas(64) K key[kChunk];
  const bool in_place = !junk && group.size - n <= kFewLeftOut;
  int64_t next = 0;
  for (int64_t begin = 0; begin < G; begin += kChunk) {
    const T* const x = row + begin;
    const int64_t size = std::min(kChunk, G - begin);
    if (in_place && bits_are_keys(x, size)) {
      prefetch(x + size, std::min(kChunk, G - begin - size));
      count_chunk<K>(reinterpret_cast<const typename Alias<K>::type*>(x), begin, size, hits, n);
      for (; next < group.size && group.index[next] < begin + size; ++next)
        if (group.left_out(next)) discount(signed_bits(row + group.index[next]), group.index[next], hits, n);
    } else {
      if (!keys_from(x, junk ? junk + begin : nullptr, size, key)) return false;
      prefetch(x + size, std::min(kChunk, G - begin - size));
      leave_out(group, begin, begin + size, key, &next);
      count_chunk<K>(key, begin, size, hits, n);
    }
  }
  std::sort(hits, hits + n, [](const Hit& a, const Hit& b) { return a.before < b.before; });
  return true;
}

// Writes a query's results from its matches, in order.
VAREID_INLINE void write_results(const Hit* hits, int64_t n, int64_t q, const RankingResults& out) {
  out.num_matches[q] = n;
  out.average_precision[q] = out.inverse_negative_penalty[q] = 0;
  out.first_match_rank[q] = 0;
  if (n <= 0) return;
  double precision = 0;
  for (int64_t h = 0; h < n; ++h) precision += static_cast<double>(h + 1) / static_cast<double>(hits[h].before + 1);
  out.average_precision[q] = precision / static_cast<double>(n);
  out.inverse_negative_penalty[q] = static_cast<double>(n) / static_cast<double>(hits[n - 1].before + 1);
  out.first_match_rank[q] = hits[0].before + 1;
}

// Fills in how many images come before each match, and puts the matches in order. False if a distance is NaN or Inf.
template <typename T>
VAREID_INLINE bool count_all(const T* row, const uint8_t* junk, int64_t G, const Group& group, Hit* hits, int64_t n,
                             bool own) {
  if (n == 0) return all_finite(row, G);
  return n >= kManyHits<T> ? count_buckets(row, junk, G, group, hits, n, own)
                           : compare_all(row, junk, G, group, hits, n);
}

template <typename T>
VAREID_INLINE void rank_query(const T* row, const uint8_t* junk, int64_t G, const Group& group, Hit* hits, int64_t q,
                              const RankingResults& out) {
  int64_t n = 0;
  for (int64_t i = 0; i < group.size; ++i)
    if (!group.left_out(i)) {
      const int64_t index = group.index[i];
      hits[n++] = {key_from_bits(signed_bits(row + index)), index, 0};
    }
  if (n >= kManyHits<T>) sort_by_bucket<T>(hits, hits + n, n);
  write_results(hits, count_all(row, junk, G, group, hits, n, true) ? n : -1, q, out);
}

// target_clones does not reach templates: one plain function for each element type.
#define VAREID_RANKING(T)                                                                                            \
  VAREID_MULTIVERSION void rank_rows(const T* distances, int64_t row_stride, const RankingLabels& labels, int64_t G, \
                                     Hit* hits, const RankingResults& out, int64_t begin, int64_t end) {             \
    for (int64_t q = begin; q < end; ++q)                                                                            \
      rank_query<T>(distances + q * row_stride, labels.junk, G, group_of(labels, q), hits, q, out);                  \
  }

VAREID_RANKING(float)
VAREID_RANKING(double)
VAREID_RANKING(float16)
VAREID_RANKING(bfloat16)
#undef VAREID_RANKING

// An image and its exact distance.
struct Measured {
  double distance;
  int64_t index;

  bool operator<(const Measured& other) const {
    return distance < other.distance || (distance == other.distance && index < other.index);
  }
};

// The floats next to a number on either side; the number itself twice if it is one.
struct Between {
  float below, above;
};

VAREID_INLINE Between between_floats(double value) {
  constexpr float kFar = std::numeric_limits<float>::infinity();
  const float near = static_cast<float>(value);
  return {near > value ? std::nextafter(near, -kFar) : near, near < value ? std::nextafter(near, kFar) : near};
}

// What a thread needs for one query at a time.
struct Scratch {
  Hit* surely;        // [max_group], of each match: the images whose upper bounds are below its distance
  Hit* perhaps;       // [max_group]: those whose lower bounds are not above it, itself among them
  Measured* matches;  // [max_group], in order
  Between* floats;    // [max_group], of their distances
  float* upper;       // [G]
};

struct Sides {
  const Features& x;
  const Features& y;
  int64_t D;
  ExactDistance exact;

  VAREID_INLINE Measured measure(int64_t q, int64_t j) const { return {exact(x, q, y, j, D), j}; }
};

// Lower and upper bounds of a query's distances from its products, which the lower ones overwrite.
VAREID_INLINE void bounds_from(float* row, float* upper, float norm, float window, const Bounds& y, int64_t G) {
  const float shrunk = norm - window, grown = norm + window;
#pragma omp simd
  for (int64_t j = 0; j < G; ++j) {
    const float product = -2 * row[j];
    row[j] = std::max(product + (y.norm[j] - y.window[j]) + shrunk, 0.0f);
    upper[j] = std::max(product + (y.norm[j] + y.window[j]) + grown, 0.0f);
  }
}

// Counts for each match the images that surely come before it, and measures those of which the bounds do not say it.
VAREID_INLINE void rank_query_exactly(float* lower, const Scratch& scratch, const uint8_t* junk, int64_t G,
                                      const Group& group, const Sides& features, int64_t q, const RankingResults& out) {
  constexpr int64_t kTested = 64;  // images tested at once
  Measured* const matches = scratch.matches;
  Hit *const surely = scratch.surely, *const perhaps = scratch.perhaps;
  const float* const upper = scratch.upper;
  int64_t n = 0;
  for (int64_t i = 0; i < group.size; ++i)
    if (!group.left_out(i)) matches[n++] = features.measure(q, group.index[i]);
  if (n == 0) return write_results(surely, 0, q, out);
  std::sort(matches, matches + n);
  for (int64_t h = 0; h < n; ++h) {
    const Between floats = scratch.floats[h] = between_floats(matches[h].distance);
    perhaps[h] = {key_from_bits(signed_bits(&floats.below)), G, 0};  // "at or below", wherever in the row
    surely[h] = {key_from_bits(signed_bits(&floats.above)), -1, 0};  // "below"
  }
  count_all<float>(lower, junk, G, group, perhaps, n, false);
  count_all<float>(upper, junk, G, group, surely, n, false);
  int64_t open = 0;  // matches with others than themselves between the two; their numbers take perhaps' place
  for (int64_t h = 0; h < n; ++h)
    if (perhaps[h].before > surely[h].before + 1) perhaps[open++].index = h;
  for (int64_t i = 0; open > 0 && i < group.size; ++i)
    if (group.left_out(i)) lower[group.index[i]] = std::numeric_limits<float>::infinity();
  for (int64_t begin = 0; open > 0 && begin < G; begin += kTested) {
    const int64_t size = std::min(kTested, G - begin);
    int32_t unclear[kTested] = {};
    for (int64_t o = 0; o < open; ++o) {
      const Between floats = scratch.floats[perhaps[o].index];
#pragma omp simd
      for (int64_t c = 0; c < size; ++c)
        unclear[c] |= (lower[begin + c] <= floats.below ? 1 : 0) & (upper[begin + c] >= floats.above ? 1 : 0);
    }
    for (int64_t c = 0; c < size; ++c) {
      const int64_t j = begin + c;
      if (!unclear[c] || (junk && junk[j])) continue;
      int64_t h = std::upper_bound(matches, matches + n, features.measure(q, j)) - matches;
      for (; h < n && upper[j] >= scratch.floats[h].above; ++h) ++surely[h].before;
    }
  }
  write_results(surely, n, q, out);
}

VAREID_MULTIVERSION void rank_rows_exactly(float* products, int64_t ld, const Sides& features, const Bounds& x_bounds,
                                           const Bounds& y_bounds, const RankingLabels& labels, const Scratch& scratch,
                                           const RankingResults& out, int64_t begin, int64_t end) {
  const int64_t G = features.y.rows;
  for (int64_t q = begin; q < end; ++q) {
    float* const row = products + q * ld;
    bounds_from(row, scratch.upper, x_bounds.norm[q], x_bounds.window[q], y_bounds, G);
    rank_query_exactly(row, scratch, labels.junk, G, group_of(labels, q), features, q, out);
  }
}

int64_t whole_lines(int64_t bytes) { return (bytes + 63) / 64 * 64; }
int64_t hit_bytes(int64_t max_group) { return whole_lines(max_group * static_cast<int64_t>(sizeof(Hit))); }
int64_t match_bytes(int64_t max_group) {
  return whole_lines(max_group * static_cast<int64_t>(sizeof(Measured) + sizeof(Between)));
}

}  // namespace

int64_t ranking_workspace_bytes_cpu(int64_t max_group, int threads) {
  return 2 * hit_bytes(max_group) * std::max(threads, 1);
}

void ranking_forward_cpu(const void* distances, int64_t row_stride, const RankingLabels& labels,
                         const RankingResults& results, void* workspace, DType dtype, int64_t Q, int64_t G,
                         int64_t max_group, const Place& place) {
  char* const hits = static_cast<char*>(workspace);
  dispatch_float(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    parallel_for(Q, paying_threads(Q * G, place.threads), [&](int64_t begin, int64_t end, int thread) {
      rank_rows(static_cast<const T*>(distances), row_stride, labels, G,
                reinterpret_cast<Hit*>(hits + 2 * hit_bytes(max_group) * thread), results, begin, end);
    });
  });
}

int64_t ranking_features_workspace_bytes_cpu(int64_t max_group, int64_t G, int threads) {
  return (2 * hit_bytes(max_group) + match_bytes(max_group) + whole_lines(4 * G)) * std::max(threads, 1);
}

void ranking_features_cpu(float* products, int64_t ld, const Features& x, const Features& y, DType dtype, int64_t D,
                          const Bounds& x_bounds, const Bounds& y_bounds, const RankingLabels& labels,
                          const RankingResults& results, void* workspace, int64_t max_group, const Place& place) {
  const Sides features{x, y, D, exact_distance_function(dtype, x.factor != nullptr)};
  const int64_t each = ranking_features_workspace_bytes_cpu(max_group, y.rows, 1);
  parallel_for(x.rows, paying_threads(x.rows * y.rows, place.threads), [&](int64_t begin, int64_t end, int thread) {
    char* const own = static_cast<char*>(workspace) + each * thread;
    char* const matches = own + 2 * hit_bytes(max_group);
    const Scratch scratch{reinterpret_cast<Hit*>(own), reinterpret_cast<Hit*>(own + hit_bytes(max_group)),
                          reinterpret_cast<Measured*>(matches),
                          reinterpret_cast<Between*>(matches + max_group * sizeof(Measured)),
                          reinterpret_cast<float*>(matches + match_bytes(max_group))};
    rank_rows_exactly(products, ld, features, x_bounds, y_bounds, labels, scratch, results, begin, end);
  });
}

}  // namespace vareid
