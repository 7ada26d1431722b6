#include "nearest_neighbors.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <optional>

#include "cpu/byte_products.h"
#include "cpu/exact_distance.h"
#include "cpu/float_products.h"
#include "cpu/parallel.h"
#include "cpu/simd.h"

namespace vareid {
namespace {

constexpr int64_t kMaxCapacity = 4096;
constexpr int64_t kSegment = 1024;  // columns whose bounds stay in the first-level cache
constexpr int64_t kChunk = 64;      // columns tested at once
constexpr float kInfinity = std::numeric_limits<float>::infinity();

// Whole numbers that are ordered as the floats are, and back.
VAREID_INLINE int32_t order_of(float value) {
  const int32_t bits = static_cast<int32_t>(bits_from_float(value));
  return bits >= 0 ? bits : bits ^ 0x7fffffff;
}
VAREID_INLINE float float_at(int32_t order) {
  return float_from_bits(static_cast<uint32_t>(order >= 0 ? order : order ^ 0x7fffffff));
}

// A value that at least k of the values do not exceed: the k-th smallest, or one below the next. Halving the range of
// values takes a third of the time of a selection.
VAREID_MULTIVERSION float bound_of_smallest(const float* values, int64_t count, int64_t k) {
  int32_t keys[kMaxCapacity];
  int32_t first = std::numeric_limits<int32_t>::max(), last = std::numeric_limits<int32_t>::min();
#pragma omp simd reduction(min : first) reduction(max : last)
  for (int64_t c = 0; c < count; ++c) {
    keys[c] = order_of(values[c]);
    first = std::min(first, keys[c]);
    last = std::max(last, keys[c]);
  }
  int64_t low = first, high = last;
  while (low < high) {
    const int64_t middle = low + (high - low) / 2;
    const int32_t key = static_cast<int32_t>(middle);
    int32_t below = 0;
#pragma omp simd reduction(+ : below)
    for (int64_t c = 0; c < count; ++c) below += keys[c] <= key;
    if (below >= k) high = middle;
    if (below == k) break;
    if (below < k) low = middle + 1;
  }
  return float_at(static_cast<int32_t>(high));
}

// Two sets of features whose rows are numbered together.
struct Rows {
  const Features& first;
  const Features& second;

  const Features& of(int64_t row) const { return row < first.rows ? first : second; }
  int64_t local(int64_t row) const { return row < first.rows ? row : row - first.rows; }
  // Which row of the same set comes after `row`: `after`, if it is of it.
  int64_t next(int64_t row, int64_t after) const {
    return local((row < first.rows) == (after < first.rows) ? after : row);
  }
};

// Measures pairs of a left and a right set; of one set that is both where a scan is two-sided.
struct Measure {
  const Rows left, right;
  const ExactDistance exact;
  const int64_t D;

  explicit Measure(const PairSets& sets)
      : left{sets.x, sets.x2},
        right{sets.y, sets.y2},
        exact(exact_distance_function(sets.dtype, sets.x.factor != nullptr)),
        D(sets.D) {}

