// Parts of rows of the soft-label cross-entropy, shared by the ops that have one: the formula and its names are in
// vareid_ext/reference/viewpoint_aware_cross_entropy.py.
//
// The V subclasses of a sample's own identity are few and treated one by one; those of the other identities share one
// target and are streamed. `mask` (a byte for each subclass, 0 = it does not exist) and `scale` (a factor of each
// logit) may be null.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

#include "cpu/simd.h"

namespace vareid {

// Subclasses of other identities, or some of them.
struct OthersSummary {
  double largest = -std::numeric_limits<double>::infinity();
  double total = 0;  // sum of exp(logit - largest)
  double sum = 0;    // sum of the logits
  double count = 0;  // how many exist
};

// Adds the subclasses at [0, n) to the summary.
void summarise(const float* logits, const uint8_t* mask, const float* scale, int64_t n, OthersSummary& summary);
void summarise(const double* logits, const uint8_t* mask, const double* scale, int64_t n, OthersSummary& summary);
void summarise(const float16* logits, const uint8_t* mask, const float* scale, int64_t n, OthersSummary& summary);
void summarise(const bfloat16* logits, const uint8_t* mask, const float* scale, int64_t n, OthersSummary& summary);

// What the gradient of one row needs.
struct RowStatistics {
  double largest;  // logit
  double inverse;  // 1 / sum exp(logit - largest)
  double other;    // target of a subclass of another identity
  double own;      // 1 - eps1 - eps2
  double spread;   // eps2 / (E_y - 1)
};
constexpr int kStatistics = 5;

// grad = (exp(logit - largest) * inverse - other) * upstream * scale at [0, n), 0 where a subclass does not exist.
// `grad` may be `logits`.
void others_gradient(const float* logits, const uint8_t* mask, const float* scale, float* grad, int64_t n,
                     const RowStatistics& row, double upstream);
void others_gradient(const double* logits, const uint8_t* mask, const double* scale, double* grad, int64_t n,
                     const RowStatistics& row, double upstream);
void others_gradient(const float16* logits, const uint8_t* mask, const float* scale, float16* grad, int64_t n,
                     const RowStatistics& row, double upstream);
void others_gradient(const bfloat16* logits, const uint8_t* mask, const float* scale, bfloat16* grad, int64_t n,
                     const RowStatistics& row, double upstream);

// Weight of the sum of exp(logit - from) in a sum of exp(logit - to), to >= from.
inline double rescale(double from, double to) { return from == to ? 1.0 : std::exp(from - to); }

inline void merge(OthersSummary& into, const OthersSummary& part) {
  const double largest = std::max(into.largest, part.largest);
  into.total = into.total * rescale(into.largest, largest) + part.total * rescale(part.largest, largest);
  into.largest = largest;
  into.sum += part.sum;
  into.count += part.count;
}

// The views of one sample: which of its identity's exist, and its distribution over them.
struct SampleViews {
  int64_t views;
  const uint8_t* exists;       // [V] or null
  const double* distribution;  // [V], or null where the view is known or none is
  int64_t viewpoint;           // -1: unknown
  int64_t existing;

  SampleViews(int64_t views, const uint8_t* exists, const double* distribution, int64_t viewpoint)
      : views(views), exists(exists), distribution(distribution), viewpoint(viewpoint), existing(views) {
    if (exists) existing = std::count_if(exists, exists + views, [](uint8_t byte) { return byte != 0; });
  }
  bool has(int64_t k) const { return !exists || exists[k]; }
  double weight(int64_t k) const {
    if (distribution) return distribution[k];
    return viewpoint < 0 ? 1.0 / static_cast<double>(existing) : viewpoint == k ? 1.0 : 0.0;
  }
  double target(int64_t k, const RowStatistics& row) const {
    return has(k) ? row.own * weight(k) + row.spread * (1 - weight(k)) : 0.0;
  }
};

struct Smoothing {
  bool adaptive;  // eps1 = alpha (1 - probability of the own identity), else eps1 = epsilon
  double alpha;   // also of eps2
  double epsilon;
};

// The statistics of a row and its loss, from the other subclasses and the V own logits.
template <typename OwnLogit>
double finish_row(const OthersSummary& others, const OwnLogit& own_logit, const SampleViews& views,
                  const Smoothing& smoothing, RowStatistics& row) {
  double largest = others.largest;
  for (int64_t k = 0; k < views.views; ++k)
    if (views.has(k)) largest = std::max(largest, own_logit(k));
  double own_total = 0, expected = 0;
  for (int64_t k = 0; k < views.views; ++k) {
    if (!views.has(k)) continue;
    const double term = std::exp(own_logit(k) - largest);  // NaN in a row without any possible subclass
    own_total += term;
    expected += views.weight(k) * term;
  }
  const double total = own_total + others.total * rescale(others.largest, largest);
  const double identity_error = std::max(0.0, 1 - own_total / total);
  const double view_error = std::max(0.0, 1 - expected / total);
  const double eps1 =
      others.count > 0 ? (smoothing.adaptive ? smoothing.alpha * identity_error : smoothing.epsilon) : 0;
  const double eps2 = views.existing > 1 ? smoothing.alpha * view_error : 0;
  row.largest = largest;
  row.inverse = 1 / total;
  row.other = others.count > 0 ? eps1 / others.count : 0;
  row.own = 1 - eps1 - eps2;
  row.spread = views.existing > 1 ? eps2 / static_cast<double>(views.existing - 1) : 0;
  double loss = std::log(total);
  if (row.other > 0) loss -= row.other * (others.sum - others.count * largest);
  for (int64_t k = 0; k < views.views; ++k) {
    const double target = views.target(k, row);
    if (target != 0) loss -= target * (own_logit(k) - largest);
  }
  return loss;
}

// The gradient of the V own logits. `grad` may be `logits`.
template <typename T>
void own_gradient(const T* logits, const typename Accumulator<T>::type* scale, T* grad, const SampleViews& views,
                  const RowStatistics& row, double upstream) {
  using Acc = typename Accumulator<T>::type;
  for (int64_t k = 0; k < views.views; ++k) {
    double value = 0;
    if (views.has(k)) {
      const Acc factor = scale ? scale[k] : Acc(1);
      const double probability = std::exp(static_cast<double>(load(logits + k) * factor) - row.largest) * row.inverse;
      value = (probability - views.target(k, row)) * upstream * factor;
    }
    store(grad + k, static_cast<Acc>(value));
  }
}

}  // namespace vareid
