#include "verification.h"

#include <algorithm>
#include <vector>

#include "bindings.h"
#include "ranking_labels.h"

namespace vareid {
namespace {

struct Rows {
  int64_t Q, G;
  RankingLabels labels;
};

Rows check_rows(const Array& distances, const Labels& labels) {
  if (distances.ndim != 2) refuse("distances", "shape " + shape_text(distances) + ", expected [Q, G]");
  check_float(distances, "distances");
  const int64_t Q = distances.shape[0], G = distances.shape[1];
  if (G > INT32_MAX) refuse("distances", "has more than 2^31 - 1 columns");
  if (Q > 0 && G > 1 && distances.strides[1] != 1) refuse("distances", "must have contiguous rows");
  return {Q, G, make_labels(labels, Q, G, distances)};
}

void check_result(const Array& array, const char* name, std::initializer_list<int64_t> shape, const Array& distances) {
  check_shape(array, name, shape);
  check_contiguous(array, name);
  check_device(array, name, distances.device_type, distances.device_id);
}

void histogram(const Array& distances, const Labels& labels, const Array& counts, const Array& nearest_distance,
               const Array& nearest_index, const OptionalArray& workspace, const Place& place) {
  const auto [Q, G, in] = check_rows(distances, labels);
  check_result(counts, "counts", {2, kDigitValues}, distances);
  check_int64(counts, "counts");
  check_result(nearest_distance, "nearest_distance", {2, Q}, distances);
  check_double(nearest_distance, "nearest_distance");
  check_result(nearest_index, "nearest_index", {2, Q}, distances);
  check_int64(nearest_index, "nearest_index");
  const int64_t needed = verification_workspace_bytes_cpu(0, Q, G, place.threads);
  call(distances, KERNELS(verification_histogram), distances.data, distances.strides[0], in, counts.as<int64_t>(),
       nearest_distance.as<double>(), nearest_index.as<int64_t>(), scratch(workspace, needed, distances),
       distances.dtype(), Q, G, place);
}

void refine(const Array& distances, const Labels& labels, const std::vector<int64_t>& prefixes, int digits,
            const Array& counts, const OptionalArray& workspace, const Place& place) {
  const auto [Q, G, in] = check_rows(distances, labels);
  const auto P = static_cast<int64_t>(prefixes.size());
  if (P < 1 || P > kMostPrefixes) refuse("prefixes", "1 to 8 are allowed");
  if (digits < 1 || 16 * digits >= distances.type_bits) refuse("digits", "leave no further digit");
  check_result(counts, "counts", {2, P, kDigitValues}, distances);
  check_int64(counts, "counts");
  Prefixes given{{}, static_cast<int>(P), digits};
  std::copy(prefixes.begin(), prefixes.end(), given.value);
  const int64_t needed = verification_workspace_bytes_cpu(P, Q, G, place.threads);
  call(distances, KERNELS(verification_refine), distances.data, distances.strides[0], in, given, counts.as<int64_t>(),
       scratch(workspace, needed, distances), distances.dtype(), Q, G, place);
}

void accepted(const Array& distances, const Labels& labels, double threshold, const Array& result, const Place& place) {
  const auto [Q, G, in] = check_rows(distances, labels);
  check_result(result, "accepted", {2, Q}, distances);
  check_int64(result, "accepted");
  call(distances, KERNELS(verification_accepted), distances.data, distances.strides[0], in, threshold,
       result.as<int64_t>(), distances.dtype(), Q, G, place);
}

}  // namespace

void bind_verification(pybind11::module_& m) {
  m.def("verification_workspace_bytes", &verification_workspace_bytes_cpu);
  m.def("verification_histogram", &histogram, pybind11::call_guard<pybind11::gil_scoped_release>());
  m.def("verification_refine", &refine, pybind11::call_guard<pybind11::gil_scoped_release>());
  m.def("verification_accepted", &accepted, pybind11::call_guard<pybind11::gil_scoped_release>());
}

}  // namespace vareid
