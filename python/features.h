// Features as the bindings of the retrieval ops take them: a matrix with contiguous rows and an optional factor per
// row.
#pragma once

#include "array.h"
#include "pairwise_distance.h"

namespace vareid {

inline Features make_features(const Array& x, const OptionalArray& factor, const char* name) {
  if (x.ndim != 2) refuse(name, "shape " + shape_text(x) + ", expected [rows, D]");
  check_float(x, name);
  if (x.shape[0] > 1 && x.shape[1] > 1 && x.strides[1] != 1) refuse(name, "must have contiguous rows");
  if (factor) {
    check_shape(*factor, "factor", {x.shape[0]});
    check_double(*factor, "factor");
    check_contiguous(*factor, "factor");
    check_device(*factor, "factor", x.device_type, x.device_id);
  }
  return {x.data, factor ? factor->as<double>() : nullptr, x.shape[0], x.strides[0]};
}

// The leading dimension of a float32 matrix whose rows are contiguous.
inline int64_t leading_dimension(const Array& block, const char* name) {
  if (block.ndim != 2) refuse(name, "shape " + shape_text(block) + ", expected two dimensions");
  check_float32(block, name);
  if (block.shape[1] > 1 && block.strides[1] != 1) refuse(name, "must have contiguous rows");
  return block.strides[0];
}

}  // namespace vareid
