#include "viewpoint_aware_cross_entropy.h"

#include "export.h"

namespace vareid {
namespace {

// The heads as one flat list of arguments.
CrossEntropyHead identity_head(bool present, const void* logits, int64_t row_stride) {
  CrossEntropyHead head;
  head.present = present;
  head.logits = logits;
  head.row_stride = row_stride;
  return head;
}

CrossEntropyHead viewpoint_head(bool present, const void* logits, int64_t row_stride, int64_t views,
                                const int64_t* viewpoint, const double* distribution, const uint8_t* mask) {
  CrossEntropyHead head = identity_head(present, logits, row_stride);
  head.views = views;
  head.viewpoint = viewpoint;
  head.distribution = distribution;
  head.mask = mask;
  return head;
}

}  // namespace

int64_t cross_entropy_workspace_flat(int64_t N, int64_t K, int64_t views0, int64_t views1) {
  const int64_t views[2] = {views0, views1};
  return viewpoint_aware_cross_entropy_workspace_bytes_cuda(N, K, views);
}

void cross_entropy_forward_flat(bool has0, const void* logits0, int64_t row_stride0, bool has1, const void* logits1,
                                int64_t row_stride1, int64_t views, const int64_t* identity, const int64_t* viewpoint,
                                const double* distribution, const uint8_t* mask, void* loss0, void* loss1,
                                double* statistics, bool adaptive, double alpha, double epsilon, DType dtype, int64_t N,
                                int64_t K, int reduction, int64_t* label_error, void* workspace, const Place& place) {
  CrossEntropyHead heads[2] = {
      identity_head(has0, logits0, row_stride0),
      viewpoint_head(has1, logits1, row_stride1, views, viewpoint, distribution, mask),
  };
  heads[0].adaptive = adaptive;
  heads[0].epsilon = epsilon;
  heads[0].loss = loss0;
  heads[1].loss = loss1;
  for (int h = 0; h < 2; ++h) {
    heads[h].alpha = alpha;
    heads[h].statistics = statistics + h * 5 * N;
  }
  viewpoint_aware_cross_entropy_forward_cuda(heads, identity, dtype, N, K, static_cast<Reduction>(reduction),
                                             label_error, workspace, place);
}

void cross_entropy_backward_flat(bool has0, const void* logits0, int64_t row_stride0, bool has1, const void* logits1,
                                 int64_t row_stride1, int64_t views, const int64_t* identity, const int64_t* viewpoint,
                                 const double* distribution, const uint8_t* mask, const double* statistics,
                                 const void* upstream0, const void* upstream1, void* grad0, void* grad1, DType dtype,
                                 int64_t N, int64_t K, int reduction, const Place& place) {
  CrossEntropyHead heads[2] = {
      identity_head(has0, logits0, row_stride0),
      viewpoint_head(has1, logits1, row_stride1, views, viewpoint, distribution, mask),
  };
  heads[0].upstream = upstream0;
  heads[1].upstream = upstream1;
  heads[0].grad = grad0;
  heads[1].grad = grad1;
  for (int h = 0; h < 2; ++h) heads[h].statistics = const_cast<double*>(statistics) + h * 5 * N;
  viewpoint_aware_cross_entropy_backward_cuda(heads, identity, dtype, N, K, static_cast<Reduction>(reduction), place);
}

}  // namespace vareid

EXPORT(cross_entropy_workspace_flat)
EXPORT(cross_entropy_forward_flat)
EXPORT(cross_entropy_backward_flat)