  double operator()(int64_t i, int64_t j) const {
    return exact(left.of(i), left.local(i), right.of(j), right.local(j), D, right.local(j));
  }
};

// Of a candidate that has been measured, the index is ~j, and the lower bound the float below its distance.
inline float upper_bound(float lower, int32_t index, float window, const float* other_window) {
  return index < 0 ? float_at(order_of(lower) + 3) : lower + 2 * (window + other_window[index]);
}

// Drops what is beyond the k-th smallest upper bound, and what does not fit. Before that is given up, the candidates
// are measured.
void compact(const Candidates& state, int64_t row, float window, const float* other_window, const Measure* measure) {
  float* const lower = state.lower + row * state.capacity;
  int32_t* const index = state.index + row * state.capacity;
  float scratch[kMaxCapacity], threshold;
  int64_t kept = state.count[row];
  const auto drop = [&] {
    for (int64_t c = 0; c < kept; ++c) scratch[c] = upper_bound(lower[c], index[c], window, other_window);
    threshold = bound_of_smallest(scratch, kept, state.k);
    const int64_t count = kept;
    kept = 0;
    for (int64_t c = 0; c < count; ++c) {  // without a branch: which ones stay cannot be foreseen
      const float value = lower[c];
      lower[kept] = value;
      index[kept] = index[c];
      kept += value <= threshold;
    }
  };
  drop();
  const int64_t limit = state.capacity - std::max<int64_t>((state.capacity - state.k) / 4, 1);
  if (kept > limit && measure) {
    for (int64_t c = 0; c < kept; ++c) {
      if (index[c] < 0) continue;
      lower[c] = std::nextafter(static_cast<float>((*measure)(row, index[c])), -kInfinity);
      index[c] = ~index[c];
    }
    drop();
  }
  if (kept > limit) {
    std::copy(lower, lower + kept, scratch);
    std::nth_element(scratch, scratch + limit, scratch + kept);
    const float lost = scratch[limit];
    state.cut[row] = std::min(state.cut[row], lost);
    int64_t equal = limit;  // room for those at the value itself
    for (int64_t c = 0; c < kept; ++c) equal -= lower[c] < lost;
    int64_t left = 0;
    for (int64_t c = 0; c < kept; ++c) {
      if (!(lower[c] < lost) && (lower[c] > lost || equal-- <= 0)) continue;
      lower[left] = lower[c];
      index[left++] = index[c];
    }
    kept = left;
    threshold = std::nextafter(lost, -kInfinity);
  }
  state.count[row] = static_cast<int32_t>(kept);
  state.threshold[row] = std::min(state.threshold[row], threshold);
}

inline void push(const Candidates& state, int64_t row, float lower, int64_t index, float window,
                 const float* other_window, const Measure* measure) {
  const int64_t at = row * state.capacity + state.count[row]++;
  state.lower[at] = lower;
  state.index[at] = static_cast<int32_t>(index);
  if (state.count[row] == state.capacity) compact(state, row, window, other_window, measure);
}

// The pairs that a row's largest distance may be that of.
struct FarPairs {
  const Farthest& state;
  const Measure& measure;
  float* const row_max;

  void push(int64_t i, int64_t j, float lower, float upper) const {
    row_max[i] = std::max(row_max[i], lower);
    const int64_t at = i * kFarthest + state.count[i]++;
    state.upper[at] = upper;
    state.index[at] = static_cast<int32_t>(j);
    if (state.count[i] == kFarthest) settle(i, kFarthest / 2);
  }

