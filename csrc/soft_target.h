// One row of the soft-label cross-entropy, for the CPU and the device: the formula and its names are in
// vareid_ext/reference/viewpoint_aware_cross_entropy.py.
//
// The V subclasses of a sample's own identity are few and treated one by one; those of the other identities share one
// target, and are summarised by four numbers.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#ifdef __CUDACC__
#define VAREID_ROW_FUNCTION __device__ __forceinline__
#else
#define VAREID_ROW_FUNCTION inline
#endif

namespace vareid {

// Subclasses of other identities, or some of them.
struct OthersSummary {
  double largest = -std::numeric_limits<double>::infinity();
  double total = 0;  // sum of exp(logit - largest)
  double sum = 0;    // sum of the logits
  double count = 0;  // how many exist
};

// What the gradient of one row needs.
struct RowStatistics {
  double largest;  // logit
  double inverse;  // 1 / sum exp(logit - largest)
  double other;    // target of a subclass of another identity
  double own;      // 1 - eps1 - eps2
  double spread;   // eps2 / (E_y - 1)
};
constexpr int kStatistics = 5;  // stored as [5, N]

VAREID_ROW_FUNCTION void store_statistics(double* statistics, int64_t N, int64_t i, const RowStatistics& row) {
  statistics[i] = row.largest;
  statistics[N + i] = row.inverse;
  statistics[2 * N + i] = row.other;
  statistics[3 * N + i] = row.own;
  statistics[4 * N + i] = row.spread;
}

VAREID_ROW_FUNCTION RowStatistics load_statistics(const double* statistics, int64_t N, int64_t i) {
  return {statistics[i], statistics[N + i], statistics[2 * N + i], statistics[3 * N + i], statistics[4 * N + i]};
}

// Weight of a sum of exp(logit - from) in one of exp(logit - to), to >= from.
VAREID_ROW_FUNCTION double rescale(double from, double to) { return from == to ? 1.0 : exp(from - to); }

VAREID_ROW_FUNCTION void merge(OthersSummary& into, const OthersSummary& part) {
  const double largest = into.largest < part.largest ? part.largest : into.largest;
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

  VAREID_ROW_FUNCTION SampleViews(int64_t views, const uint8_t* exists, const double* distribution, int64_t viewpoint)
      : views(views), exists(exists), distribution(distribution), viewpoint(viewpoint), existing(views) {
    if (!exists) return;
    existing = 0;
    for (int64_t k = 0; k < views; ++k) existing += exists[k] != 0;
  }
  VAREID_ROW_FUNCTION bool has(int64_t k) const { return !exists || exists[k]; }
  VAREID_ROW_FUNCTION double weight(int64_t k) const {
    if (distribution) return distribution[k];
    return viewpoint < 0 ? 1.0 / static_cast<double>(existing) : viewpoint == k ? 1.0 : 0.0;
  }
  VAREID_ROW_FUNCTION double target(int64_t k, const RowStatistics& row) const {
    return has(k) ? row.own * weight(k) + row.spread * (1 - weight(k)) : 0.0;
  }
};

struct Smoothing {
  bool adaptive;  // eps1 = alpha (1 - probability of the own identity), else eps1 = epsilon
  double alpha;   // also of eps2
  double epsilon;
};

// The statistics of a row and its loss, from the other subclasses and the V own logits: own_logit(k) is a double.
template <typename OwnLogit>
VAREID_ROW_FUNCTION double finish_row(const OthersSummary& others, const OwnLogit& own_logit, const SampleViews& views,
                                      const Smoothing& smoothing, RowStatistics& row) {
  double largest = others.largest;
  for (int64_t k = 0; k < views.views; ++k)
    if (views.has(k) && largest < own_logit(k)) largest = own_logit(k);
  double own_total = 0, expected = 0;
  for (int64_t k = 0; k < views.views; ++k) {
    if (!views.has(k)) continue;
    const double term = exp(own_logit(k) - largest);  // NaN in a row without any possible subclass
    own_total += term;
    expected += views.weight(k) * term;
  }
  const double total = own_total + others.total * rescale(others.largest, largest);
  const double identity_error = own_total < total ? 1 - own_total / total : 0;
  const double view_error = expected < total ? 1 - expected / total : 0;
  const double eps1 =
      others.count > 0 ? (smoothing.adaptive ? smoothing.alpha * identity_error : smoothing.epsilon) : 0;
  const double eps2 = views.existing > 1 ? smoothing.alpha * view_error : 0;
  row.largest = largest;
  row.inverse = 1 / total;
  row.other = others.count > 0 ? eps1 / others.count : 0;
  row.own = 1 - eps1 - eps2;
  row.spread = views.existing > 1 ? eps2 / static_cast<double>(views.existing - 1) : 0;
  double loss = log(total);
  if (row.other > 0) loss -= row.other * (others.sum - others.count * largest);
  for (int64_t k = 0; k < views.views; ++k) {
    const double target = views.target(k, row);
    if (target != 0) loss -= target * (own_logit(k) - largest);
  }
  return loss;
}

}  // namespace vareid
