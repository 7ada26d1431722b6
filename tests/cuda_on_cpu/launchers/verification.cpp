#include "verification.h"

#include "ranking_labels.h"

namespace cuda_on_cpu {

template <>
struct Fields<vareid::Prefixes> {
  using types = std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int, int>;
  static vareid::Prefixes make(int64_t p0, int64_t p1, int64_t p2, int64_t p3, int64_t p4, int64_t p5, int64_t p6,
                               int64_t p7, int count, int digits) {
    return {{p0, p1, p2, p3, p4, p5, p6, p7}, count, digits};
  }
};

}  // namespace cuda_on_cpu

EXPORT(verification_histogram_cuda)
EXPORT(verification_refine_cuda)
EXPORT(verification_accepted_cuda)
