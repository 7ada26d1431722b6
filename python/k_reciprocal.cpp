#include "k_reciprocal.h"

#include <algorithm>

#include "bindings.h"
#include "features.h"

namespace vareid {
namespace {

int64_t width_of(const TensorView& neighbor) {
  if (neighbor.ndim != 2) refuse("neighbor", "shape " + shape_text(neighbor) + ", expected [rows, width]");
  return neighbor.shape[1];
}

void reciprocal(const TensorView& neighbor, int64_t k, const TensorView& out, const TensorView& size,
                const Place& place) {
  const int64_t rows = neighbor.shape[0], width = width_of(neighbor);
  call(neighbor, KERNELS(k_reciprocal_sets), array<int32_t>(neighbor, "neighbor", 0), rows, width, k,
       array<int32_t>(out, "reciprocal", rows * std::min(k + 1, width)), array<int32_t>(size, "size", rows), place);
}

void robust(const TensorView& sets, const TensorView& size, const TensorView& half, const TensorView& half_size,
            const TensorView& indptr, const OptionalView& index, const TensorView& workspace, const Place& place) {
  const int64_t rows = sets.shape[0];
  call(sets, KERNELS(k_reciprocal_robust_sets), array<int32_t>(sets, "reciprocal", 0),
       array<int32_t>(size, "size", rows), width_of(sets), array<int32_t>(half, "half", 0),
       array<int32_t>(half_size, "half_size", rows), width_of(half), rows, array<int64_t>(indptr, "indptr", rows + 1),
       array<int32_t>(index, "index", 0), scratch(workspace, 8 * rows * place.threads, sets), place);
}

void listed(const TensorView& x, const OptionalView& x_factor, const TensorView& y, const OptionalView& y_factor,
            const TensorView& neighbor, const TensorView& neighbor_distance, const TensorView& indptr,
            const TensorView& index, const TensorView& out, const Place& place) {
  const Features left = make_features(x, x_factor, "x"), right = make_features(y, y_factor, "y");
  const int64_t rows = left.rows + right.rows, width = width_of(neighbor);
  call(x, KERNELS(k_reciprocal_listed_distance), left, right, x.dtype(), x.shape[1],
       array<int32_t>(neighbor, "neighbor", rows * width),
       array<float>(neighbor_distance, "neighbor_distance", rows * width), width,
       array<int64_t>(indptr, "indptr", rows + 1), array<int32_t>(index, "index", 0),
       array<float>(out, "out", index.numel()), place);
}

void encode(const TensorView& indptr, const TensorView& distance, const TensorView& row_max, const TensorView& value,
            const Place& place) {
  const int64_t rows = indptr.numel() - 1;
  call(distance, KERNELS(k_reciprocal_encode), array<int64_t>(indptr, "indptr", 1),
       array<float>(distance, "distance", 0), array<float>(row_max, "row_max", rows), rows,
       array<float>(value, "value", distance.numel()), place);
}

void expansion(const TensorView& neighbor, int64_t k2, const TensorView& indptr, const TensorView& index,
               const TensorView& value, const TensorView& new_indptr, const OptionalView& new_index,
               const OptionalView& new_value, const TensorView& workspace, const Place& place) {
  const int64_t rows = neighbor.shape[0];
  call(neighbor, KERNELS(k_reciprocal_query_expansion), array<int32_t>(neighbor, "neighbor", 0), rows,
       width_of(neighbor), k2, array<int64_t>(indptr, "indptr", rows + 1), array<int32_t>(index, "index", 0),
       array<float>(value, "value", index.numel()), array<int64_t>(new_indptr, "new_indptr", rows + 1),
       array<int32_t>(new_index, "new_index", 0), array<float>(new_value, "new_value", 0),
       scratch(workspace, 16 * rows * place.threads, neighbor), place);
}

void invert(const TensorView& indptr, const TensorView& index, const TensorView& value, int64_t first, int64_t columns,
            const TensorView& start, const TensorView& owner, const TensorView& weight, const TensorView& workspace,
            const Place& place) {
  const int64_t entries = owner.numel();
  const int64_t needed = index.device_type == kDeviceCpu ? 8 * columns : k_reciprocal_invert_workspace_cuda(entries);
  if (!workspace.is_byte() || workspace.numel() < needed) refuse("workspace", "is too small");
  call(index, KERNELS(k_reciprocal_invert), array<int64_t>(indptr, "indptr", 1), array<int32_t>(index, "index", 0),
       array<float>(value, "value", 0), indptr.numel() - 1, first, columns, entries,
       array<int64_t>(start, "start", columns + 1), array<int32_t>(owner, "owner", 0),
       array<float>(weight, "weight", entries), workspace.data, place);
}

void blend(const TensorView& distance, const TensorView& row_max, const TensorView& indptr, const TensorView& index,
           const TensorView& value, const TensorView& start, const TensorView& owner, const TensorView& weight,
           double lambda_value, const TensorView& workspace, const Place& place) {
  const int64_t ld = leading_dimension(distance, "distance");
  const int64_t queries = distance.shape[0], gallery = distance.shape[1];
  call(distance, KERNELS(k_reciprocal_blend), distance.as<float>(), ld, queries, gallery,
       array<float>(row_max, "row_max", queries), array<int64_t>(indptr, "indptr", queries + 1),
       array<int32_t>(index, "index", 0), array<float>(value, "value", index.numel()),
       array<int64_t>(start, "start", 1), array<int32_t>(owner, "owner", 0),
       array<float>(weight, "weight", owner.numel()), lambda_value,
       scratch(workspace, 4 * gallery * place.threads, distance), place);
}

void matrix_neighbors(const TensorView& q_g, const TensorView& q_q, const TensorView& g_g, int64_t k,
                      const TensorView& neighbor, const TensorView& row_max, const TensorView& workspace,
                      const Place& place) {
  if (q_g.ndim != 2) refuse("q_g_dist", "shape " + shape_text(q_g) + ", expected [Q, G]");
  const int64_t Q = q_g.shape[0], G = q_g.shape[1];
  check_shape(q_q, "q_q_dist", {Q, Q});
  check_shape(g_g, "g_g_dist", {G, G});
  for (const TensorView* const matrix : {&q_g, &q_q, &g_g}) {
    check_float(*matrix, "distances");
    check_contiguous(*matrix, "distances");
    check_same_dtype(*matrix, "distances", q_g, "q_g_dist");
  }
  if (k < 1 || k > Q + G) refuse("k", "is out of range");
  call(q_g, KERNELS(k_reciprocal_matrix_neighbors), q_g.data, q_q.data, g_g.data, q_g.dtype(), Q, G, k,
       array<int32_t>(neighbor, "neighbor", (Q + G) * k), array<double>(row_max, "row_max", Q + G),
       scratch(workspace, (128 * Q + 32 * k + 1024) * place.threads, q_g), place);
}

void topk(const TensorView& query, const OptionalView& query_factor, const TensorView& gallery,
          const OptionalView& gallery_factor, const TensorView& nearest, const TensorView& original,
          const TensorView& row_max, const TensorView& indptr, const TensorView& index, const TensorView& value,
          const TensorView& start, const TensorView& owner, const TensorView& weight, double lambda_value,
          const TensorView& distance, const TensorView& gallery_index, const TensorView& workspace,
          const Place& place) {
  const Features left = make_features(query, query_factor, "query");
  const Features right = make_features(gallery, gallery_factor, "gallery");
  const int64_t Q = left.rows, G = right.rows, listed = width_of(nearest), k = width_of(distance);
  check_shape(gallery, "gallery", {G, query.shape[1]});
  if (k < 1 || k > listed || listed > G) refuse("nearest", "must list between k and G rows");
  call(query, KERNELS(k_reciprocal_topk), left, right, query.dtype(), query.shape[1],
       array<int32_t>(nearest, "nearest", Q * listed), array<float>(original, "original", Q * listed), listed,
       array<float>(row_max, "row_max", Q), array<int64_t>(indptr, "indptr", Q + 1), array<int32_t>(index, "index", 0),
       array<float>(value, "value", index.numel()), array<int64_t>(start, "start", 1),
       array<int32_t>(owner, "owner", 0), array<float>(weight, "weight", owner.numel()), lambda_value, k,
       array<float>(distance, "distance", Q * k), array<int64_t>(gallery_index, "gallery_index", Q * k),
       scratch(workspace, 24 * G * place.threads, query), place);
}

}  // namespace

void bind_k_reciprocal(pybind11::module_& m) {
  using release = pybind11::call_guard<pybind11::gil_scoped_release>;
  m.def("k_reciprocal_sets", &reciprocal, release());
  m.def("k_reciprocal_robust_sets", &robust, release());
  m.def("k_reciprocal_listed_distance", &listed, release());
  m.def("k_reciprocal_encode", &encode, release());
  m.def("k_reciprocal_query_expansion", &expansion, release());
  m.def("k_reciprocal_invert", &invert, release());
  m.def("k_reciprocal_blend", &blend, release());
  m.def("k_reciprocal_topk", &topk, release());
  m.def("k_reciprocal_matrix_neighbors", &matrix_neighbors, release());
}

}  // namespace vareid
