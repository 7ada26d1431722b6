#include "ranking.h"

#include <tuple>
#include <vector>

#include "bindings.h"
#include "features.h"
#include "ranking_labels.h"

namespace vareid {
namespace {

// average_precision, inverse_negative_penalty, first_match_rank, num_matches.
using Results = std::vector<Array>;
RankingResults make_results(const Results& arrays, int64_t Q, const Array& distances) {
  if (arrays.size() != 4) refuse("results", "must be four arrays");
  for (int i = 0; i < 2; ++i) {
    check_shape(arrays[i], "average_precision", {Q});
    check_contiguous(arrays[i], "average_precision");
    check_device(arrays[i], "average_precision", distances.device_type, distances.device_id);
    if (arrays[i].type_code != 2 || arrays[i].type_bits != 64) refuse("average_precision", "must be float64");
  }
  check_labels(arrays[2], "first_match_rank", {Q}, distances);
  check_labels(arrays[3], "num_matches", {Q}, distances);
  return {arrays[0].as<double>(), arrays[1].as<double>(), arrays[2].as<int64_t>(), arrays[3].as<int64_t>()};
}

void forward(const Array& distances, const Labels& labels, const Results& results, const OptionalArray& workspace,
             int64_t max_group, const Place& place) {
  if (distances.ndim != 2) refuse("distances", "shape " + shape_text(distances) + ", expected [Q, G]");
  check_float(distances, "distances");
  const int64_t Q = distances.shape[0], G = distances.shape[1];
  if (G > INT32_MAX) refuse("distances", "has more than 2^31 - 1 columns");
  if (Q > 0 && G > 1 && distances.strides[1] != 1) refuse("distances", "must have contiguous rows");
  const RankingLabels in = make_labels(labels, Q, G, distances);
  const RankingResults out = make_results(results, Q, distances);
  void* const memory = scratch(workspace, ranking_workspace_bytes_cpu(max_group, place.threads), distances);
  call(distances, KERNELS(ranking_forward), distances.data, distances.strides[0], in, out, memory, distances.dtype(), Q,
       G, max_group, place);
}

// Features with their factors, norms and windows: x, factor, norm, window.
using FeatureArrays = std::tuple<Array, OptionalArray, Array, Array>;
void features(const Array& products, const FeatureArrays& x, const FeatureArrays& y, const Labels& labels,
              const Results& results, const OptionalArray& workspace, int64_t max_group, const Place& place) {
  const auto& [x_rows, x_factor, x_norm, x_window] = x;
  const auto& [y_rows, y_factor, y_norm, y_window] = y;
  const Features left = make_features(x_rows, x_factor, "x"), right = make_features(y_rows, y_factor, "y");
  const int64_t ld = leading_dimension(products, "products");
  check_shape(products, "products", {left.rows, right.rows});
  check_shape(y_rows, "y", {right.rows, x_rows.shape[1]});
  check_same_dtype(y_rows, "y", x_rows, "x");
  for (const Array* const array : {&x_rows, &y_rows, &x_norm, &x_window, &y_norm, &y_window})
    check_device(*array, "features", products.device_type, products.device_id);
  const Bounds x_bounds{pointer<float>(x_norm, "norm", left.rows), pointer<float>(x_window, "window", left.rows)};
  const Bounds y_bounds{pointer<float>(y_norm, "norm", right.rows), pointer<float>(y_window, "window", right.rows)};
  const int64_t needed = ranking_features_workspace_bytes_cpu(max_group, right.rows, place.threads);
  call(products, KERNELS(ranking_features), products.as<float>(), ld, left, right, x_rows.dtype(), x_rows.shape[1],
       x_bounds, y_bounds, make_labels(labels, left.rows, right.rows, products),
       make_results(results, left.rows, products), scratch(workspace, needed, products), max_group, place);
}

}  // namespace

void bind_ranking(pybind11::module_& m) {
  m.def("ranking_workspace_bytes", &ranking_workspace_bytes_cpu);
  m.def("ranking_features_workspace_bytes", &ranking_features_workspace_bytes_cpu);
  m.def("ranking_features", &features, pybind11::call_guard<pybind11::gil_scoped_release>());
  m.def("ranking_forward", &forward, pybind11::call_guard<pybind11::gil_scoped_release>());
}

}  // namespace vareid
