#include "pairwise_distance.h"

#include "bindings.h"
#include "features.h"

namespace vareid {
namespace {

void max_abs(const Array& x, const Array& out, const Place& place) {
  const Features f = make_features(x, std::nullopt, "x");
  check_device(out, "max_abs", x.device_type, x.device_id);
  call(x, KERNELS(pairwise_distance_max_abs), f, x.dtype(), x.shape[1], pointer<double>(out, "max_abs", f.rows), place);
}

void norm(const Array& x, const OptionalArray& factor, const Array& out, const Place& place) {
  const Features f = make_features(x, factor, "x");
  check_device(out, "norm", x.device_type, x.device_id);
  call(x, KERNELS(pairwise_distance_norm), f, x.dtype(), x.shape[1], pointer<double>(out, "norm", f.rows), place);
}

void prepare(const Array& x, const OptionalArray& factor, const OptionalArray& center, const Array& out,
             const Array& out_norm, const Place& place) {
  const Features f = make_features(x, factor, "x");
  const int64_t D = x.shape[1];
  check_device(out, "out", x.device_type, x.device_id);
  check_device(out_norm, "norm", x.device_type, x.device_id);
  call(x, KERNELS(pairwise_distance_prepare), f, x.dtype(), D, pointer<double>(center, "center", D),
       pointer<float>(out, "out", f.rows * D), pointer<float>(out_norm, "norm", f.rows), place);
}

void block(const Array& products, const Array& x, const OptionalArray& x_factor, const Array& y,
           const OptionalArray& y_factor, const Array& x_norm, const Array& y_norm, int metric, double unscale,
           const OptionalArray& mirror, const Place& place) {
  const Features left = make_features(x, x_factor, "x"), right = make_features(y, y_factor, "y");
  const int64_t D = x.shape[1], ld = leading_dimension(products, "products");
  check_shape(products, "products", {left.rows, right.rows});
  check_shape(y, "y", {right.rows, D});
  if (mirror) check_shape(*mirror, "mirror", {right.rows, left.rows});
  const int64_t mirror_ld = mirror ? leading_dimension(*mirror, "mirror") : 0;
  check_device(y, "y", x.device_type, x.device_id);
  check_device(products, "products", x.device_type, x.device_id);
  call(x, KERNELS(pairwise_distance_block), products.as<float>(), ld, left, right, x.dtype(), D,
       pointer<float>(x_norm, "x_norm", left.rows), pointer<float>(y_norm, "y_norm", right.rows),
       static_cast<Metric>(metric), unscale, mirror ? mirror->as<float>() : nullptr, mirror_ld, place);
}

void strips(const Array& x_prepared, const Array& y_prepared, const Array& out, const Array& x,
            const OptionalArray& x_factor, const Array& y, const OptionalArray& y_factor, const Array& x_norm,
            const Array& y_norm, int metric, double unscale, const Array& workspace, const Place& place) {
  const Features left = make_features(x, x_factor, "x"), right = make_features(y, y_factor, "y");
  const int64_t D = x.shape[1], bytes = pairwise_distance_strip_bytes_cpu(D);
  check_shape(y, "y", {right.rows, D});
  check_shape(x_prepared, "x_prepared", {left.rows, D});
  check_shape(y_prepared, "y_prepared", {right.rows, D});
  check_shape(out, "block", {left.rows, right.rows});
  if (x.device_type != kDeviceCpu || bytes == 0) refuse("x", "must be on a CPU with AVX-512");
  pairwise_distance_strips_cpu(
      x_prepared.as<float>(), leading_dimension(x_prepared, "x_prepared"), y_prepared.as<float>(),
      leading_dimension(y_prepared, "y_prepared"), out.as<float>(), leading_dimension(out, "block"), left, right,
      x.dtype(), D, pointer<float>(x_norm, "x_norm", left.rows), pointer<float>(y_norm, "y_norm", right.rows),
      static_cast<Metric>(metric), unscale, scratch(workspace, place.threads * bytes, x), place);
}

#ifdef VAREID_WITH_CUDA
void tiled(const Array& x_prepared, const Array& y_prepared, const Array& out, const Array& x,
           const OptionalArray& x_factor, const Array& y, const OptionalArray& y_factor, const Array& x_norm,
           const Array& y_norm, int metric, double unscale, const Place& place) {
  const Features left = make_features(x, x_factor, "x"), right = make_features(y, y_factor, "y");
  const int64_t D = x.shape[1];
  check_shape(y, "y", {right.rows, D});
  check_shape(out, "block", {left.rows, right.rows});
  if (x.device_type != kDeviceCuda) refuse("x", "must be on a GPU");
  check_device(y, "y", x.device_type, x.device_id);
  check_device(out, "block", x.device_type, x.device_id);
  pairwise_distance_tiled_cuda(
      pointer<float>(x_prepared, "x_prepared", left.rows * D), pointer<float>(y_prepared, "y_prepared", right.rows * D),
      out.as<float>(), leading_dimension(out, "block"), left, right, x.dtype(), D,
      pointer<float>(x_norm, "x_norm", left.rows), pointer<float>(y_norm, "y_norm", right.rows),
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
  m.def("pairwise_distance_strips", &strips, release());
  m.def("pairwise_distance_strip_bytes", &pairwise_distance_strip_bytes_cpu);
#ifdef VAREID_WITH_CUDA
  m.def("pairwise_distance_tiled", &tiled, release());
#endif
}

}  // namespace vareid
