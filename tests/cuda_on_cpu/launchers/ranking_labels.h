// The structures of ranking.h as arguments.
#pragma once

#include "export.h"
#include "ranking.h"

namespace cuda_on_cpu {

template <>
struct Fields<vareid::RankingLabels> {
  using types =
      std::tuple<const int64_t*, const int64_t*, const int64_t*, const uint8_t*, const int64_t*, const int64_t*>;
  static vareid::RankingLabels make(const int64_t* order, const int64_t* begin, const int64_t* end, const uint8_t* junk,
                                    const int64_t* query_camera, const int64_t* gallery_camera) {
    return {order, begin, end, junk, query_camera, gallery_camera};
  }
};

}  // namespace cuda_on_cpu
