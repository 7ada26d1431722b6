// Soft-label cross-entropy over logits that exist only as tiles of a feature-times-centres product: the formulas are in
// vareid_ext/reference/linear_viewpoint_aware_cross_entropy.py. The products are the caller's.
//
// For one head, a tile of logits is summarised (once for each block of identities), the rows are finished, and each
// tile is replaced by its gradient. Losses, scales, norms and upstream gradients are float32, or float64 when dtype is
// float64.
#pragma once

#include <cstdint>

#include "dtype.h"
#include "place.h"
#include "soft_target.h"

namespace vareid {

// Logits [N, identities * V] of the identities [first, first + identities), rows row_stride apart.
struct LogitsTile {
  void* logits;
  int64_t row_stride;
  const void* scale;  // [identities * V] or null: a factor of each logit
  int64_t N, K, views, first, identities;
  const int64_t* identity;     // [N]
  const int64_t* viewpoint;    // [N], -1 = unknown; or null
  const double* distribution;  // [N, V], in place of viewpoint; or null
  const uint8_t* mask;         // [K, V], 0 = the subclass does not exist; or null
};

// How many summaries of each row a tile writes.
using LinearParts = int64_t(int64_t N, int64_t columns);
LinearParts linear_viewpoint_aware_cross_entropy_parts_cpu, linear_viewpoint_aware_cross_entropy_parts_cuda;

// Writes summaries [N, total_parts] from index first_part on, and own_logits [V, N] for the rows whose identity is
// here.
using LinearSummarise = void(const LogitsTile& tile, OthersSummary* summaries, int64_t total_parts, int64_t first_part,
                             double* own_logits, DType dtype, const Place& place);
LinearSummarise linear_viewpoint_aware_cross_entropy_summarise_cpu, linear_viewpoint_aware_cross_entropy_summarise_cuda;

// The loss [N] and the statistics [5, N] of each row. The tile's logits are not read. label_error is that of
// viewpoint_aware_cross_entropy.h.
using LinearFinish = void(const LogitsTile& tile, const OthersSummary* summaries, int64_t total_parts,
                          const double* own_logits, const Smoothing& smoothing, double* statistics, void* loss,
                          int64_t* label_error, DType dtype, const Place& place);
LinearFinish linear_viewpoint_aware_cross_entropy_finish_cpu, linear_viewpoint_aware_cross_entropy_finish_cuda;

// Replaces the logits by (probability - target) * scale * upstream * share. upstream is [N], or [1] with
// upstream_stride 0.
using LinearGradient = void(const LogitsTile& tile, const double* statistics, const void* upstream,
                            int64_t upstream_stride, double share, DType dtype, const Place& place);
LinearGradient linear_viewpoint_aware_cross_entropy_gradient_cpu, linear_viewpoint_aware_cross_entropy_gradient_cuda;

// 1 / |x_i| of each row of x [rows, D]; 0 for a zero vector.
using LinearInverseNorms = void(const void* x, void* inverse, int64_t rows, int64_t D, DType dtype, const Place& place);
LinearInverseNorms linear_viewpoint_aware_cross_entropy_inverse_norms_cpu,
    linear_viewpoint_aware_cross_entropy_inverse_norms_cuda;

// grad_i -= x_i (x_i . grad_i) inverse_i^2: what is left is orthogonal to x_i. grad is read and written.
using LinearProject = void(const void* x, const void* inverse, void* grad, int64_t rows, int64_t D, DType dtype,
                           const Place& place);
LinearProject linear_viewpoint_aware_cross_entropy_project_cpu, linear_viewpoint_aware_cross_entropy_project_cuda;

// grad [n] times *factor, in place; where that is 1, grad is neither read nor written. The factor lies where grad does.
using LinearScale = void(void* grad, const void* factor, int64_t n, DType dtype, const Place& place);
LinearScale linear_viewpoint_aware_cross_entropy_scale_cpu, linear_viewpoint_aware_cross_entropy_scale_cuda;

}  // namespace vareid
