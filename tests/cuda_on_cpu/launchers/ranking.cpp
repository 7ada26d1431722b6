#include "ranking.h"

#include "export.h"

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
template <>
struct Fields<vareid::RankingResults> {
  using types = std::tuple<double*, double*, int64_t*, int64_t*>;
  static vareid::RankingResults make(double* precision, double* penalty, int64_t* first, int64_t* matches) {
    return {precision, penalty, first, matches};
  }
};

}  // namespace cuda_on_cpu

EXPORT(ranking_forward_cuda)
EXPORT(ranking_features_cuda)