  // Drops the pairs that are out of the question; if more than `room` are left, measures them.
  void settle(int64_t i, int64_t room) const {
    float* const upper = state.upper + i * kFarthest;
    int32_t* const index = state.index + i * kFarthest;
    int32_t kept = 0;
    for (int32_t c = 0; c < state.count[i]; ++c) {
      if (!(upper[c] >= row_max[i])) continue;
      upper[kept] = upper[c];
      index[kept++] = index[c];
    }
    if (kept > room) {
      for (int32_t c = 0; c < kept; ++c) {
        row_max[i] = std::max(row_max[i], static_cast<float>(measure(i, index[c])));
      }
      kept = 0;
    }
    state.count[i] = kept;
  }
};

// Where the largest distance of each row comes from: the products, FarPairs, or it is not wanted.
enum class Largest { kOfProducts, kOfPairs, kNone };

// One rectangle of a block, at most kSegment columns wide. With kWrite, its distances go to `out`, which may be it.
template <bool kTwoSided, bool kWrite, Largest kLargest>
VAREID_INLINE void scan_rectangle(const float* block, int64_t ld, int64_t rows, int64_t columns, int64_t row_begin,
                                  int64_t column_begin, const Bounds& left_bounds, const Bounds& right_bounds,
                                  const Candidates& left, const Candidates* right, const Measure* measure,
                                  const FarPairs* pairs, float* out, int64_t out_ld) {
  constexpr bool kProducts = kLargest == Largest::kOfProducts, kPairs = kLargest == Largest::kOfPairs;
  alignas(64) float shrunk[kSegment], norm[kSegment], limit[kSegment], largest[kSegment];
  alignas(64) float grown[kSegment], far_limit[kSegment];
  alignas(64) uint8_t hit[kChunk];
  const int64_t padded = (columns + kChunk - 1) / kChunk * kChunk;
  for (int64_t c = 0; c < padded; ++c) {
    const int64_t j = column_begin + std::min(c, columns - 1);
    norm[c] = right_bounds.norm[j];
    shrunk[c] = norm[c] - right_bounds.window[j];
    limit[c] = kTwoSided ? right->threshold[j] - shrunk[c] : 0.0f;
    largest[c] = -kInfinity;
    if (kPairs) {
      grown[c] = norm[c] + right_bounds.window[j];
      far_limit[c] = kTwoSided ? pairs->row_max[j] - grown[c] : 0.0f;
    }
  }
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t i = row_begin + r;
    const float row_norm = left_bounds.norm[i], row_shrunk = row_norm - left_bounds.window[i];
    float row_limit = left.threshold[i] - row_shrunk;
    float row_largest = -kInfinity;
    const float row_grown = row_norm + left_bounds.window[i];
    float row_far_limit = kPairs ? pairs->row_max[i] - row_grown : 0.0f;
    for (int64_t c0 = 0; c0 < columns; c0 += kChunk) {
      const int64_t n = std::min(kChunk, columns - c0);
      const float* const part = block + r * ld + c0;
      // How far a pair is inside one of the limits; those of a chunk are looked at one by one if any is.
      float inside = -kInfinity;
      alignas(64) float twice[kChunk], excess[kChunk];
#pragma omp simd reduction(max : row_largest) reduction(max : inside)
      for (int64_t c = 0; c < n; ++c) {
        const float product = -2 * part[c];
        twice[c] = product;
        const float from_row = product + norm[c0 + c], from_column = product + row_norm;
        if (kProducts) row_largest = std::max(row_largest, from_row);
        if (kProducts && kTwoSided) largest[c0 + c] = std::max(largest[c0 + c], from_column);
        float most = row_limit - (product + shrunk[c0 + c]);
        if (kTwoSided) most = std::max(most, limit[c0 + c] - (product + row_shrunk));
        if (kPairs) most = std::max(most, product + grown[c0 + c] - row_far_limit);
        if (kPairs && kTwoSided) most = std::max(most, product + row_grown - far_limit[c0 + c]);
        excess[c] = most;
        inside = std::max(inside, most);
        if (kWrite) out[r * out_ld + c0 + c] = std::max(from_row + row_norm, 0.0f);
      }
      if (!(inside >= 0)) continue;
      for (int64_t c = 0; c < n; ++c) hit[c] = excess[c] >= 0;
      for (int64_t c8 = 0; c8 < n; c8 += 8) {
        uint64_t hits = 0;
        std::memcpy(&hits, hit + c8, std::min<int64_t>(8, n - c8));
        for (; hits; hits &= hits - 1) {
          const int64_t c = c8 + __builtin_ctzll(hits) / 8;
          const int64_t j = column_begin + c0 + c;
          const float lower = twice[c] + shrunk[c0 + c] + row_shrunk;
          if (twice[c] + shrunk[c0 + c] <= row_limit) {
            push(left, i, lower, j, left_bounds.window[i], right_bounds.window, measure);
            row_limit = left.threshold[i] - row_shrunk;
          }
          if (kTwoSided && twice[c] + row_shrunk <= limit[c0 + c]) {
            push(*right, j, lower, i, right_bounds.window[j], left_bounds.window, measure);
            limit[c0 + c] = right->threshold[j] - shrunk[c0 + c];
          }
          if (!kPairs) continue;
          const float upper = twice[c] + grown[c0 + c] + row_grown;
          if (twice[c] + grown[c0 + c] >= row_far_limit) {
            pairs->push(i, j, lower, upper);
            row_far_limit = pairs->row_max[i] - row_grown;
          }
          if (kTwoSided && twice[c] + row_grown >= far_limit[c0 + c]) {
            pairs->push(j, i, lower, upper);
            far_limit[c0 + c] = pairs->row_max[j] - grown[c0 + c];
          }
        }
      }
    }
    if (kProducts) left.row_max[i] = std::max(left.row_max[i], row_largest + row_norm);
  }
  if (kProducts && kTwoSided)
    for (int64_t c = 0; c < columns; ++c) {
      float& value = right->row_max[column_begin + c];
      value = std::max(value, largest[c] + norm[c]);
    }
}

#define VAREID_SCAN(name, two_sided, write, largest)                                                                   \
  VAREID_MULTIVERSION void name(const float* block, int64_t ld, int64_t rows, int64_t columns, int64_t row_begin,      \
                                int64_t column_begin, const Bounds& left_bounds, const Bounds& right_bounds,           \
                                const Candidates& left, const Candidates* right, const Measure* measure,               \
                                const FarPairs* pairs, float* out, int64_t out_ld) {                                   \
    scan_rectangle<two_sided, write, Largest::largest>(block, ld, rows, columns, row_begin, column_begin, left_bounds, \
                                                       right_bounds, left, right, measure, pairs, out, out_ld);        \
  }
VAREID_SCAN(scan_left, false, false, kOfProducts)
VAREID_SCAN(scan_left_write, false, true, kOfProducts)
VAREID_SCAN(scan_both, true, false, kOfProducts)
VAREID_SCAN(scan_both_write, true, true, kOfProducts)
VAREID_SCAN(scan_left_pairs, false, false, kOfPairs)
VAREID_SCAN(scan_both_pairs, true, false, kOfPairs)
VAREID_SCAN(scan_both_pairs_write, true, true, kOfPairs)
VAREID_SCAN(scan_left_only, false, false, kNone)
VAREID_SCAN(scan_both_only, true, false, kNone)
#undef VAREID_SCAN

struct Rectangle {
  int64_t r0, r1, c0, c1;
};

// Calls body(rectangle, thread) for parts of a block that begin at multiples of `unit`: bands of rows or, with both, in
// as many rounds as there are threads, rectangles whose rows and columns no other thread has.
template <typename Body>
void by_rectangles(int64_t rows, int64_t columns, int64_t unit, bool both, const Place& place, const Body& body) {
  const auto units = [unit](int64_t size) { return (size + unit - 1) / unit; };
  const int64_t parts = usable_threads(std::min(units(rows), units(columns)), place.threads);
  const auto edge = [&](int64_t size, int64_t part) { return std::min(size, units(size) * part / parts * unit); };
  for (int64_t round = 0; round < (both ? parts : 1); ++round)
    parallel_for(parts, static_cast<int>(parts), [&](int64_t first, int64_t last, int) {
      for (int64_t part = first; part < last; ++part) {
        const int64_t other = (part + round) % parts;
        body(Rectangle{edge(rows, part), edge(rows, part + 1), both ? edge(columns, other) : 0,
                       both ? edge(columns, other + 1) : columns},
             part);
      }
    });
}

// Scans a block part by part.
void scan_block(decltype(scan_left)* scan, float* block, int64_t ld, int64_t rows, int64_t columns, int64_t row_begin,
                int64_t column_begin, const Bounds& left_bounds, const Bounds& right_bounds,
                const Candidates& candidates, bool both, const FarPairs* pairs, const Place& place) {
  by_rectangles(rows, columns, 1, both, place, [&](const Rectangle& part, int64_t) {
    for (int64_t c = part.c0; c < part.c1; c += kSegment)
      scan(block + part.r0 * ld + c, ld, part.r1 - part.r0, std::min(kSegment, part.c1 - c), row_begin + part.r0,
           column_begin + c, left_bounds, right_bounds, candidates, both ? &candidates : nullptr,
           pairs ? &pairs->measure : nullptr, pairs, block + part.r0 * ld + c, ld);
  });
}

// The same of products that are made strip by strip, in `workspace`: product(row, rows, column, columns, out).
template <typename Product>
void scan_strips(decltype(scan_left)* scan, int64_t rows, int64_t columns, int64_t row_begin, int64_t column_begin,
                 const Bounds& left_bounds, const Bounds& right_bounds, const Candidates& candidates, bool both,
                 const Measure& measure, const FarPairs* pairs, float* out, int64_t ld, void* workspace,
                 const Place& place, const Product& product) {
  constexpr int64_t kStrip = kPackedScanBytes / (kSegment * sizeof(float));  // rows of products that stay in cache
  by_rectangles(rows, columns, kByteColumns, both, place, [&](const Rectangle& part, int64_t thread) {
    float* const products = static_cast<float*>(workspace) + thread * kStrip * kSegment;
    for (int64_t c = part.c0; c < part.c1; c += kSegment)
      for (int64_t r = part.r0; r < part.r1; r += kStrip) {
        const int64_t height = std::min(kStrip, part.r1 - r), width = std::min(kSegment, part.c1 - c);
        product(r, height, c, packed_rows(width), products);
        scan(products, kSegment, height, width, row_begin + r, column_begin + c, left_bounds, right_bounds, candidates,
             both ? &candidates : nullptr, &measure, pairs, out ? out + r * ld + c : nullptr, ld);
      }
  });
}

double metric_value(double squared, Metric metric, double unscale) {
  if (metric == Metric::kCosine) return squared / 2;
  return metric == Metric::kEuclidean ? std::sqrt(squared) * unscale : squared * unscale * unscale;
}

struct Pair {
  double distance;
  int32_t index;

