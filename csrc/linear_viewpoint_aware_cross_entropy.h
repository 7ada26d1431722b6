// Soft-label cross-entropy over logits that exist only as tiles of a feature-times-centres product: the formulas are in
// vareid_ext/reference/linear_viewpoint_aware_cross_entropy.py. The products are the caller's.
//
// For one head, a tile of logits is summarised (once for each block of identities), the rows are finished, and each
// tile is replaced by its gradient. Losses, scales, norms and upstream gradients are float32, or float64 when dtype is
// float64.
#pragma once

#include <cstdint>

#include "dtype.h"
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
int64_t linear_viewpoint_aware_cross_entropy_parts_cpu(int64_t N, int64_t columns);
int64_t linear_viewpoint_aware_cross_entropy_parts_cuda(int64_t N, int64_t columns);

// Writes summaries [N, total_parts] from index first_part on, and own_logits [V, N] for the rows whose identity is
// here.
void linear_viewpoint_aware_cross_entropy_summarise_cpu(const LogitsTile& tile, OthersSummary* summaries,
                                                        int64_t total_parts, int64_t first_part, double* own_logits,
                                                        DType dtype, int threads);
void linear_viewpoint_aware_cross_entropy_summarise_cuda(const LogitsTile& tile, OthersSummary* summaries,
                                                         int64_t total_parts, int64_t first_part, double* own_logits,
                                                         DType dtype, int device, void* stream);

// The loss [N] and the statistics [5, N] of each row. The tile's logits are not read.
void linear_viewpoint_aware_cross_entropy_finish_cpu(const LogitsTile& tile, const OthersSummary* summaries,
                                                     int64_t total_parts, const double* own_logits,
                                                     const Smoothing& smoothing, double* statistics, void* loss,
                                                     DType dtype);
void linear_viewpoint_aware_cross_entropy_finish_cuda(const LogitsTile& tile, const OthersSummary* summaries,
                                                      int64_t total_parts, const double* own_logits,
                                                      const Smoothing& smoothing, double* statistics, void* loss,
                                                      int64_t* label_error, DType dtype, int device, void* stream);

// Replaces the logits by (probability - target) * scale * upstream * share. upstream is [N], or [1] with
// upstream_stride 0.
void linear_viewpoint_aware_cross_entropy_gradient_cpu(const LogitsTile& tile, const double* statistics,
                                                       const void* upstream, int64_t upstream_stride, double share,
                                                       DType dtype, int threads);
void linear_viewpoint_aware_cross_entropy_gradient_cuda(const LogitsTile& tile, const double* statistics,
                                                        const void* upstream, int64_t upstream_stride, double share,
                                                        DType dtype, int device, void* stream);

// 1 / |x_i| of each row of x [rows, D]; 0 for a zero vector.
void linear_viewpoint_aware_cross_entropy_inverse_norms_cpu(const void* x, void* inverse, int64_t rows, int64_t D,
                                                            DType dtype, int threads);
void linear_viewpoint_aware_cross_entropy_inverse_norms_cuda(const void* x, void* inverse, int64_t rows, int64_t D,
                                                             DType dtype, int device, void* stream);

// grad_i -= x_i (x_i . grad_i) inverse_i^2: what is left is orthogonal to x_i. grad is read and written.
void linear_viewpoint_aware_cross_entropy_project_cpu(const void* x, const void* inverse, void* grad, int64_t rows,
                                                      int64_t D, DType dtype, int threads);
void linear_viewpoint_aware_cross_entropy_project_cuda(const void* x, const void* inverse, void* grad, int64_t rows,
                                                       int64_t D, DType dtype, int device, void* stream);

}  // namespace vareid
