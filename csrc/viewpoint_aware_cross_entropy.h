// Soft-label cross-entropy from logits: the formula is in vareid_ext/reference/viewpoint_aware_cross_entropy.py.
//
// Up to two heads over the same N samples and K identities, in one launch. The logits of a head are [N, K, V] with
// dense rows `row_stride` elements apart, of type `dtype`. Losses and upstream gradients are float32, or float64 when
// dtype is float64. Labels must be in range on the CPU (the caller has checked them).
#pragma once

#include <cstdint>

#include "dtype.h"
#include "place.h"

namespace vareid {

enum class Reduction : int32_t { kMean = 0, kSum = 1, kNone = 2 };

struct CrossEntropyHead {
  bool present = false;
  const void* logits = nullptr;
  int64_t row_stride = 0;
  int64_t views = 1;                     // V
  const uint8_t* mask = nullptr;         // [K, V], 0 = the subclass does not exist; null: all do
  const int64_t* viewpoint = nullptr;    // [N], -1 = unknown
  const double* distribution = nullptr;  // [N, V], in place of viewpoint
  bool adaptive = true;                  // eps1 = alpha (1 - probability of the identity), else eps1 = epsilon
  double alpha = 0;
  double epsilon = 0;
  void* loss = nullptr;            // out of forward: [1], or [N] for Reduction::kNone
  double* statistics = nullptr;    // out of forward, into backward: [5, N]
  const void* upstream = nullptr;  // into backward: [1], or [N] for Reduction::kNone
  void* grad = nullptr;            // out of backward: [N, K, V], dense; may be the logits
};

using CrossEntropyWorkspaceBytes = int64_t(int64_t N, int64_t K, const int64_t views[2]);
CrossEntropyWorkspaceBytes viewpoint_aware_cross_entropy_workspace_bytes_cpu,
    viewpoint_aware_cross_entropy_workspace_bytes_cuda;

// On a GPU a label out of range cannot be refused without waiting for it: its row's loss and gradient are NaN, and
// label_error (memory that the device can write, or null) gets 8 * row + code for the first such row of either head.
using CrossEntropyForward = void(const CrossEntropyHead heads[2], const int64_t* identity, DType dtype, int64_t N,
                                 int64_t K, Reduction reduction, int64_t* label_error, void* workspace,
                                 const Place& place);
CrossEntropyForward viewpoint_aware_cross_entropy_forward_cpu, viewpoint_aware_cross_entropy_forward_cuda;

using CrossEntropyBackward = void(const CrossEntropyHead heads[2], const int64_t* identity, DType dtype, int64_t N,
                                  int64_t K, Reduction reduction, const Place& place);
CrossEntropyBackward viewpoint_aware_cross_entropy_backward_cpu, viewpoint_aware_cross_entropy_backward_cuda;

}  // namespace vareid
