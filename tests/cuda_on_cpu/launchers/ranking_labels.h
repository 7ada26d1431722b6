// The structures of ranking.h as arguments.
#pragma once

#include "export.h"
#include "ranking.h"

namespace cuda_on_cpu {

template <>
struct Fields<vareid::RankingLabels> {
  using types = std::tuple<const int64_t*, const int64_t*, const int64_t*, const uint8_t*, const int64_t*,
                           const int64_t*, int64_t>;
  static vareid::RankingLabels make(const int64_t* order, const int64_t* begin, const int64_t* end, const uint8_t* junk,
                                    const int64_t* query_codes, const int64_t* gallery_codes, int64_t codes) {
    return {order, begin, end, junk, query_codes, gallery_codes, codes};
  }
};

}  // namespace cuda_on_cpu
