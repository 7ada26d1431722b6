#include "viewpoint_aware_cross_entropy.h"

#include <algorithm>

#include "cpu/cross_entropy_rows.h"
#include "cpu/parallel.h"
#include "cpu/simd.h"

namespace vareid {
namespace {

int64_t elements_of_row(int64_t K, const int64_t views[2]) { return K * (views[0] + views[1]); }

SampleViews views_of(const CrossEntropyHead& head, int64_t i, int64_t y) {
  const int64_t V = head.views;
  return SampleViews(V, head.mask ? head.mask + y * V : nullptr,
                     head.distribution ? head.distribution + i * V : nullptr, head.viewpoint ? head.viewpoint[i] : -1);
}

template <typename T>
const T* row_of(const CrossEntropyHead& head, int64_t i) {
  return static_cast<const T*>(head.logits) + i * head.row_stride;
}

template <typename T>
void prefetch_row(const CrossEntropyHead& head, int64_t i, int64_t N, int64_t K) {
  if (!head.present || i >= N) return;
  const char* const row = reinterpret_cast<const char*>(row_of<T>(head, i));
  const int64_t bytes = K * head.views * static_cast<int64_t>(sizeof(T));
  for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(row + at, 0, 2);
}

const uint8_t* from(const uint8_t* mask, int64_t begin) { return mask ? mask + begin : nullptr; }

template <typename T>
void forward(const CrossEntropyHead heads[2], const int64_t* identity, int64_t N, int64_t K, Reduction reduction,
             void* workspace, int threads) {
  using Acc = typename Accumulator<T>::type;
  const int64_t views[2] = {heads[0].present ? heads[0].views : 0, heads[1].present ? heads[1].views : 0};
  const int64_t parts = parts_of_row(N, elements_of_row(K, views));
  OthersSummary* const summaries = static_cast<OthersSummary*>(workspace);      // [N, parts, 2]
  double* const losses = reinterpret_cast<double*>(summaries + N * parts * 2);  // [2, N]
  const auto finish = [&](int64_t i) {
    const int64_t y = identity[i];
    for (int h = 0; h < 2; ++h) {
      if (!heads[h].present) continue;
      OthersSummary others = summaries[i * parts * 2 + h];
      for (int64_t part = 1; part < parts; ++part) merge(others, summaries[(i * parts + part) * 2 + h]);
      const T* const own = row_of<T>(heads[h], i) + y * heads[h].views;
      RowStatistics row;
      losses[h * N + i] = finish_row(
          others, [&](int64_t k) { return static_cast<double>(load(own + k)); }, views_of(heads[h], i, y),
          Smoothing{heads[h].adaptive, heads[h].alpha, heads[h].epsilon}, row);
      store_statistics(heads[h].statistics, N, i, row);
    }
  };
  const int workers = worthwhile_threads(N * elements_of_row(K, views), threads);
  parallel_for(N * parts, workers, [&](int64_t begin, int64_t end, int) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t i = task / parts, part = task % parts;
      if (parts == 1)
        for (int h = 0; h < 2; ++h) prefetch_row<T>(heads[h], i + 1, N, K);
      for (int h = 0; h < 2; ++h) {
        if (!heads[h].present) continue;
        const int64_t V = heads[h].views, own = identity[i] * V;
        const T* const row = row_of<T>(heads[h], i);
        OthersSummary summary;
        visit_others(K * V, own, own + V, part, parts, [&](int64_t first, int64_t last) {
          summarise(row + first, from(heads[h].mask, first), nullptr, last - first, summary);
        });
        summaries[task * 2 + h] = summary;
      }
      if (parts == 1) finish(i);
    }
  });
  if (parts > 1)
    parallel_for(N, workers, [&](int64_t begin, int64_t end, int) {
      for (int64_t i = begin; i < end; ++i) finish(i);
    });
  for (int h = 0; h < 2; ++h) {
    if (!heads[h].present) continue;
    Acc* const out = static_cast<Acc*>(heads[h].loss);
    double total = 0;  // in order, so that it does not depend on the number of threads
    for (int64_t i = 0; i < N; ++i) {
      if (reduction == Reduction::kNone) out[i] = static_cast<Acc>(losses[h * N + i]);
      total += losses[h * N + i];
    }
    if (reduction != Reduction::kNone)
      *out = static_cast<Acc>(reduction == Reduction::kMean ? total / static_cast<double>(N) : total);
  }
}

template <typename T>
void backward(const CrossEntropyHead heads[2], const int64_t* identity, int64_t N, int64_t K, Reduction reduction,
              int threads) {
  using Acc = typename Accumulator<T>::type;
  const int64_t views[2] = {heads[0].present ? heads[0].views : 0, heads[1].present ? heads[1].views : 0};
  const int64_t parts = parts_of_row(N, elements_of_row(K, views));
  const double share = reduction == Reduction::kMean ? 1 / static_cast<double>(N) : 1.0;
  const int workers = worthwhile_threads(N * elements_of_row(K, views), threads);
  const auto rows = [&](int64_t begin, int64_t end, int) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t i = task / parts, part = task % parts, y = identity[i];
      if (parts == 1)
        for (int h = 0; h < 2; ++h) prefetch_row<T>(heads[h], i + 1, N, K);
      for (int h = 0; h < 2; ++h) {
        if (!heads[h].present) continue;
        const int64_t V = heads[h].views, own = y * V;
        const RowStatistics row = load_statistics(heads[h].statistics, N, i);
        const Acc* const upstream = static_cast<const Acc*>(heads[h].upstream);
        const double factor = static_cast<double>(upstream[reduction == Reduction::kNone ? i : 0]) * share;
        const T* const logits = row_of<T>(heads[h], i);
        T* const grad = static_cast<T*>(heads[h].grad) + i * K * V;
        visit_others(K * V, own, own + V, part, parts, [&](int64_t first, int64_t last) {
          others_gradient(logits + first, from(heads[h].mask, first), nullptr, grad + first, last - first, row, factor);
        });
        if (part == 0) own_gradient<T>(logits + own, nullptr, grad + own, views_of(heads[h], i, y), row, factor);
      }
    }
  };
  parallel_for(N * parts, workers, rows);
}

}  // namespace

int64_t viewpoint_aware_cross_entropy_workspace_bytes_cpu(int64_t N, int64_t K, const int64_t views[2]) {
  const int64_t parts = parts_of_row(N, elements_of_row(K, views));
  return N * parts * 2 * static_cast<int64_t>(sizeof(OthersSummary)) + 2 * N * static_cast<int64_t>(sizeof(double));
}

void viewpoint_aware_cross_entropy_forward_cpu(const CrossEntropyHead heads[2], const int64_t* identity, DType dtype,
                                               int64_t N, int64_t K, Reduction reduction, int64_t*, void* workspace,
                                               const Place& place) {
  dispatch_float(dtype, [&](auto type) {
    forward<typename decltype(type)::type>(heads, identity, N, K, reduction, workspace, place.threads);
  });
}

void viewpoint_aware_cross_entropy_backward_cpu(const CrossEntropyHead heads[2], const int64_t* identity, DType dtype,
                                                int64_t N, int64_t K, Reduction reduction, const Place& place) {
  dispatch_float(dtype, [&](auto type) {
    backward<typename decltype(type)::type>(heads, identity, N, K, reduction, place.threads);
  });
}

}  // namespace vareid