  bool operator<(const Pair& other) const {
    return distance < other.distance || (distance == other.distance && index < other.index);
  }
};

struct Output {
  int32_t* index;
  void* distance;
  DType dtype;
  int64_t k;
  Metric metric;
  double unscale;

  // The k first of `count` pairs; where there are fewer, -1 and Inf.
  void write(int64_t row, Pair* pairs, int64_t count) const {
    if (k < count) std::nth_element(pairs, pairs + k, pairs + count);
    std::sort(pairs, pairs + std::min(k, count));
    for (int64_t c = count; c < k; ++c) pairs[c] = {std::numeric_limits<double>::infinity(), -1};
    for (int64_t c = 0; c < k; ++c) {
      index[row * k + c] = pairs[c].index;
      if (!distance) continue;
      const double value = metric_value(pairs[c].distance, metric, unscale);
      if (dtype == DType::kFloat64)
        static_cast<double*>(distance)[row * k + c] = value;
      else
        static_cast<float*>(distance)[row * k + c] = static_cast<float>(value);
    }
  }
};

}  // namespace

void nearest_neighbors_scan_cpu(float* block, int64_t ld, int64_t rows, int64_t columns, int64_t row_begin,
                                int64_t column_begin, const Bounds& left_bounds, const Bounds& right_bounds,
                                const Candidates& candidates, bool both, bool write, const Place& place) {
  const auto scan = both ? (write ? scan_both_write : scan_both) : (write ? scan_left_write : scan_left);
  scan_block(scan, block, ld, rows, columns, row_begin, column_begin, left_bounds, right_bounds, candidates, both,
             nullptr, place);
}

