#include <algorithm>
#include <cmath>
#include <limits>

#include "cpu/nearest_neighbors_candidates.h"
#include "cpu/parallel.h"
#include "nearest_neighbors.h"

namespace vareid {
namespace {

double metric_value(double squared, Metric metric, double unscale) {
  if (metric == Metric::kCosine) return squared / 2;
  return metric == Metric::kEuclidean ? std::sqrt(squared) * unscale : squared * unscale * unscale;
}

struct Pair {
  double distance;
  int32_t index;

  bool operator<(const Pair& other) const {
    return distance < other.distance || (distance == other.distance && index < other.index);
  }
};

struct Output {
  int32_t* index;
  void* distance;
  DType dtype;
  int64_t k;
  Metric metric;
  double unscale;

  // The k first of `count` pairs; where there are fewer, -1 and Inf.
  void write(int64_t row, Pair* pairs, int64_t count) const {
    if (k < count) std::nth_element(pairs, pairs + k, pairs + count);
    std::sort(pairs, pairs + std::min(k, count));
    for (int64_t c = count; c < k; ++c) pairs[c] = {std::numeric_limits<double>::infinity(), -1};
    for (int64_t c = 0; c < k; ++c) {
      index[row * k + c] = pairs[c].index;
      if (!distance) continue;
      const double value = metric_value(pairs[c].distance, metric, unscale);
      if (dtype == DType::kFloat64)
        static_cast<double*>(distance)[row * k + c] = value;
      else
        static_cast<float*>(distance)[row * k + c] = static_cast<float>(value);
    }
  }
};

}  // namespace

void nearest_neighbors_select_cpu(const Features& x, const Features& x2, const Features& y, const Features& y2,
                                  DType dtype, int64_t D, Metric metric, double unscale, const Bounds& left_bounds,
                                  const Bounds& right_bounds, const Candidates& left, int32_t* index, void* distance,
                                  DType distance_dtype, uint8_t* unsure, float* kth_upper, const Place& place) {
  const ExactDistances exact = exact_distances_function(dtype, x.factor != nullptr);
  const Rows rows{x, x2}, columns{y, y2};
  const Output output{index, distance, distance_dtype, left.k, metric, unscale};
  parallel_for(x.rows + x2.rows, place.threads, [&](int64_t begin, int64_t end, int) {
    float upper[kMaxCapacity];
    int32_t chosen[kMaxCapacity];
    double measured[kMaxCapacity];
    Pair pairs[kMaxCapacity];
    for (int64_t i = begin; i < end; ++i) {
      const float* const lower = left.lower + i * left.capacity;
      const int32_t* const candidate = left.index + i * left.capacity;
      const int64_t count = left.count[i];
      for (int64_t c = 0; c < count; ++c)
        upper[c] = upper_bound(lower[c], candidate[c], left_bounds.window[i], right_bounds.window);
      const int64_t k = std::min(left.k, count);  // fewer only where the threshold was known before
      kth_upper[i] = k ? bound_of_smallest(upper, count, k) : -kInf;
      unsure[i] = kth_upper[i] >= left.cut[i];
      if (unsure[i]) continue;
      // The k that look nearest are measured first: none of the others is among the nearest if its lower bound is
      // beyond the farthest of them.
      const float first = k ? bound_of_smallest(lower, count, k) : -kInf;
      double farthest = std::numeric_limits<double>::infinity();
      int64_t kept = 0;
      for (const bool rest : {false, true}) {
        const int64_t done = kept;
        for (int64_t c = 0; c < count; ++c)
          if ((lower[c] > first) == rest && lower[c] <= farthest)
            chosen[kept++] = candidate[c] < 0 ? ~candidate[c] : candidate[c];
        exact(rows, i, columns, chosen + done, kept - done, D, measured + done);
        if (!rest && kept) farthest = *std::max_element(measured, measured + kept);
      }
      for (int64_t c = 0; c < kept; ++c) pairs[c] = {measured[c], chosen[c]};
      output.write(i, pairs, kept);
    }
  });
}

void nearest_neighbors_rescan_cpu(const float* block, int64_t ld, const int64_t* rows, int64_t count, const Features& x,
                                  const Features& x2, const Features& y, const Features& y2, DType dtype, int64_t D,
                                  Metric metric, double unscale, const Bounds& left_bounds, const Bounds& right_bounds,
                                  const float* kth_upper, const int32_t* same, int64_t k, int32_t* index,
                                  void* distance, DType distance_dtype, void* workspace, const Place& place) {
  const ExactDistance exact = exact_distance_function(dtype, x.factor != nullptr);
  const Rows left{x, x2}, right{y, y2};
  const int64_t columns = y.rows + y2.rows;
  const Output output{index, distance, distance_dtype, k, metric, unscale};
  parallel_for(count, place.threads, [&](int64_t begin, int64_t end, int thread) {
    Pair* const pairs = static_cast<Pair*>(workspace) + thread * (columns + (columns + 1) / 2);
    double* const known = reinterpret_cast<double*>(pairs + columns);  // distances to rows that others are equal to
    std::fill(known, known + columns, -1.0);
    for (int64_t r = begin; r < end; ++r) {
      const int64_t i = rows[r];
      const float shrunk = left_bounds.norm[i] - left_bounds.window[i];
      const auto lower_of = [&](int64_t j) {
        return -2 * block[r * ld + j] + (right_bounds.norm[j] - right_bounds.window[j]) + shrunk;
      };
      // These products may be more accurate than those of the scan.
      float* const upper = reinterpret_cast<float*>(pairs);
      for (int64_t j = 0; j < columns; ++j)
        upper[j] = lower_of(j) + 2 * (left_bounds.window[i] + right_bounds.window[j]);
      std::nth_element(upper, upper + k - 1, upper + columns);
      const float threshold = std::min(kth_upper[i], upper[k - 1]);
      int64_t kept = 0;
      for (int64_t j = 0; j < columns; ++j) {
        if (!(lower_of(j) <= threshold)) continue;
        const int64_t first = same ? same[j] : j;
        if (known[first] < 0) known[first] = exact(left.of(i), left.local(i), right.of(j), right.local(j), D);
        pairs[kept].distance = known[first];
        pairs[kept++].index = static_cast<int32_t>(j);
      }
      for (int64_t c = 0; c < kept; ++c) known[same ? same[pairs[c].index] : pairs[c].index] = -1.0;
      output.write(i, pairs, kept);
    }
  });
}

}  // namespace vareid
