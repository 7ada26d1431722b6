#include "pairwise_distance.h"

#include "bindings.h"
#include "features.h"

namespace vareid {
namespace {

void max_abs(const TensorView& x, const TensorView& out, const Place& place) {
  const Features f = make_features(x, std::nullopt, "x");
  check_device(out, "max_abs", x.device_type, x.device_id);
  call(x, KERNELS(pairwise_distance_max_abs), f, x.dtype(), x.shape[1], array<double>(out, "max_abs", f.rows), place);
}

void norm(const TensorView& x, const OptionalView& factor, const TensorView& out, const Place& place) {
  const Features f = make_features(x, factor, "x");
  check_device(out, "norm", x.device_type, x.device_id);
  call(x, KERNELS(pairwise_distance_norm), f, x.dtype(), x.shape[1], array<double>(out, "norm", f.rows), place);
}

void prepare(const TensorView& x, const OptionalView& factor, const OptionalView& center, const TensorView& out,
             const TensorView& out_norm, const Place& place) {
  const Features f = make_features(x, factor, "x");
  const int64_t D = x.shape[1];
  check_device(out, "out", x.device_type, x.device_id);
  check_device(out_norm, "norm", x.device_type, x.device_id);
  call(x, KERNELS(pairwise_distance_prepare), f, x.dtype(), D, array<double>(center, "center", D),
       array<float>(out, "out", f.rows * D), array<float>(out_norm, "norm", f.rows), place);
}

void block(const TensorView& products, const TensorView& x, const OptionalView& x_factor, const TensorView& y,
           const OptionalView& y_factor, const TensorView& x_norm, const TensorView& y_norm, int metric, double unscale,
           const OptionalView& mirror, const Place& place) {
  const Features left = make_features(x, x_factor, "x"), right = make_features(y, y_factor, "y");
  const int64_t D = x.shape[1], ld = leading_dimension(products, "products");
  check_shape(products, "products", {left.rows, right.rows});
  check_shape(y, "y", {right.rows, D});
  if (mirror) check_shape(*mirror, "mirror", {right.rows, left.rows});
  const int64_t mirror_ld = mirror ? leading_dimension(*mirror, "mirror") : 0;
  check_device(y, "y", x.device_type, x.device_id);
  check_device(products, "products", x.device_type, x.device_id);
  call(x, KERNELS(pairwise_distance_block), products.as<float>(), ld, left, right, x.dtype(), D,
       array<float>(x_norm, "x_norm", left.rows), array<float>(y_norm, "y_norm", right.rows),
       static_cast<Metric>(metric), unscale, mirror ? mirror->as<float>() : nullptr, mirror_ld, place);
}

#ifdef VAREID_WITH_CUDA
void tiled(const TensorView& x_prepared, const TensorView& y_prepared, const TensorView& out, const TensorView& x,
           const OptionalView& x_factor, const TensorView& y, const OptionalView& y_factor, const TensorView& x_norm,
           const TensorView& y_norm, int metric, double unscale, const Place& place) {
  const Features left = make_features(x, x_factor, "x"), right = make_features(y, y_factor, "y");
  const int64_t D = x.shape[1];
  check_shape(y, "y", {right.rows, D});
  check_shape(out, "block", {left.rows, right.rows});
  if (x.device_type != kDeviceCuda) refuse("x", "must be on a GPU");
  check_device(y, "y", x.device_type, x.device_id);
  check_device(out, "block", x.device_type, x.device_id);
  pairwise_distance_tiled_cuda(array<float>(x_prepared, "x_prepared", left.rows * D),
                               array<float>(y_prepared, "y_prepared", right.rows * D), out.as<float>(),
                               leading_dimension(out, "block"), left, right, x.dtype(), D,
                               array<float>(x_norm, "x_norm", left.rows), array<float>(y_norm, "y_norm", right.rows),
                               static_cast<Metric>(metric), unscale, place);
}
#endif

}  // namespace

void bind_pairwise_distance(pybind11::module_& m) {
  using release = pybind11::call_guard<pybind11::gil_scoped_release>;
  m.def("pairwise_distance_max_abs", &max_abs, release());
  m.def("pairwise_distance_norm", &norm, release());
  m.def("pairwise_distance_prepare", &prepare, release());
  m.def("pairwise_distance_block", &block, release());
#ifdef VAREID_WITH_CUDA
  m.def("pairwise_distance_tiled", &tiled, release());
#endif
}

}  // namespace vareid