void nearest_neighbors_scan_farthest_cpu(float* block, int64_t ld, int64_t rows, int64_t columns, int64_t row_begin,
                                         int64_t column_begin, const Bounds& left_bounds, const Bounds& right_bounds,
                                         const Candidates& candidates, bool both, const PairSets& sets,
                                         const Farthest& farthest, const Place& place) {
  const Measure measure(sets);
  const FarPairs pairs{farthest, measure, candidates.row_max};
  scan_block(both ? scan_both_pairs : scan_left_pairs, block, ld, rows, columns, row_begin, column_begin, left_bounds,
             right_bounds, candidates, both, &pairs, place);
}

void nearest_neighbors_round_cpu(const float* x, int64_t stride, int64_t rows, int64_t D, float* scale, double* rounded,
                                 const Place& place) {
  parallel_for(rows, place.threads, [&](int64_t begin, int64_t end, int) {
    for (int64_t r = begin; r < end; ++r) byte_rounding(x + r * stride, D, scale + r, rounded + r);
  });
}

void nearest_neighbors_pack_cpu(const float* x, int64_t stride, int64_t rows, int64_t D, const float* scale, bool left,
                                uint8_t* bytes, float* packed_scale, int32_t* sum, const Place& place) {
  std::copy(scale, scale + rows, packed_scale);
  std::fill(packed_scale + rows, packed_scale + packed_rows(rows), 0.0f);
  parallel_for(packed_rows(rows) / kBytePanel, place.threads, [&](int64_t begin, int64_t end, int) {
    for (int64_t r = begin * kBytePanel; r < end * kBytePanel; r += kBytePanel)
      byte_pack(x + r * stride, stride, std::min(kBytePanel, rows - r), D, packed_scale + r, left,
                bytes + r * packed_elements(D), sum + r);
  });
}

