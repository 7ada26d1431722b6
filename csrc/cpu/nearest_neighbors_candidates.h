// A row's candidates, its near and its far ones, while blocks of products go by: nearest_neighbors.h has the notation.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>

#include "cpu/exact_distance.h"
#include "cpu/simd.h"
#include "nearest_neighbors.h"

namespace vareid {

constexpr int64_t kMaxCapacity = 4096;
constexpr float kInf = std::numeric_limits<float>::infinity();

// Whole numbers that are ordered as the floats are, and back.
VAREID_INLINE int32_t order_of(float value) {
  const int32_t bits = static_cast<int32_t>(bits_from_float(value));
  return bits >= 0 ? bits : bits ^ 0x7fffffff;
}
VAREID_INLINE float float_at(int32_t order) {
  return float_from_bits(static_cast<uint32_t>(order >= 0 ? order : order ^ 0x7fffffff));
}

// A value that at least k of the values do not exceed: the k-th smallest, or one below the next.
float bound_of_smallest(const float* values, int64_t count, int64_t k);

// Measures pairs of a left and a right set; of one set that is both where a scan is two-sided.
struct Measure {
  const Rows left, right;
  const ExactDistances exact;
  const int64_t D;

  explicit Measure(const PairSets& sets)
      : left{sets.x, sets.x2},
        right{sets.y, sets.y2},
        exact(exact_distances_function(sets.dtype, sets.x.factor != nullptr)),
        D(sets.D) {}

  void operator()(int64_t i, const int32_t* index, int64_t count, double* out) const {
    exact(left, i, right, index, count, D, out);
  }
};

// Of a candidate that has been measured, the index is ~j, and the lower bound the float below its distance.
inline float upper_bound(float lower, int32_t index, float window, const float* other_window) {
  return index < 0 ? float_at(order_of(lower) + 3) : lower + 2 * (window + other_window[index]);
}

// Drops what is beyond the k-th smallest upper bound, and what does not fit. Before that is given up, the candidates
// are measured.
void compact(const Candidates& state, int64_t row, float window, const float* other_window, const Measure* measure);

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
  void settle(int64_t i, int64_t room) const;
};

}  // namespace vareid
