#include "nearest_neighbors.h"

#include <optional>
#include <utility>
#include <vector>

#include "bindings.h"
#include "cpu/byte_products.h"
#include "features.h"

namespace vareid {
namespace {

using Arrays = std::vector<Array>;

// norm [rows], window [rows].
Bounds make_bounds(const Arrays& arrays, int64_t rows) {
  if (arrays.size() != 2) refuse("bounds", "must be norm and window");
  return {pointer<float>(arrays[0], "norm", rows), pointer<float>(arrays[1], "window", rows)};
}

// lower [rows, capacity], index [rows, capacity], count, threshold, cut, row_max, crowded.
Candidates make_candidates(const Arrays& arrays, int64_t k) {
  if (arrays.size() != 7 || arrays[0].ndim != 2)
    refuse("candidates", "must be seven arrays, the first [rows, capacity]");
  if (!arrays[6].is_bool() || arrays[6].numel() < arrays[0].shape[0])
    refuse("crowded", "must be bool, one for each row");
  const int64_t rows = arrays[0].shape[0], capacity = arrays[0].shape[1];
  if (capacity <= k || k < 1) refuse("candidates", "must hold more than k");
  return {pointer<float>(arrays[0], "lower", rows * capacity),
          pointer<int32_t>(arrays[1], "index", rows * capacity),
          pointer<int32_t>(arrays[2], "count", rows),
          pointer<float>(arrays[3], "threshold", rows),
          pointer<float>(arrays[4], "cut", rows),
          pointer<float>(arrays[5], "row_max", rows),
          capacity,
          k,
          arrays[6].as<bool>()};
}

// One or two sets of features, each (x, factor), whose rows are numbered together.
struct Sets {
  Features first, second;
  DType dtype;
  int64_t D, rows;
};
Sets make_sets(const std::vector<std::pair<Array, OptionalArray>>& parts, const char* name) {
  if (parts.empty() || parts.size() > 2) refuse(name, "must be one or two sets of features");
  Sets sets{};
  sets.first = make_features(parts[0].first, parts[0].second, name);
  sets.second = sets.first;
  sets.second.rows = 0;
  if (parts.size() == 2) {
    check_shape(parts[1].first, name, {parts[1].first.shape[0], parts[0].first.shape[1]});
    check_same_dtype(parts[1].first, name, parts[0].first, "the first set");
    sets.second = make_features(parts[1].first, parts[1].second, name);
  }
  sets.dtype = parts[0].first.dtype();
  sets.D = parts[0].first.shape[1];
  sets.rows = sets.first.rows + sets.second.rows;
  return sets;
}
using Parts = std::vector<std::pair<Array, OptionalArray>>;

void check_ranges(const Arrays& candidates, int64_t row_begin, int64_t rows, int64_t column_begin, int64_t columns,
                  bool both) {
  const int64_t known = candidates[0].shape[0];
  if (row_begin < 0 || known < row_begin + rows) refuse("row_begin", "is out of range");
  if (column_begin < 0 || (both && known < column_begin + columns)) refuse("column_begin", "is out of range");
}

void scan(const Array& block, int64_t row_begin, int64_t column_begin, const Arrays& left_bounds,
          const Arrays& right_bounds, const Arrays& candidates, int64_t k, bool both, bool write, const Place& place) {
  const int64_t ld = leading_dimension(block, "block"), rows = block.shape[0], columns = block.shape[1];
  const Candidates state = make_candidates(candidates, k);
  check_ranges(candidates, row_begin, rows, column_begin, columns, both);
  if (write && !both) refuse("write", "is of both sides");
  check_device(candidates[0], "candidates", block.device_type, block.device_id);
  call(block, KERNELS(nearest_neighbors_scan), block.as<float>(), ld, rows, columns, row_begin, column_begin,
       make_bounds(left_bounds, row_begin + rows), make_bounds(right_bounds, column_begin + columns), state, both,
       write, place);
}

void select(const Parts& x, const Parts& y, int metric, double unscale, const Arrays& left_bounds,
            const Arrays& right_bounds, const Arrays& candidates, int64_t k, const Array& index,
            const OptionalArray& distance, const Array& unsure, const Array& kth_upper, const Place& place) {
  const Sets left = make_sets(x, "x"), right = make_sets(y, "y");
  const Candidates state = make_candidates(candidates, k);
  if (candidates[0].shape[0] < left.rows) refuse("candidates", "too few rows");
  if (distance) check_shape(*distance, "distance", {left.rows, k});
  if (!unsure.is_byte() || unsure.numel() < left.rows) refuse("unsure", "must be bytes, one for each row");
  check_device(index, "index", x[0].first.device_type, x[0].first.device_id);
  call(index, KERNELS(nearest_neighbors_select), left.first, left.second, right.first, right.second, left.dtype, left.D,
       static_cast<Metric>(metric), unscale, make_bounds(left_bounds, left.rows), make_bounds(right_bounds, right.rows),
       state, pointer<int32_t>(index, "index", left.rows * k), distance ? distance->data : nullptr,
       distance ? distance->dtype() : DType::kFloat32, unsure.as<uint8_t>(),
       pointer<float>(kth_upper, "kth_upper", left.rows), place);
}

void rescan(const Array& block, const Array& rows, const Parts& x, const Parts& y, int metric, double unscale,
            const Arrays& left_bounds, const Arrays& right_bounds, const Array& kth_upper, const OptionalArray& same,
            int64_t k, const Array& index, const OptionalArray& distance, const Array& workspace, const Place& place) {
  const Sets left = make_sets(x, "x"), right = make_sets(y, "y");
  const int64_t ld = leading_dimension(block, "block");
  check_shape(block, "block", {rows.numel(), right.rows});
  if (distance) check_shape(*distance, "distance", {left.rows, k});
  check_device(index, "index", x[0].first.device_type, x[0].first.device_id);
  call(index, KERNELS(nearest_neighbors_rescan), block.as<float>(), ld, pointer<int64_t>(rows, "rows", 0), rows.numel(),
       left.first, left.second, right.first, right.second, left.dtype, left.D, static_cast<Metric>(metric), unscale,
       make_bounds(left_bounds, left.rows), make_bounds(right_bounds, right.rows),
       pointer<float>(kth_upper, "kth_upper", left.rows), pointer<int32_t>(same, "same", right.rows), k,
       pointer<int32_t>(index, "index", left.rows * k), distance ? distance->data : nullptr,
       distance ? distance->dtype() : DType::kFloat32,
       scratch(workspace, place.threads * (right.rows + (right.rows + 1) / 2) * 16, index), place);
}

std::pair<int, int> byte_products_state() {
  const ByteProducts& found = byte_products();
  return {static_cast<int>(found.used), static_cast<int>(found.broken)};
}

void need_byte_products(const Array& array) {
  if (array.device_type != kDeviceCpu || byte_products().used == ByteInstructions::kNone)
    refuse("device", "has no products of 8 bits");
}

void round_rows(const Array& x, const Array& scale, const Array& rounded, const Place& place) {
  need_byte_products(x);
  const int64_t stride = leading_dimension(x, "x"), rows = x.shape[0];
  nearest_neighbors_round_cpu(x.as<float>(), stride, rows, x.shape[1], pointer<float>(scale, "scale", rows),
                              pointer<double>(rounded, "rounded", rows), place);
}

// bytes, scale, sum.
PackedRows make_packed(const Arrays& arrays, int64_t rows, int64_t D) {
  if (arrays.size() != 3) refuse("packed", "must be bytes, scale and sum");
  const int64_t padded = packed_rows(rows);
  return {pointer<uint8_t>(arrays[0], "bytes", padded * packed_elements(D)), pointer<float>(arrays[1], "scale", padded),
          pointer<int32_t>(arrays[2], "sum", padded), rows};
}

void pack(const Array& x, const Array& scale, bool left, const Arrays& out, const Place& place) {
  need_byte_products(x);
  const int64_t stride = leading_dimension(x, "x"), rows = x.shape[0], D = x.shape[1];
  make_packed(out, rows, D);
  nearest_neighbors_pack_cpu(x.as<float>(), stride, rows, D, pointer<float>(scale, "scale", rows), left,
                             out[0].as<uint8_t>(), out[1].as<float>(), out[2].as<int32_t>(), place);
}

// The sets whose pairs are measured, left and right.
using SetsParts = std::pair<Parts, Parts>;
struct MeasuredSets {
  Sets left, right;

