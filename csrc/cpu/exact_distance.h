// Squared distances as float64 sums of squared differences. The order of the sums is fixed and depends on nothing but
// D, so equal rows are at equal distances from everything, and exchanging the two rows changes nothing.
#pragma once

#include <cstdint>

#include "pairwise_distance.h"

namespace vareid {

// Two sets of features whose rows are numbered together.
struct Rows {
  const Features& first;
  const Features& second;

  const Features& of(int64_t row) const { return row < first.rows ? first : second; }
  int64_t local(int64_t row) const { return row < first.rows ? row : row - first.rows; }
};

// |factor_i x_i - factor_j y_j|^2 for row i of x and row j of y.
using ExactDistance = double (*)(const Features& x, int64_t i, const Features& y, int64_t j, int64_t D);

// The same for row i of x and the rows index[c] of y, to out[c].
using ExactDistances = void (*)(const Rows& x, int64_t i, const Rows& y, const int32_t* index, int64_t count, int64_t D,
                                double* out);

// The functions for an element type; scaled: whether the features have factors.
ExactDistance exact_distance_function(DType dtype, bool scaled);
ExactDistances exact_distances_function(DType dtype, bool scaled);

}  // namespace vareid
