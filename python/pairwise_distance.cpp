#include "pairwise_distance.h"

#include "bindings.h"
#include "features.h"

namespace vareid {
namespace {

void max_abs(const TensorView& x, const TensorView& out, int threads) {
  const Features features = make_features(x, std::nullopt, "x");
  pairwise_distance_max_abs_cpu(features, x.dtype(), x.shape[1], array<double>(out, "max_abs", x.shape[0]), threads);
}

void norm(const TensorView& x, const OptionalView& factor, const TensorView& out, int threads, uintptr_t) {
  const Features features = make_features(x, factor, "x");
  pairwise_distance_norm_cpu(features, x.dtype(), x.shape[1], array<double>(out, "norm", x.shape[0]), threads);
}

void prepare(const TensorView& x, const OptionalView& factor, const OptionalView& center, const TensorView& out,
             const TensorView& out_norm, int threads, uintptr_t) {
  const Features features = make_features(x, factor, "x");
  const int64_t rows = x.shape[0], D = x.shape[1];
  pairwise_distance_prepare_cpu(features, x.dtype(), D, array<double>(center, "center", D), array<float>(out, "out", rows * D),
                      array<float>(out_norm, "norm", rows), threads);
}

// The leading dimension of a matrix whose rows are contiguous and lie in one array of floats.
int64_t leading_dimension(const TensorView& block, const char* name) {
  if (block.ndim != 2) refuse(name, "shape " + shape_text(block) + ", expected two dimensions");
  check_float32(block, name);
  if (block.shape[1] > 1 && block.strides[1] != 1) refuse(name, "must have contiguous rows");
  return block.strides[0];
}

void block(const TensorView& products, const TensorView& x, const OptionalView& x_factor, const TensorView& y,
           const OptionalView& y_factor, const TensorView& x_norm, const TensorView& y_norm, int metric,
           double unscale, const OptionalView& mirror, int threads, uintptr_t) {
  const Features left = make_features(x, x_factor, "x"), right = make_features(y, y_factor, "y");
  check_shape(products, "products", {left.rows, right.rows});
  check_shape(y, "y", {right.rows, x.shape[1]});
  if (mirror) check_shape(*mirror, "mirror", {right.rows, left.rows});
  pairwise_distance_block_cpu(products.as<float>(), leading_dimension(products, "products"), left, right, x.dtype(),
                              x.shape[1], array<float>(x_norm, "x_norm", left.rows),
                              array<float>(y_norm, "y_norm", right.rows), static_cast<Metric>(metric), unscale,
                              mirror ? mirror->as<float>() : nullptr,
                              mirror ? leading_dimension(*mirror, "mirror") : 0, threads);
}

}  // namespace

void bind_pairwise_distance(pybind11::module_& m) {
  using release = pybind11::call_guard<pybind11::gil_scoped_release>;
  m.def("pairwise_distance_max_abs", &max_abs, release());
  m.def("pairwise_distance_norm", &norm, release());
  m.def("pairwise_distance_prepare", &prepare, release());
  m.def("pairwise_distance_block", &block, release());
}

}  // namespace vareid
