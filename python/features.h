// Features as the bindings of the retrieval ops take them: a matrix with contiguous rows and an optional factor per
// row.
#pragma once

#include "pairwise_distance.h"
#include "tensor_view.h"

namespace vareid {

using OptionalView = std::optional<TensorView>;

inline Features make_features(const TensorView& x, const OptionalView& factor, const char* name) {
  if (x.ndim != 2) refuse(name, "shape " + shape_text(x) + ", expected [rows, D]");
  check_float(x, name);
  if (x.shape[0] > 1 && x.shape[1] > 1 && x.strides[1] != 1) refuse(name, "must have contiguous rows");
  if (factor) {
    check_shape(*factor, "factor", {x.shape[0]});
    if (factor->type_code != 2 || factor->type_bits != 64) refuse("factor", "must be float64");
    check_contiguous(*factor, "factor");
    check_device(*factor, "factor", x.device_type, x.device_id);
  }
  return {x.data, factor ? factor->as<double>() : nullptr, x.shape[0], x.strides[0]};
}

// Throws unless the array is where this build has kernels and on the device of the other arrays' leader.
inline void check_usable(const TensorView& leader, const char* name) {
#ifdef VAREID_WITH_CUDA
  if (leader.device_type == kDeviceCpu || leader.device_type == kDeviceCuda) return;
  refuse(name, "is on a device without kernels");
#else
  if (leader.device_type != kDeviceCpu) refuse(name, "is on a GPU, but this build has no CUDA kernels");
#endif
}

inline bool on_gpu(const TensorView& leader, const char* name) {
  check_usable(leader, name);
  return leader.device_type == kDeviceCuda;
}

// The leading dimension of a float32 matrix whose rows are contiguous.
inline int64_t leading_dimension(const TensorView& block, const char* name) {
  if (block.ndim != 2) refuse(name, "shape " + shape_text(block) + ", expected two dimensions");
  check_float32(block, name);
  if (block.shape[1] > 1 && block.strides[1] != 1) refuse(name, "must have contiguous rows");
  return block.strides[0];
}

// A contiguous array of one type and at least `size` elements; null pointers for None.
template <typename T>
T* array(const TensorView& view, const char* name, int64_t size) {
  const bool fits = sizeof(T) == view.type_bits / 8 && (std::is_floating_point<T>::value == (view.type_code == 2));
  if (!fits) refuse(name, "has another element type");
  if (view.numel() < size) refuse(name, "shape " + shape_text(view) + ", too few elements");
  check_contiguous(view, name);
  return view.as<T>();
}
template <typename T>
T* array(const OptionalView& view, const char* name, int64_t size) {
  return view ? array<T>(*view, name, size) : nullptr;
}

}  // namespace vareid
