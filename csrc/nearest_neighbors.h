// Exact nearest neighbours from blocks of float32 products: the definition is in
// vareid_ext/reference/nearest_neighbors.py, the notation in pairwise_distance.h.
//
// The product only filters; the order and the distances are float64 sums of the given features. With n_i = |p_i|^2 the
// caller gives `window` w_i such that |n_i + n_j - 2 fl(p_i . p_j) - |z_i - z_j|^2| <= w_i + w_j for all i, j (the
// proof of the window stands in vareid_ext/ops/_filter.py). So lower_ij = n_i - w_i + n_j - w_j - 2 fl(p_i . p_j) is no
// more than the distance, and upper_ij = lower_ij + 2 (w_i + w_j) no less. A candidate whose lower bound exceeds the
// k-th smallest upper bound of its row is not among the k nearest. All others are kept, up to `capacity`; where they
// were more, `cut` is the smallest lower bound that may have been lost, and a row whose k-th upper bound reaches it is
// to be done again by nearest_neighbors_rescan.
#pragma once

#include <cstdint>

#include "dtype.h"
#include "pairwise_distance.h"

namespace vareid {

// What is known of each row while the blocks go by. All arrays are indexed by row.
struct Candidates {
  float* lower;      // [rows, capacity]
  int32_t* index;    // [rows, capacity]; on a CPU ~j of a measured one: lower is the float below its distance
  int32_t* count;    // starts at 0
  float* threshold;  // lower bounds above it are not kept; starts at +Inf
  float* cut;        // starts at +Inf
  float* row_max;    // the largest distance seen, in the products' unit; starts at 0
  int64_t capacity;  // at least k + 1
  int64_t k;
  bool* crowded = nullptr;  // on a CPU, of the rows that had candidates measured for want of places; starts at false
};

// Norms and windows of the rows that the block's rows or columns are, from the block's first on.
struct Bounds {
  const float* norm;
  const float* window;
};

// Looks at a block of products [rows, columns], rows row_begin.. of the left set against rows column_begin.. of the
// right one. The candidates receive those of the block's rows and, with `both`, of its columns (a set against itself:
// every block serves both). They are indexed from the first row of their set, as are the bounds. With write, of both
// sides only, the products are replaced by distances, clamped at 0.
using NearestNeighborsScan = void(float* block, int64_t ld, int64_t rows, int64_t columns, int64_t row_begin,
                                  int64_t column_begin, const Bounds& left_bounds, const Bounds& right_bounds,
                                  const Candidates& candidates, bool both, bool write, const Place& place);
NearestNeighborsScan nearest_neighbors_scan_cpu, nearest_neighbors_scan_cuda;

// The same with products of rows that are rounded to 8 bits (cpu/byte_products.h), on a CPU that has them. Their window
// is another one; it stands at the same place as the first.
//
// Packed rows: bytes [packed rows, packed elements], scale and sum [packed rows].
struct PackedRows {
  const uint8_t* bytes;
  const float* scale;
  const int32_t* sum;
  int64_t rows;
};

// What rounding takes from the rows x [rows, D]: scale [rows] and rounded [rows], |r_i|^2.
void nearest_neighbors_round_cpu(const float* x, int64_t stride, int64_t rows, int64_t D, float* scale, double* rounded,
                                 const Place& place);

// Packs rows with the scales that nearest_neighbors_round_cpu found, as left or as right operand.
void nearest_neighbors_pack_cpu(const float* x, int64_t stride, int64_t rows, int64_t D, const float* scale, bool left,
                                uint8_t* bytes, float* packed_scale, int32_t* sum, const Place& place);

// Which pairs a row's largest distance may be that of: those whose upper bound is not below row_max, which is what it
// is at least. They are measured when there is no more room, and at the end.
struct Farthest {
  float* upper;    // [rows, kFarthest]
  int32_t* index;  // [rows, kFarthest]
  int32_t* count;  // [rows], starts at 0
};
constexpr int64_t kFarthest = 8;

// What it takes to measure pairs: left and right set as nearest_neighbors_select takes them.
struct PairSets {
  const Features& x;
  const Features& x2;
  const Features& y;
  const Features& y2;
  DType dtype;
  int64_t D;
};

// nearest_neighbors_scan with row_max by way of these pairs.
void nearest_neighbors_scan_farthest_cpu(float* block, int64_t ld, int64_t rows, int64_t columns, int64_t row_begin,
                                         int64_t column_begin, const Bounds& left_bounds, const Bounds& right_bounds,
                                         const Candidates& candidates, bool both, const PairSets& sets,
                                         const Farthest& farthest, const Place& place);

// With `both`, a block that begins at the same row and column is one on the diagonal, of rows with themselves, and may
// be given, too. workspace: kPackedScanBytes for each thread. Without `farthest`, row_max stays as it is. In this and
// the other scans that take sets, candidates of a row that has more of them than places are measured.
void nearest_neighbors_scan_packed_cpu(const PackedRows& left, const PackedRows& right, int64_t D, int64_t row_begin,
                                       int64_t column_begin, const Bounds& left_bounds, const Bounds& right_bounds,
                                       const Candidates& candidates, bool both, const PairSets& sets,
                                       const Farthest* farthest, void* workspace, const Place& place);
constexpr int64_t kPackedScanBytes = 64 * 1024 * 4;

// nearest_neighbors_scan_farthest for both sides of a block whose distances are wanted themselves, clamped at 0: `out`
// [rows, columns], with a leading dimension. It is not on the diagonal. Its products are those of float32 rows x and y,
// as elsewhere. panels: D times the columns, rounded up to packed rows; workspace: kPackedScanBytes for each thread.
void nearest_neighbors_scan_written_cpu(const float* x, int64_t stride, int64_t rows, const float* y, int64_t y_stride,
                                        int64_t columns, int64_t D, int64_t row_begin, int64_t column_begin,
                                        const Bounds& left_bounds, const Bounds& right_bounds,
                                        const Candidates& candidates, const PairSets& sets, const Farthest& farthest,
                                        float* out, int64_t ld, float* panels, void* workspace, const Place& place);

// Measures the pairs that are left, after which row_max [rows] is each row's largest distance.
void nearest_neighbors_farthest_cpu(const PairSets& sets, const Farthest& farthest, float* row_max, const Place& place);

// The k nearest of each row in exact order, from its candidates. The left set's rows are x's and then x2's, the right
// set's y's and then y2's; x2 and y2 may be empty. Writes index [rows, k], distance [rows, k] (float32 or float64, null
// for none), and for rows that need nearest_neighbors_rescan unsure[row] = 1 and kth_upper[row] = the k-th smallest
// upper bound (else unsure[row] = 0).
using NearestNeighborsSelect = void(const Features& x, const Features& x2, const Features& y, const Features& y2,
                                    DType dtype, int64_t D, Metric metric, double unscale, const Bounds& left_bounds,
                                    const Bounds& right_bounds, const Candidates& candidates, int32_t* index,
                                    void* distance, DType distance_dtype, uint8_t* unsure, float* kth_upper,
                                    const Place& place);
NearestNeighborsSelect nearest_neighbors_select_cpu, nearest_neighbors_select_cuda;

// The same for `count` whole rows rows[0..]: block [count, columns] holds their products with the whole right set.
// same[j], if not null, is the first row of the right set that is equal to row j. workspace: 16 bytes times (columns +
// half of them, rounded up) for each thread. A GPU needs neither.
using NearestNeighborsRescan = void(const float* block, int64_t ld, const int64_t* rows, int64_t count,
                                    const Features& x, const Features& x2, const Features& y, const Features& y2,
                                    DType dtype, int64_t D, Metric metric, double unscale, const Bounds& left_bounds,
                                    const Bounds& right_bounds, const float* kth_upper, const int32_t* same, int64_t k,
                                    int32_t* index, void* distance, DType distance_dtype, void* workspace,
                                    const Place& place);
NearestNeighborsRescan nearest_neighbors_rescan_cpu, nearest_neighbors_rescan_cuda;

// Limits on a GPU (else std::invalid_argument).
constexpr int64_t kCudaMaxNeighbors = 128;
constexpr int64_t kCudaMaxCapacity = 192;

}  // namespace vareid
