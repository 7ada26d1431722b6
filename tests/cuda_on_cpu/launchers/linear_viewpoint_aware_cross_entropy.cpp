#include "linear_viewpoint_aware_cross_entropy.h"

#include "export.h"

namespace vareid {
namespace {

LogitsTile tile_of(void* logits, int64_t row_stride, const void* scale, int64_t N, int64_t K, int64_t views,
                   int64_t first, int64_t identities, const int64_t* identity, const int64_t* viewpoint,
                   const double* distribution, const uint8_t* mask) {
  return {logits, row_stride, scale, N, K, views, first, identities, identity, viewpoint, distribution, mask};
}

}  // namespace

void linear_summarise_flat(const void* logits, int64_t row_stride, const void* scale, int64_t N, int64_t K,
                           int64_t views, int64_t first, int64_t identities, const int64_t* identity,
                           const uint8_t* mask, double* summaries, int64_t total_parts, int64_t first_part,
                           double* own_logits, DType dtype, const Place& place) {
  const LogitsTile tile = tile_of(const_cast<void*>(logits), row_stride, scale, N, K, views, first, identities,
                                  identity, nullptr, nullptr, mask);
  linear_viewpoint_aware_cross_entropy_summarise_cuda(tile, reinterpret_cast<OthersSummary*>(summaries), total_parts,
                                                      first_part, own_logits, dtype, place);
}

void linear_finish_flat(const double* summaries, int64_t total_parts, const double* own_logits, int64_t N, int64_t K,
                        int64_t views, const int64_t* identity, const int64_t* viewpoint, const double* distribution,
                        const uint8_t* mask, bool adaptive, double alpha, double epsilon, double* statistics,
                        void* loss, int64_t* label_error, DType dtype, const Place& place) {
  const LogitsTile tile = tile_of(nullptr, 0, nullptr, N, K, views, 0, 0, identity, viewpoint, distribution, mask);
  linear_viewpoint_aware_cross_entropy_finish_cuda(tile, reinterpret_cast<const OthersSummary*>(summaries), total_parts,
                                                   own_logits, {adaptive, alpha, epsilon}, statistics, loss,
                                                   label_error, dtype, place);
}

void linear_gradient_flat(void* logits, int64_t row_stride, const void* scale, int64_t N, int64_t K, int64_t views,
                          int64_t first, int64_t identities, const int64_t* identity, const int64_t* viewpoint,
                          const double* distribution, const uint8_t* mask, const double* statistics,
                          const void* upstream, int64_t upstream_stride, double share, DType dtype,
                          const Place& place) {
  const LogitsTile tile =
      tile_of(logits, row_stride, scale, N, K, views, first, identities, identity, viewpoint, distribution, mask);
  linear_viewpoint_aware_cross_entropy_gradient_cuda(tile, statistics, upstream, upstream_stride, share, dtype, place);
}

}  // namespace vareid

EXPORT(linear_viewpoint_aware_cross_entropy_parts_cuda)
EXPORT(linear_summarise_flat)
EXPORT(linear_finish_flat)
EXPORT(linear_gradient_flat)
EXPORT(linear_viewpoint_aware_cross_entropy_inverse_norms_cuda)
EXPORT(linear_viewpoint_aware_cross_entropy_project_cuda)
EXPORT(linear_viewpoint_aware_cross_entropy_scale_cuda)
