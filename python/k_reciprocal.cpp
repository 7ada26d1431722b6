#include "k_reciprocal.h"

#include <algorithm>

#include "bindings.h"
#include "features.h"

namespace vareid {
namespace {

int64_t width_of(const Array& neighbor) {
  if (neighbor.ndim != 2) refuse("neighbor", "shape " + shape_text(neighbor) + ", expected [rows, width]");
  return neighbor.shape[1];
}

void reciprocal(const Array& neighbor, int64_t k, const Array& out, const Array& size, const Place& place) {
  const int64_t rows = neighbor.shape[0], width = width_of(neighbor);
  call(neighbor, KERNELS(k_reciprocal_sets), pointer<int32_t>(neighbor, "neighbor", 0), rows, width, k,
       pointer<int32_t>(out, "reciprocal", rows * std::min(k + 1, width)), pointer<int32_t>(size, "size", rows), place);
}

void robust(const Array& sets, const Array& size, const Array& half, const Array& half_size, const Array& indptr,
            const OptionalArray& index, const Array& workspace, const Place& place) {
  const int64_t rows = sets.shape[0];
  call(sets, KERNELS(k_reciprocal_robust_sets), pointer<int32_t>(sets, "reciprocal", 0),
       pointer<int32_t>(size, "size", rows), width_of(sets), pointer<int32_t>(half, "half", 0),
       pointer<int32_t>(half_size, "half_size", rows), width_of(half), rows,
       pointer<int64_t>(indptr, "indptr", rows + 1), pointer<int32_t>(index, "index", 0),
       scratch(workspace, 8 * rows * place.threads, sets), place);
}

void listed(const Array& x, const OptionalArray& x_factor, const Array& y, const OptionalArray& y_factor,
            const Array& neighbor, const Array& neighbor_distance, const Array& indptr, const Array& index,
            const Array& out, const Place& place) {
  const Features left = make_features(x, x_factor, "x"), right = make_features(y, y_factor, "y");
  const int64_t rows = left.rows + right.rows, width = width_of(neighbor);
  call(x, KERNELS(k_reciprocal_listed_distance), left, right, x.dtype(), x.shape[1],
       pointer<int32_t>(neighbor, "neighbor", rows * width),
       pointer<float>(neighbor_distance, "neighbor_distance", rows * width), width,
       pointer<int64_t>(indptr, "indptr", rows + 1), pointer<int32_t>(index, "index", 0),
       pointer<float>(out, "out", index.numel()), place);
}

void encode(const Array& indptr, const Array& distance, const Array& row_max, const Array& value, const Place& place) {
  const int64_t rows = indptr.numel() - 1;
  call(distance, KERNELS(k_reciprocal_encode), pointer<int64_t>(indptr, "indptr", 1),
       pointer<float>(distance, "distance", 0), pointer<float>(row_max, "row_max", rows), rows,
       pointer<float>(value, "value", distance.numel()), place);
}

void expansion(const Array& neighbor, int64_t k2, const Array& indptr, const Array& index, const Array& value,
               const Array& new_indptr, const OptionalArray& new_index, const OptionalArray& new_value,
               const Array& workspace, const Place& place) {
  const int64_t rows = neighbor.shape[0];
  call(neighbor, KERNELS(k_reciprocal_query_expansion), pointer<int32_t>(neighbor, "neighbor", 0), rows,
       width_of(neighbor), k2, pointer<int64_t>(indptr, "indptr", rows + 1), pointer<int32_t>(index, "index", 0),
       pointer<float>(value, "value", index.numel()), pointer<int64_t>(new_indptr, "new_indptr", rows + 1),
       pointer<int32_t>(new_index, "new_index", 0), pointer<float>(new_value, "new_value", 0),
       scratch(workspace, 16 * rows * place.threads, neighbor), place);
}

void invert(const Array& indptr, const Array& index, const Array& value, int64_t first, int64_t columns,
            const Array& start, const Array& owner, const Array& weight, const Array& workspace, const Place& place) {
  const int64_t entries = owner.numel();
  const int64_t needed = index.device_type == kDeviceCpu ? 8 * columns : k_reciprocal_invert_workspace_cuda(entries);
  if (!workspace.is_byte() || workspace.numel() < needed) refuse("workspace", "is too small");
  call(index, KERNELS(k_reciprocal_invert), pointer<int64_t>(indptr, "indptr", 1), pointer<int32_t>(index, "index", 0),
       pointer<float>(value, "value", 0), indptr.numel() - 1, first, columns, entries,
       pointer<int64_t>(start, "start", columns + 1), pointer<int32_t>(owner, "owner", 0),
       pointer<float>(weight, "weight", entries), workspace.data, place);
}

void blend(const Array& distance, const Array& row_max, const Array& indptr, const Array& index, const Array& value,
           const Array& start, const Array& owner, const Array& weight, double lambda_value, const Array& workspace,
           const Place& place) {
  const int64_t ld = leading_dimension(distance, "distance");
  const int64_t queries = distance.shape[0], gallery = distance.shape[1];
  call(distance, KERNELS(k_reciprocal_blend), distance.as<float>(), ld, queries, gallery,
       pointer<float>(row_max, "row_max", queries), pointer<int64_t>(indptr, "indptr", queries + 1),
       pointer<int32_t>(index, "index", 0), pointer<float>(value, "value", index.numel()),
       pointer<int64_t>(start, "start", 1), pointer<int32_t>(owner, "owner", 0),
       pointer<float>(weight, "weight", owner.numel()), lambda_value,
       scratch(workspace, 4 * gallery * place.threads, distance), place);
}

void matrix_neighbors(const Array& q_g, const Array& q_q, const Array& g_g, int64_t k, const Array& neighbor,
                      const Array& row_max, const Array& workspace, const Place& place) {
  if (q_g.ndim != 2) refuse("q_g_dist", "shape " + shape_text(q_g) + ", expected [Q, G]");
  const int64_t Q = q_g.shape[0], G = q_g.shape[1];
  check_shape(q_q, "q_q_dist", {Q, Q});
  check_shape(g_g, "g_g_dist", {G, G});
  for (const Array* const matrix : {&q_g, &q_q, &g_g}) {
    check_float(*matrix, "distances");
    check_contiguous(*matrix, "distances");
    check_same_dtype(*matrix, "distances", q_g, "q_g_dist");
  }
  if (k < 1 || k > Q + G) refuse("k", "is out of range");
  call(q_g, KERNELS(k_reciprocal_matrix_neighbors), q_g.data, q_q.data, g_g.data, q_g.dtype(), Q, G, k,
       pointer<int32_t>(neighbor, "neighbor", (Q + G) * k), pointer<double>(row_max, "row_max", Q + G),
       scratch(workspace, (128 * Q + 32 * k + 1024) * place.threads, q_g), place);
}

void topk(const Array& query, const OptionalArray& query_factor, const Array& gallery,
          const OptionalArray& gallery_factor, const Array& nearest, const Array& original, const Array& row_max,
          const Array& indptr, const Array& index, const Array& value, const Array& start, const Array& owner,
          const Array& weight, double lambda_value, const Array& distance, const Array& gallery_index,
          const Array& workspace, const Place& place) {
  const Features left = make_features(query, query_factor, "query");
  const Features right = make_features(gallery, gallery_factor, "gallery");
  const int64_t Q = left.rows, G = right.rows, listed = width_of(nearest), k = width_of(distance);
  check_shape(gallery, "gallery", {G, query.shape[1]});
  if (k < 1 || k > listed || listed > G) refuse("nearest", "must list between k and G rows");
  call(query, KERNELS(k_reciprocal_topk), left, right, query.dtype(), query.shape[1],
       pointer<int32_t>(nearest, "nearest", Q * listed), pointer<float>(original, "original", Q * listed), listed,
       pointer<float>(row_max, "row_max", Q), pointer<int64_t>(indptr, "indptr", Q + 1),
       pointer<int32_t>(index, "index", 0), pointer<float>(value, "value", index.numel()),
       pointer<int64_t>(start, "start", 1), pointer<int32_t>(owner, "owner", 0),
       pointer<float>(weight, "weight", owner.numel()), lambda_value, k, pointer<float>(distance, "distance", Q * k),
       pointer<int64_t>(gallery_index, "gallery_index", Q * k), scratch(workspace, 24 * G * place.threads, query),
       place);
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
