#include "ranking.h"

#include "bindings.h"
#include "tensor_view.h"

namespace vareid {
namespace {

using Optional = std::optional<TensorView>;

void check_labels(const TensorView& view, const char* name, int64_t size, const TensorView& distances) {
  check_shape(view, name, {size});
  check_int64(view, name);
  check_contiguous(view, name);
  check_device(view, name, distances.device_type, distances.device_id);
}

void forward(const TensorView& distances, const TensorView& gallery_order, const TensorView& group_begin,
             const TensorView& group_end, const Optional& junk, const Optional& query_camera,
             const Optional& gallery_camera, const TensorView& average_precision,
             const TensorView& inverse_negative_penalty, const TensorView& first_match_rank,
             const TensorView& num_matches, const Optional& workspace, int64_t max_group, int threads,
             uintptr_t stream) {
  if (distances.ndim != 2) refuse("distances", "shape " + shape_text(distances) + ", expected [Q, G]");
  check_float(distances, "distances");
  const int64_t Q = distances.shape[0], G = distances.shape[1];
  if (G > INT32_MAX) refuse("distances", "has more than 2^31 - 1 columns");
  if (G > 1 && distances.strides[1] != 1) refuse("distances", "must have contiguous rows");
  check_labels(gallery_order, "gallery_order", G, distances);
  check_labels(group_begin, "group_begin", Q, distances);
  check_labels(group_end, "group_end", Q, distances);
  if (junk) {
    check_shape(*junk, "junk", {G});
    if (!junk->is_bool()) refuse("junk", "must be bool");
    check_contiguous(*junk, "junk");
    check_device(*junk, "junk", distances.device_type, distances.device_id);
  }
  if (query_camera.has_value() != gallery_camera.has_value()) refuse("query_camera", "both or neither camera array");
  if (query_camera) check_labels(*query_camera, "query_camera", Q, distances);
  if (gallery_camera) check_labels(*gallery_camera, "gallery_camera", G, distances);
  check_labels(first_match_rank, "first_match_rank", Q, distances);
  check_labels(num_matches, "num_matches", Q, distances);
  for (const TensorView* const view : {&average_precision, &inverse_negative_penalty}) {
    check_shape(*view, "average_precision", {Q});
    check_contiguous(*view, "average_precision");
    check_device(*view, "average_precision", distances.device_type, distances.device_id);
    if (view->type_code != 2 || view->type_bits != 64) refuse("average_precision", "must be float64");
  }
  const int64_t* const query_cameras = query_camera ? query_camera->as<int64_t>() : nullptr;
  const int64_t* const gallery_cameras = gallery_camera ? gallery_camera->as<int64_t>() : nullptr;
  const uint8_t* const left_out = junk ? junk->as<uint8_t>() : nullptr;
  if (distances.device_type == kDeviceCpu) {
    if (!workspace || !workspace->contiguous || !workspace->is_byte() ||
        workspace->numel() < ranking_workspace_bytes_cpu(max_group, threads))
      refuse("workspace", "is smaller than ranking_workspace_bytes says");
    ranking_forward_cpu(distances.data, distances.strides[0], gallery_order.as<int64_t>(), group_begin.as<int64_t>(),
                        group_end.as<int64_t>(), left_out, query_cameras, gallery_cameras,
                        average_precision.as<double>(), inverse_negative_penalty.as<double>(),
                        first_match_rank.as<int64_t>(), num_matches.as<int64_t>(), workspace->data, distances.dtype(),
                        Q, G, max_group, threads);
    return;
  }
#ifdef VAREID_WITH_CUDA
  ranking_forward_cuda(distances.data, distances.strides[0], gallery_order.as<int64_t>(), group_begin.as<int64_t>(),
                       group_end.as<int64_t>(), left_out, query_cameras, gallery_cameras,
                       average_precision.as<double>(), inverse_negative_penalty.as<double>(),
                       first_match_rank.as<int64_t>(), num_matches.as<int64_t>(), distances.dtype(), Q, G,
                       distances.device_id, reinterpret_cast<void*>(stream));
#else
  (void)stream;
  refuse("distances", "is on a GPU, but this build has no CUDA kernels");
#endif
}

}  // namespace

void bind_ranking(pybind11::module_& m) {
  m.def("ranking_workspace_bytes", &ranking_workspace_bytes_cpu);
  m.def("ranking_forward", &forward, pybind11::call_guard<pybind11::gil_scoped_release>());
}

}  // namespace vareid