void nearest_neighbors_scan_packed_cpu(const PackedRows& left, const PackedRows& right, int64_t D, int64_t row_begin,
                                       int64_t column_begin, const Bounds& left_bounds, const Bounds& right_bounds,
                                       const Candidates& candidates, bool both, const PairSets& sets,
                                       const Farthest* farthest, void* workspace, const Place& place) {
  const auto scan = farthest ? (both ? scan_both_pairs : scan_left_pairs) : (both ? scan_both_only : scan_left_only);
  const Measure measure(sets);
  std::optional<FarPairs> pairs;
  if (farthest) pairs.emplace(FarPairs{*farthest, measure, candidates.row_max});
  const int64_t elements = packed_elements(D);
  scan_strips(scan, left.rows, right.rows, row_begin, column_begin, left_bounds, right_bounds, candidates, both,
              measure, pairs ? &*pairs : nullptr, nullptr, 0, workspace, place,
              [&](int64_t r, int64_t rows, int64_t c, int64_t columns, float* products) {
                byte_product(left.bytes + r * elements, left.scale + r, (rows + kByteRows - 1) / kByteRows * kByteRows,
                             right.bytes + c * elements, right.scale + c, right.sum + c, columns, elements, products,
                             kSegment);
              });
}

void nearest_neighbors_scan_written_cpu(const float* x, int64_t stride, int64_t rows, const float* y, int64_t y_stride,
                                        int64_t columns, int64_t D, int64_t row_begin, int64_t column_begin,
                                        const Bounds& left_bounds, const Bounds& right_bounds,
                                        const Candidates& candidates, const PairSets& sets, const Farthest& farthest,
                                        float* out, int64_t ld, float* panels, void* workspace, const Place& place) {
  static_assert(kFloatPanel == kByteColumns, "rectangles begin at panels");
  parallel_for(packed_rows(columns) / kFloatPanel, place.threads, [&](int64_t begin, int64_t end, int) {
    for (int64_t c = begin * kFloatPanel; c < end * kFloatPanel; c += kFloatPanel)
      float_pack(y + c * y_stride, y_stride, columns - c, D, panels + c * D);
  });
  const Measure measure(sets);
  const FarPairs pairs{farthest, measure, candidates.row_max};
  scan_strips(scan_both_pairs_write, rows, columns, row_begin, column_begin, left_bounds, right_bounds, candidates,
              true, measure, &pairs, out, ld, workspace, place,
              [&](int64_t r, int64_t height, int64_t c, int64_t width, float* products) {
                float_product(x + r * stride, stride, height, panels + c * D, width, D, products, kSegment);
              });
}

void nearest_neighbors_farthest_cpu(const PairSets& sets, const Farthest& farthest, float* row_max,
                                    const Place& place) {
  const Measure measure(sets);
  const FarPairs pairs{farthest, measure, row_max};
  parallel_for(sets.x.rows + sets.x2.rows, place.threads, [&](int64_t begin, int64_t end, int) {
    for (int64_t i = begin; i < end; ++i) pairs.settle(i, 0);
  });
}

