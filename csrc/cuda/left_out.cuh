// Which images of a query's identity are left out.
#pragma once

#include "ranking.h"

namespace vareid {

// Whether an image has one of a query's codes.
__device__ __forceinline__ bool left_out(const RankingLabels& labels, const int64_t* own, int64_t image) {
  const int64_t* code = labels.gallery_codes + image * labels.codes;
  for (const int64_t* const end = code + labels.codes; code < end; ++code, ++own)
    if (*own != -1 && *code == *own) return true;
  return false;
}

}  // namespace vareid
