// Ranking metrics of each query: the definition is in vareid_ext/reference/ranking.py. Nothing is sorted: the rank of a
// match is one more than the number of gallery images before it.
//
// distances is [Q, G] of `dtype` with unit column stride; row q starts at element q * row_stride; G < 2^31.
// gallery_order [G] holds the gallery indices ordered by identity, ties by index; the images of query q's identity are
// gallery_order[group_begin[q]] to gallery_order[group_end[q] - 1] (an empty range for a query of the junk identity).
// junk [G] bytes: not 0 for the images that are left out for every query; null if there are none. query_codes
// [Q, codes] and gallery_codes [G, codes], null if there are none: images of the query's identity are left out that
// have one of its codes in the same column; -1 equals none. Index arrays are int64; all arrays live where the distances
// do.
//
// Written for each query: average_precision, inverse_negative_penalty (float64), first_match_rank and num_matches
// (int64). A row with NaN or Inf gets num_matches -1 and 0 elsewhere.
#pragma once

#include <cstdint>

#include "dtype.h"
#include "nearest_neighbors.h"

namespace vareid {

struct RankingLabels {
  const int64_t* gallery_order;
  const int64_t* group_begin;
  const int64_t* group_end;
  const uint8_t* junk;
  const int64_t* query_codes;
  const int64_t* gallery_codes;
  int64_t codes;
};

struct RankingResults {
  double* average_precision;
  double* inverse_negative_penalty;
  int64_t* first_match_rank;
  int64_t* num_matches;
};

// Bytes that ranking_forward_cpu needs when no group is longer than max_group.
int64_t ranking_workspace_bytes_cpu(int64_t max_group, int threads);

// On a GPU a row is read once for every 256 images of the query's identity, and no workspace is needed.
using RankingForward = void(const void* distances, int64_t row_stride, const RankingLabels& labels,
                            const RankingResults& results, void* workspace, DType dtype, int64_t Q, int64_t G,
                            int64_t max_group, const Place& place);
RankingForward ranking_forward_cpu, ranking_forward_cuda;

// The same from features x [Q, D] and y [G, D], in the order of their float64 distances, ties by index. products [Q, G]
// (leading dimension ld) may be overwritten; what they leave open is measured. The notation and the bounds that decide
// are those of nearest_neighbors.h.
int64_t ranking_features_workspace_bytes_cpu(int64_t max_group, int64_t G, int threads);

using RankingFeatures = void(float* products, int64_t ld, const Features& x, const Features& y, DType dtype, int64_t D,
                             const Bounds& x_bounds, const Bounds& y_bounds, const RankingLabels& labels,
                             const RankingResults& results, void* workspace, int64_t max_group, const Place& place);
RankingFeatures ranking_features_cpu, ranking_features_cuda;

}  // namespace vareid
