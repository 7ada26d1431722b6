#include "nearest_neighbors.h"

#include "export.h"

namespace cuda_on_cpu {

template <>
struct Fields<vareid::Candidates> {
  using types = std::tuple<float*, int32_t*, int32_t*, float*, float*, float*, int64_t, int64_t>;
  static vareid::Candidates make(float* lower, int32_t* index, int32_t* count, float* threshold, float* cut,
                                 float* row_max, int64_t capacity, int64_t k) {
    return {lower, index, count, threshold, cut, row_max, capacity, k};
  }
};

}  // namespace cuda_on_cpu

EXPORT(nearest_neighbors_scan_cuda)
EXPORT(nearest_neighbors_select_cuda)
EXPORT(nearest_neighbors_rescan_cuda)