  explicit MeasuredSets(const SetsParts& parts)
      : left(make_sets(parts.first, "x")), right(make_sets(parts.second, "y")) {}
  PairSets pairs() const { return {left.first, left.second, right.first, right.second, left.dtype, left.D}; }
};

// The pairs of the largest distances: upper [rows, kFarthest], index [rows, kFarthest], count [rows].
Farthest make_farthest(const Arrays& arrays, int64_t rows) {
  if (arrays.size() != 3) refuse("farthest", "must be three arrays");
  return {pointer<float>(arrays[0], "upper", rows * kFarthest), pointer<int32_t>(arrays[1], "index", rows * kFarthest),
          pointer<int32_t>(arrays[2], "count", rows)};
}

void scan_packed(const Arrays& left, int64_t rows, const Arrays& right, int64_t columns, int64_t D, int64_t row_begin,
                 int64_t column_begin, const Arrays& left_bounds, const Arrays& right_bounds, const Arrays& candidates,
                 int64_t k, bool both, const SetsParts& parts, const std::optional<Arrays>& farthest,
                 const Array& workspace, const Place& place) {
  const Candidates state = make_candidates(candidates, k);
  check_ranges(candidates, row_begin, rows, column_begin, columns, both);
  if (both && row_begin == column_begin && rows != columns) refuse("columns", "must be the rows");
  need_byte_products(candidates[0]);
  const MeasuredSets sets(parts);
  std::optional<Farthest> pairs;
  if (farthest) pairs = make_farthest(*farthest, sets.left.rows);
  nearest_neighbors_scan_packed_cpu(make_packed(left, rows, D), make_packed(right, columns, D), D, row_begin,
                                    column_begin, make_bounds(left_bounds, row_begin + rows),
                                    make_bounds(right_bounds, column_begin + columns), state, both, sets.pairs(),
                                    pairs ? &*pairs : nullptr,
                                    scratch(workspace, place.threads * kPackedScanBytes, candidates[0]), place);
}

void scan_farthest(const Array& block, int64_t row_begin, int64_t column_begin, const Arrays& left_bounds,
                   const Arrays& right_bounds, const Arrays& candidates, int64_t k, bool both, const SetsParts& parts,
                   const Arrays& farthest, const Place& place) {
  const int64_t ld = leading_dimension(block, "block"), rows = block.shape[0], columns = block.shape[1];
  const Candidates state = make_candidates(candidates, k);
  check_ranges(candidates, row_begin, rows, column_begin, columns, both);
  if (block.device_type != kDeviceCpu) refuse("block", "must be on a CPU");
  const MeasuredSets sets(parts);
  nearest_neighbors_scan_farthest_cpu(block.as<float>(), ld, rows, columns, row_begin, column_begin,
                                      make_bounds(left_bounds, row_begin + rows),
                                      make_bounds(right_bounds, column_begin + columns), state, both, sets.pairs(),
                                      make_farthest(farthest, sets.left.rows), place);
}

void scan_written(const Array& x, const Array& y, int64_t row_begin, int64_t column_begin, const Arrays& left_bounds,
                  const Arrays& right_bounds, const Arrays& candidates, int64_t k, const SetsParts& parts,
                  const Arrays& farthest, const Array& out, const Array& panels, const Array& workspace,
                  const Place& place) {
  const int64_t stride = leading_dimension(x, "x"), y_stride = leading_dimension(y, "y");
  const int64_t ld = leading_dimension(out, "out"), rows = x.shape[0], columns = y.shape[0], D = x.shape[1];
  check_shape(y, "y", {columns, D});
  check_shape(out, "out", {rows, columns});
  const Candidates state = make_candidates(candidates, k);
  check_ranges(candidates, row_begin, rows, column_begin, columns, true);
  if (row_begin == column_begin) refuse("column_begin", "is that of the rows");
  need_byte_products(x);
  const MeasuredSets sets(parts);
  nearest_neighbors_scan_written_cpu(x.as<float>(), stride, rows, y.as<float>(), y_stride, columns, D, row_begin,
                                     column_begin, make_bounds(left_bounds, row_begin + rows),
                                     make_bounds(right_bounds, column_begin + columns), state, sets.pairs(),
                                     make_farthest(farthest, sets.left.rows), out.as<float>(), ld,
                                     pointer<float>(panels, "panels", packed_rows(columns) * D),
                                     scratch(workspace, place.threads * kPackedScanBytes, x), place);
}

void farthest(const SetsParts& parts, const Arrays& farthest, const Array& row_max, const Place& place) {
  const MeasuredSets sets(parts);
  nearest_neighbors_farthest_cpu(sets.pairs(), make_farthest(farthest, sets.left.rows),
                                 pointer<float>(row_max, "row_max", sets.left.rows), place);
}

}  // namespace

void bind_nearest_neighbors(pybind11::module_& m) {
  using release = pybind11::call_guard<pybind11::gil_scoped_release>;
  m.def("nearest_neighbors_scan", &scan, release());
  m.def("nearest_neighbors_select", &select, release());
  m.def("nearest_neighbors_rescan", &rescan, release());
  m.def("byte_products", &byte_products_state, release());
  m.def("packed_elements", &packed_elements, release());
  m.def("nearest_neighbors_round", &round_rows, release());
  m.def("nearest_neighbors_pack", &pack, release());
  m.def("nearest_neighbors_scan_packed", &scan_packed, release());
  m.def("nearest_neighbors_scan_farthest", &scan_farthest, release());
  m.def("nearest_neighbors_scan_written", &scan_written, release());
  m.def("nearest_neighbors_farthest", &farthest, release());
  m.attr("packed_scan_bytes") = kPackedScanBytes;
}

}  // namespace vareid
