// Squared distances as float64 sums of squared differences. The order of the sums is fixed and depends on nothing but
// D, so equal rows are at equal distances from everything, and exchanging the two rows changes nothing.
#pragma once

#include <cstdint>

#include "pairwise_distance.h"

namespace vareid {

// |factor_i x_i - factor_j y_j|^2 for row i of x and row j of y. Row `next` of y is brought to the caches meanwhile.
using ExactDistance = double (*)(const Features& x, int64_t i, const Features& y, int64_t j, int64_t D, int64_t next);

// The function for an element type; scaled: whether the features have factors.
ExactDistance exact_distance_function(DType dtype, bool scaled);

}  // namespace vareid
