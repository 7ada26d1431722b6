#include "angular_center.h"

#include "array.h"
#include "bindings.h"

namespace vareid {
namespace {

struct Sizes {
  int64_t K, V, D;
};

Sizes check(const Array& W, const Array& U, const OptionalArray& mask, const Array& cosine, const Array& identity_norm,
            const Array& viewpoint_norm) {
  if (W.ndim != 2) refuse("identity_centers", "shape " + shape_text(W) + ", expected [K, D]");
  if (U.ndim != 3) refuse("viewpoint_centers", "shape " + shape_text(U) + ", expected [K, V, D]");
  const Sizes sizes{W.shape[0], U.shape[1], W.shape[1]};
  check_float(W, "identity_centers");
  check_shape(U, "viewpoint_centers", {sizes.K, sizes.V, sizes.D});
  check_same_dtype(U, "viewpoint_centers", W, "identity_centers");
  check_shape(cosine, "cosine", {sizes.K, sizes.V});
  check_shape(identity_norm, "identity_norm", {sizes.K});
  check_shape(viewpoint_norm, "viewpoint_norm", {sizes.K, sizes.V});
  if (mask) {
    check_shape(*mask, "mask", {sizes.K, sizes.V});
    if (!mask->is_bool()) refuse("mask", "must be bool");
    check_contiguous(*mask, "mask");
  }
  const Array* const arrays[] = {&W, &U, &cosine, &identity_norm, &viewpoint_norm};
  const char* const names[] = {"identity_centers", "viewpoint_centers", "cosine", "identity_norm", "viewpoint_norm"};
  for (int i = 0; i < 5; ++i) {
    check_contiguous(*arrays[i], names[i]);
    check_device(*arrays[i], names[i], W.device_type, W.device_id);
    if (i >= 2) check_accumulator(*arrays[i], names[i], W);
  }
  return sizes;
}

void forward(const Array& W, const Array& U, const OptionalArray& mask, const Array& loss, const Array& cosine,
             const Array& identity_norm, const Array& viewpoint_norm, const Place& place) {
  const Sizes s = check(W, U, mask, cosine, identity_norm, viewpoint_norm);
  check_accumulator(loss, "loss", W);
  const uint8_t* const exists = mask ? mask->as<uint8_t>() : nullptr;
  call(W, KERNELS(angular_center_forward), W.data, U.data, exists, loss.data, cosine.data, identity_norm.data,
       viewpoint_norm.data, W.dtype(), s.K, s.V, s.D, place);
}

void backward(const Array& upstream, const Array& W, const Array& U, const OptionalArray& mask, const Array& cosine,
              const Array& identity_norm, const Array& viewpoint_norm, const OptionalArray& grad_W,
              const OptionalArray& grad_U, const Place& place) {
  const Sizes s = check(W, U, mask, cosine, identity_norm, viewpoint_norm);
  check_accumulator(upstream, "upstream", W);
  if (grad_W) {
    check_shape(*grad_W, "grad_W", {s.K, s.D});
    check_same_dtype(*grad_W, "grad_W", W, "identity_centers");
    check_contiguous(*grad_W, "grad_W");
  }
  if (grad_U) {
    check_shape(*grad_U, "grad_U", {s.K, s.V, s.D});
    check_same_dtype(*grad_U, "grad_U", W, "identity_centers");
    check_contiguous(*grad_U, "grad_U");
  }
  const uint8_t* const exists = mask ? mask->as<uint8_t>() : nullptr;
  void* const w_out = grad_W ? grad_W->data : nullptr;
  void* const u_out = grad_U ? grad_U->data : nullptr;
  call(W, KERNELS(angular_center_backward), upstream.data, W.data, U.data, exists, cosine.data, identity_norm.data,
       viewpoint_norm.data, w_out, u_out, W.dtype(), s.K, s.V, s.D, place);
}

}  // namespace

void bind_angular_center(pybind11::module_& m) {
  using release = pybind11::call_guard<pybind11::gil_scoped_release>;
  m.def("angular_center_forward", &forward, release());
  m.def("angular_center_backward", &backward, release());
}

}  // namespace vareid
