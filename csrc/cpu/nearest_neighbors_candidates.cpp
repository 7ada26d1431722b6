#include "cpu/nearest_neighbors_candidates.h"

#include <cmath>

namespace vareid {

// Halving the range of values takes a third of the time of a selection.
VAREID_MULTIVERSION float bound_of_smallest(const float* values, int64_t count, int64_t k) {
  int32_t keys[kMaxCapacity];
  int32_t first = std::numeric_limits<int32_t>::max(), last = std::numeric_limits<int32_t>::min();
#pragma omp simd reduction(min : first) reduction(max : last)
  for (int64_t c = 0; c < count; ++c) {
    keys[c] = order_of(values[c]);
    first = std::min(first, keys[c]);
    last = std::max(last, keys[c]);
  }
  int64_t low = first, high = last;
  while (low < high) {
    const int64_t middle = low + (high - low) / 2;
    const int32_t key = static_cast<int32_t>(middle);
    int32_t below = 0;
#pragma omp simd reduction(+ : below)
    for (int64_t c = 0; c < count; ++c) below += keys[c] <= key;
    if (below >= k) high = middle;
    if (below == k) break;
    if (below < k) low = middle + 1;
  }
  return float_at(static_cast<int32_t>(high));
}

void compact(const Candidates& state, int64_t row, float window, const float* other_window, const Measure* measure) {
  float* const lower = state.lower + row * state.capacity;
  int32_t* const index = state.index + row * state.capacity;
  float scratch[kMaxCapacity], threshold;
  int64_t kept = state.count[row];
  const auto drop = [&] {
    for (int64_t c = 0; c < kept; ++c) scratch[c] = upper_bound(lower[c], index[c], window, other_window);
    threshold = bound_of_smallest(scratch, kept, state.k);
    const int64_t count = kept;
    kept = 0;
    for (int64_t c = 0; c < count; ++c) {  // without a branch: which ones stay cannot be foreseen
      const float value = lower[c];
      lower[kept] = value;
      index[kept] = index[c];
      kept += value <= threshold;
    }
  };
  drop();
  const int64_t limit = state.capacity - std::max<int64_t>((state.capacity - state.k) / 4, 1);
  if (kept > limit && measure) {
    state.crowded[row] = true;
    int32_t open[kMaxCapacity];
    double distance[kMaxCapacity];
    int64_t count = 0;
    for (int64_t c = 0; c < kept; ++c)
      if (index[c] >= 0) open[count++] = index[c];
    (*measure)(row, open, count, distance);
    count = 0;
    for (int64_t c = 0; c < kept; ++c) {
      if (index[c] < 0) continue;
      lower[c] = std::nextafter(static_cast<float>(distance[count++]), -kInf);
      index[c] = ~index[c];
    }
    drop();
  }
  if (kept > limit) {
    std::copy(lower, lower + kept, scratch);
    std::nth_element(scratch, scratch + limit, scratch + kept);
    const float lost = scratch[limit];
    state.cut[row] = std::min(state.cut[row], lost);
    int64_t equal = limit;  // room for those at the value itself
    for (int64_t c = 0; c < kept; ++c) equal -= lower[c] < lost;
    int64_t left = 0;
    for (int64_t c = 0; c < kept; ++c) {
      if (!(lower[c] < lost) && (lower[c] > lost || equal-- <= 0)) continue;
      lower[left] = lower[c];
      index[left++] = index[c];
    }
    kept = left;
    threshold = std::nextafter(lost, -kInf);
  }
  state.count[row] = static_cast<int32_t>(kept);
  state.threshold[row] = std::min(state.threshold[row], threshold);
}

void FarPairs::settle(int64_t i, int64_t room) const {
  float* const upper = state.upper + i * kFarthest;
  int32_t* const index = state.index + i * kFarthest;
  int32_t kept = 0;
  for (int32_t c = 0; c < state.count[i]; ++c) {
    if (!(upper[c] >= row_max[i])) continue;
    upper[kept] = upper[c];
    index[kept++] = index[c];
  }
  if (kept > room) {
    double distance[kFarthest];
    measure(i, index, kept, distance);
    for (int32_t c = 0; c < kept; ++c) row_max[i] = std::max(row_max[i], static_cast<float>(distance[c]));
    kept = 0;
  }
  state.count[i] = kept;
}

}  // namespace vareid