void nearest_neighbors_select_cpu(const Features& x, const Features& x2, const Features& y, const Features& y2,
                                  DType dtype, int64_t D, Metric metric, double unscale, const Bounds& left_bounds,
                                  const Bounds& right_bounds, const Candidates& left, int32_t* index, void* distance,
                                  DType distance_dtype, uint8_t* unsure, float* kth_upper, const Place& place) {
  const ExactDistance exact = exact_distance_function(dtype, x.factor != nullptr);
  const Rows rows{x, x2}, columns{y, y2};
  const Output output{index, distance, distance_dtype, left.k, metric, unscale};
  parallel_for(x.rows + x2.rows, place.threads, [&](int64_t begin, int64_t end, int) {
    float upper[kMaxCapacity];
    Pair pairs[kMaxCapacity];
    for (int64_t i = begin; i < end; ++i) {
      const float* const lower = left.lower + i * left.capacity;
      const int32_t* const candidate = left.index + i * left.capacity;
      const int64_t count = left.count[i];
      for (int64_t c = 0; c < count; ++c)
        upper[c] = upper_bound(lower[c], candidate[c], left_bounds.window[i], right_bounds.window);
      const int64_t k = std::min(left.k, count);  // fewer only where the threshold was known before
      kth_upper[i] = k ? bound_of_smallest(upper, count, k) : -kInfinity;
      unsure[i] = kth_upper[i] >= left.cut[i];
      if (unsure[i]) continue;
      // The k that look nearest are measured first: none of the others is among the nearest if its lower bound is
      // beyond the farthest of them.
      const float first = k ? bound_of_smallest(lower, count, k) : -kInfinity;
      double farthest = std::numeric_limits<double>::infinity();
      int64_t kept = 0;
      for (const bool rest : {false, true}) {
        const int64_t measured = kept;
        for (int64_t c = 0; c < count; ++c)
          if ((lower[c] > first) == rest && lower[c] <= farthest)
            pairs[kept++].index = candidate[c] < 0 ? ~candidate[c] : candidate[c];
        for (int64_t c = measured; c < kept; ++c) {
          const int64_t j = pairs[c].index;
          pairs[c].distance = exact(rows.of(i), rows.local(i), columns.of(j), columns.local(j), D,
                                    columns.next(j, pairs[std::min(c + 1, kept - 1)].index));
        }
        if (!rest && kept) farthest = std::max_element(pairs, pairs + kept)->distance;
      }
      output.write(i, pairs, kept);
    }
  });
}

void nearest_neighbors_rescan_cpu(const float* block, int64_t ld, const int64_t* rows, int64_t count, const Features& x,
                                  const Features& x2, const Features& y, const Features& y2, DType dtype, int64_t D,
                                  Metric metric, double unscale, const Bounds& left_bounds, const Bounds& right_bounds,
                                  const float* kth_upper, const int32_t* same, int64_t k, int32_t* index,
                                  void* distance, DType distance_dtype, void* workspace, const Place& place) {
  const ExactDistance exact = exact_distance_function(dtype, x.factor != nullptr);
  const Rows left{x, x2}, right{y, y2};
  const int64_t columns = y.rows + y2.rows;
  const Output output{index, distance, distance_dtype, k, metric, unscale};
  parallel_for(count, place.threads, [&](int64_t begin, int64_t end, int thread) {
    Pair* const pairs = static_cast<Pair*>(workspace) + thread * (columns + (columns + 1) / 2);
    double* const known = reinterpret_cast<double*>(pairs + columns);  // distances to rows that others are equal to
    std::fill(known, known + columns, -1.0);
    for (int64_t r = begin; r < end; ++r) {
      const int64_t i = rows[r];
      const float shrunk = left_bounds.norm[i] - left_bounds.window[i];
      const auto lower_of = [&](int64_t j) {
        return -2 * block[r * ld + j] + (right_bounds.norm[j] - right_bounds.window[j]) + shrunk;
      };
      // These products may be more accurate than those of the scan.
      float* const upper = reinterpret_cast<float*>(pairs);
      for (int64_t j = 0; j < columns; ++j)
        upper[j] = lower_of(j) + 2 * (left_bounds.window[i] + right_bounds.window[j]);
      std::nth_element(upper, upper + k - 1, upper + columns);
      const float threshold = std::min(kth_upper[i], upper[k - 1]);
      int64_t kept = 0;
      for (int64_t j = 0; j < columns; ++j) {
        if (!(lower_of(j) <= threshold)) continue;
        const int64_t first = same ? same[j] : j;
        if (known[first] < 0)
          known[first] = exact(left.of(i), left.local(i), right.of(j), right.local(j), D, right.local(j));
        pairs[kept].distance = known[first];
        pairs[kept++].index = static_cast<int32_t>(j);
      }
      for (int64_t c = 0; c < kept; ++c) known[same ? same[pairs[c].index] : pairs[c].index] = -1.0;
      output.write(i, pairs, kept);
    }
  });
}

}  // namespace vareid
