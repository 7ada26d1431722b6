#include "ranking_labels.h"

namespace cuda_on_cpu {

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
