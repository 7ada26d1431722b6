// k-reciprocal re-ranking after the neighbour lists: the definitions are in vareid_ext/reference/k_reciprocal.py.
//
// Sparse rows are CSR: indptr int64 [rows + 1], index int32 ascending within a row, value float32. Where a result's
// size is not known before, a first call with null arrays writes indptr only; the caller allocates and calls again.
#pragma once

#include <cstdint>

#include "dtype.h"
#include "pairwise_distance.h"

namespace vareid {

// reciprocal[i] = the members of R(i, k), ascending, in [rows, min(k + 1, width)]; size[i] = how many.
using KReciprocalSets = void(const int32_t* neighbor, int64_t rows, int64_t width, int64_t k, int32_t* reciprocal,
                             int32_t* size, const Place& place);
KReciprocalSets k_reciprocal_sets_cpu, k_reciprocal_sets_cuda;

// The robust sets R* as a CSR pattern, from R(., k1) and R(., h). workspace: 8 bytes times `rows` for each thread.
using KReciprocalRobustSets = void(const int32_t* reciprocal, const int32_t* size, int64_t width, const int32_t* half,
                                   const int32_t* half_size, int64_t half_width, int64_t rows, int64_t* indptr,
                                   int32_t* index, void* workspace, const Place& place);
KReciprocalRobustSets k_reciprocal_robust_sets_cpu, k_reciprocal_robust_sets_cuda;

// Squared distances of a CSR pattern's pairs over x and y together, known ones from the neighbour lists.
using KReciprocalListedDistance = void(const Features& x, const Features& y, DType dtype, int64_t D,
                                       const int32_t* neighbor, const float* neighbor_distance, int64_t width,
                                       const int64_t* indptr, const int32_t* index, float* out, const Place& place);
KReciprocalListedDistance k_reciprocal_listed_distance_cpu, k_reciprocal_listed_distance_cuda;

// value = exp(-distance / row_max), each row divided by its sum. distance and value may be the same array.
using KReciprocalEncode = void(const int64_t* indptr, const float* distance, const float* row_max, int64_t rows,
                               float* value, const Place& place);
KReciprocalEncode k_reciprocal_encode_cpu, k_reciprocal_encode_cuda;

// The mean of the encodings of each row's k2 first neighbours. workspace: 16 bytes times `rows` for each thread.
using KReciprocalQueryExpansion = void(const int32_t* neighbor, int64_t rows, int64_t width, int64_t k2,
                                       const int64_t* indptr, const int32_t* index, const float* value,
                                       int64_t* new_indptr, int32_t* new_index, float* new_value, void* workspace,
                                       const Place& place);
KReciprocalQueryExpansion k_reciprocal_query_expansion_cpu, k_reciprocal_query_expansion_cuda;

// The inverted index of rows first.. of a CSR matrix with `columns` columns, `entries` of them: start [columns + 1],
// and for each column the rows (counted from `first`) and their values, rows ascending. workspace: 8 bytes times
// `columns`; on a GPU k_reciprocal_invert_workspace_cuda(entries) bytes.
using KReciprocalInvert = void(const int64_t* indptr, const int32_t* index, const float* value, int64_t rows,
                               int64_t first, int64_t columns, int64_t entries, int64_t* start, int32_t* owner,
                               float* weight, void* workspace, const Place& place);
KReciprocalInvert k_reciprocal_invert_cpu, k_reciprocal_invert_cuda;

// distance[q, g] (leading dimension ld) becomes (1 - lambda) Jaccard + lambda distance / row_max[q], for the queries
// 0..queries. workspace: 4 bytes times `gallery` for each thread.
using KReciprocalBlend = void(float* distance, int64_t ld, int64_t queries, int64_t gallery, const float* row_max,
                              const int64_t* indptr, const int32_t* index, const float* value, const int64_t* start,
                              const int32_t* owner, const float* weight, double lambda_value, void* workspace,
                              const Place& place);
KReciprocalBlend k_reciprocal_blend_cpu, k_reciprocal_blend_cuda;

// The k nearest rows and the row maxima of the symmetric matrix [[q_q, q_g], [q_g^T, g_g]] (dense, row-major), ties by
// the lower index. workspace: 128 Q + 32 k + 1024 bytes for each thread.
using KReciprocalMatrixNeighbors = void(const void* q_g, const void* q_q, const void* g_g, DType dtype, int64_t Q,
                                        int64_t G, int64_t k, int32_t* neighbor, double* row_max, void* workspace,
                                        const Place& place);
KReciprocalMatrixNeighbors k_reciprocal_matrix_neighbors_cpu, k_reciprocal_matrix_neighbors_cuda;

// The k smallest final distances of each query without its whole row, ties by the lower index. Gallery rows take part
// that share something with the query or are among nearest [Q, listed], those of smallest original distance, with
// `original` [Q, listed] their squared distances; listed is at least k, and no row is there twice. Squared distances of
// others are summed in float64. workspace: 24 bytes times G for each thread.
using KReciprocalTopk = void(const Features& query, const Features& gallery, DType dtype, int64_t D,
                             const int32_t* nearest, const float* original, int64_t listed, const float* row_max,
                             const int64_t* indptr, const int32_t* index, const float* value, const int64_t* start,
                             const int32_t* owner, const float* weight, double lambda_value, int64_t k, float* distance,
                             int64_t* gallery_index, void* workspace, const Place& place);
KReciprocalTopk k_reciprocal_topk_cpu, k_reciprocal_topk_cuda;

// Limits on a GPU (else std::invalid_argument): members of sets, and topk; matrix_neighbors takes k up to 159. Only
// invert needs a workspace there.
constexpr int64_t kCudaMaxWidth = 1024;
constexpr int64_t kCudaMaxTopk = 128;
constexpr int kInvertBits = 8;  // the widest digit by which entries are sorted
constexpr int64_t kInvertDigits = int64_t{1} << kInvertBits;
constexpr int64_t kInvertTile = 8192;  // entries that a block sorts
constexpr int64_t k_reciprocal_invert_workspace_cuda(int64_t entries) {
  return 8 * (kInvertDigits * ((entries + kInvertTile - 1) / kInvertTile) + 4) + 16 * ((entries + 7) / 8 * 8);
}

}  // namespace vareid
