// Counts of pairs by distance: the definition is in vareid_ext/reference/verification.py. Distances, row_stride,
// labels, Q and G are those of ranking.h; results and labels live where the distances do.
//
// A key is the integer that orders as a distance does; its digits are of 16 bits, the first of them signed. In every
// array the matches come first and the other pairs second.
#pragma once

#include <cstdint>

#include "dtype.h"
#include "place.h"
#include "ranking.h"

namespace vareid {

constexpr int64_t kDigitValues = 1 << 16;
constexpr int kMostPrefixes = 8;

// The keys whose first `digits` digits are `value[p]`, for `count` different values.
struct Prefixes {
  int64_t value[kMostPrefixes];
  int count;
  int digits;
};

// Bytes that the following need; prefixes is 0 for the histogram.
int64_t verification_workspace_bytes_cpu(int64_t prefixes, int64_t Q, int64_t G, int threads);

// Adds to counts [2, 65536] the pairs by the first digit (plus 2^15) of their keys. nearest_distance and nearest_index
// [2, Q] receive each query's nearest pair, ties by the lower index; infinity and -1 where there is none, NaN and -1
// for a row with NaN or Inf, whose counts mean nothing.
using VerificationHistogram = void(const void* distances, int64_t row_stride, const RankingLabels& labels,
                                   int64_t* counts, double* nearest_distance, int64_t* nearest_index, void* workspace,
                                   DType dtype, int64_t Q, int64_t G, const Place& place);
VerificationHistogram verification_histogram_cpu, verification_histogram_cuda;

// Adds to counts [2, prefixes.count, 65536] the pairs of each prefix by the next digit. float32 and float64 only.
using VerificationRefine = void(const void* distances, int64_t row_stride, const RankingLabels& labels,
                                const Prefixes& prefixes, int64_t* counts, void* workspace, DType dtype, int64_t Q,
                                int64_t G, const Place& place);
VerificationRefine verification_refine_cpu, verification_refine_cuda;

// accepted [2, Q]: each query's pairs whose distance is at most the threshold.
using VerificationAccepted = void(const void* distances, int64_t row_stride, const RankingLabels& labels,
                                  double threshold, int64_t* accepted, DType dtype, int64_t Q, int64_t G,
                                  const Place& place);
VerificationAccepted verification_accepted_cpu, verification_accepted_cuda;

}  // namespace vareid
