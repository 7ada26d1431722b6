// Features, products and distances: the formulas are in vareid_ext/reference/pairwise_distance.py.
//
// Features are rows of D elements of type `dtype`, `stride` elements from one row to the next. The distance that is
// computed is that of the rows z_i = factor_i x_i: factor is 1, a common power of two (features far from 1), or
// 1 / |x_i| (cosine). `Metric` says what is made of |z_i - z_j|^2, `unscale` is 1 / the common factor.
//
// A block of float32 products comes from the vendor's library, of prepared rows p_i = float32(z_i - center). With
// n_i = |p_i|^2 a distance is n_i + n_j - 2 p_i . p_j.
#pragma once

#include <cstdint>

#include "dtype.h"
#include "place.h"

namespace vareid {

enum class Metric : int32_t { kEuclidean = 0, kSquaredEuclidean = 1, kCosine = 2 };

struct Features {
  const void* data;
  const double* factor;  // [rows], or null for 1
  int64_t rows;
  int64_t stride;
};

// max_abs[r] = the largest |x_rd|, or NaN where the row holds NaN or Inf.
using PairwiseDistanceMaxAbs = void(const Features& x, DType dtype, int64_t D, double* max_abs, const Place& place);
PairwiseDistanceMaxAbs pairwise_distance_max_abs_cpu, pairwise_distance_max_abs_cuda;

// norm[r] = sum over d of (factor_r x_rd)^2.
using PairwiseDistanceNorm = void(const Features& x, DType dtype, int64_t D, double* norm, const Place& place);
PairwiseDistanceNorm pairwise_distance_norm_cpu, pairwise_distance_norm_cuda;

// out[r] = float32(factor_r x_r - center), norm[r] = |out_r|^2. center is double [D] or null; out is [rows, D].
using PairwiseDistancePrepare = void(const Features& x, DType dtype, int64_t D, const double* center, float* out,
                                     float* norm, const Place& place);
PairwiseDistancePrepare pairwise_distance_prepare_cpu, pairwise_distance_prepare_cuda;

// Turns products [rows, columns] (leading dimension ld) into distances, in place. Distances that are small against the
// norms, where the product has lost digits, are summed again in float64 from the features, so equal rows are at 0.
// mirror, if not null, receives the transposed block [columns, rows] with leading dimension mirror_ld. On a GPU a block
// has at most 2,097,120 rows (else std::invalid_argument).
using PairwiseDistanceBlock = void(float* block, int64_t ld, const Features& x, const Features& y, DType dtype,
                                   int64_t D, const float* x_norm, const float* y_norm, Metric metric, double unscale,
                                   float* mirror, int64_t mirror_ld, const Place& place);
PairwiseDistanceBlock pairwise_distance_block_cpu, pairwise_distance_block_cuda;

// Products and distances in one, on a CPU with AVX-512: x_prepared and y_prepared are rows x_stride and y_stride
// elements apart, block is only written. The workspace is of pairwise_distance_strip_bytes for each thread, 0 on other
// CPUs.
int64_t pairwise_distance_strip_bytes_cpu(int64_t D);
void pairwise_distance_strips_cpu(const float* x_prepared, int64_t x_stride, const float* y_prepared, int64_t y_stride,
                                  float* block, int64_t ld, const Features& x, const Features& y, DType dtype,
                                  int64_t D, const float* x_norm, const float* y_norm, Metric metric, double unscale,
                                  void* workspace, const Place& place);

// Products and distances in one, on a GPU only: x_prepared [rows, D] and y_prepared [columns, D] are what prepare
// wrote, block is only written, of at most 4,194,240 rows. For blocks too small for the vendor's library to be worth
// its launches.
void pairwise_distance_tiled_cuda(const float* x_prepared, const float* y_prepared, float* block, int64_t ld,
                                  const Features& x, const Features& y, DType dtype, int64_t D, const float* x_norm,
                                  const float* y_norm, Metric metric, double unscale, const Place& place);

}  // namespace vareid
