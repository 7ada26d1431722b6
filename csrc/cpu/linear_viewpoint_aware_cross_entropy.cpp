#include "linear_viewpoint_aware_cross_entropy.h"

#include <algorithm>
#include <cmath>

#include "cpu/cross_entropy_rows.h"
#include "cpu/parallel.h"
#include "cpu/simd.h"

namespace vareid {
namespace {

bool holds(const LogitsTile& tile, int64_t y) { return y >= tile.first && y < tile.first + tile.identities; }

const uint8_t* mask_at(const LogitsTile& tile, int64_t column) {
  return tile.mask ? tile.mask + tile.first * tile.views + column : nullptr;
}

template <typename Acc>
const Acc* scale_at(const LogitsTile& tile, int64_t column) {
  return tile.scale ? static_cast<const Acc*>(tile.scale) + column : nullptr;
}

SampleViews views_of(const LogitsTile& tile, int64_t i) {
  return SampleViews(tile.views, tile.mask ? tile.mask + tile.identity[i] * tile.views : nullptr,
                     tile.distribution ? tile.distribution + i * tile.views : nullptr,
                     tile.viewpoint ? tile.viewpoint[i] : -1);
}

template <typename T>
void summarise_tile(const LogitsTile& tile, OthersSummary* summaries, int64_t total_parts, int64_t first_part,
                    double* own_logits, int threads) {
  using Acc = typename Accumulator<T>::type;
  const int64_t V = tile.views;
  const int64_t parts = linear_viewpoint_aware_cross_entropy_parts_cpu(tile.N, tile.identities * V);
  const int workers = worthwhile_threads(tile.N * tile.identities * V, threads);
  parallel_for(tile.N * parts, workers, [&](int64_t begin, int64_t end, int) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t i = task / parts, part = task % parts, y = tile.identity[i];
      const T* const row = static_cast<const T*>(tile.logits) + i * tile.row_stride;
      const int64_t own = (y - tile.first) * V;
      OthersSummary summary;
      visit_others(tile.identities * V, own, own + V, part, parts, [&](int64_t first, int64_t last) {
        summarise(row + first, mask_at(tile, first), scale_at<Acc>(tile, first), last - first, summary);
      });
      summaries[i * total_parts + first_part + part] = summary;
      if (part != 0 || !holds(tile, y)) continue;
      for (int64_t k = 0; k < V; ++k) {
        const int64_t j = own + k;
        own_logits[k * tile.N + i] =
            static_cast<double>(load(row + j) * (tile.scale ? *scale_at<Acc>(tile, j) : Acc(1)));
      }
    }
  });
}

template <typename T>
void gradient_tile(const LogitsTile& tile, const double* statistics, const void* upstream, int64_t upstream_stride,
                   double share, int threads) {
  using Acc = typename Accumulator<T>::type;
  const int64_t V = tile.views;
  const int64_t parts = linear_viewpoint_aware_cross_entropy_parts_cpu(tile.N, tile.identities * V);
  const int workers = worthwhile_threads(tile.N * tile.identities * V, threads);
  parallel_for(tile.N * parts, workers, [&](int64_t begin, int64_t end, int) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t i = task / parts, part = task % parts, y = tile.identity[i];
      const int64_t own = (y - tile.first) * V;
      T* const row = static_cast<T*>(tile.logits) + i * tile.row_stride;
      const RowStatistics stats = load_statistics(statistics, tile.N, i);
      const double factor = static_cast<double>(static_cast<const Acc*>(upstream)[i * upstream_stride]) * share;
      visit_others(tile.identities * V, own, own + V, part, parts, [&](int64_t first, int64_t last) {
        others_gradient(row + first, mask_at(tile, first), scale_at<Acc>(tile, first), row + first, last - first, stats,
                        factor);
      });
      if (part != 0 || !holds(tile, y)) continue;
      own_gradient<T>(row + own, scale_at<Acc>(tile, own), row + own, views_of(tile, i), stats, factor);
    }
  });
}

template <typename T, typename Acc>
VAREID_INLINE Acc inverse_norm(const T* x, int64_t D) {
  Acc sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t d = 0; d < D; ++d) sum += load(x + d) * load(x + d);
  return sum == 0 ? Acc(0) : 1 / std::sqrt(sum);
}

template <typename T, typename Acc>
VAREID_INLINE void project_row(const T* x, Acc inverse, T* grad, int64_t D) {
  Acc dot = 0;
#pragma omp simd reduction(+ : dot)
  for (int64_t d = 0; d < D; ++d) dot += load(x + d) * load(grad + d);
  const Acc along = dot * inverse * inverse;
#pragma omp simd
  for (int64_t d = 0; d < D; ++d) store(grad + d, load(grad + d) - along * load(x + d));
}

// target_clones does not reach templates: one plain function for each element type.
#define VAREID_NORMS(T, Acc)                                                                                    \
  VAREID_MULTIVERSION void inverse_norm_rows(const T* x, Acc* inverse, int64_t D, int64_t begin, int64_t end) { \
    for (int64_t i = begin; i < end; ++i) inverse[i] = inverse_norm<T, Acc>(x + i * D, D);                      \
  }                                                                                                             \
  VAREID_MULTIVERSION void project_rows(const T* x, const Acc* inverse, T* grad, int64_t D, int64_t begin,      \
                                        int64_t end) {                                                          \
    for (int64_t i = begin; i < end; ++i) project_row<T, Acc>(x + i * D, inverse[i], grad + i * D, D);          \
  }                                                                                                             \
  VAREID_MULTIVERSION void scale_elements(T* grad, Acc factor, int64_t begin, int64_t end) {                    \
    for (int64_t i = begin; i < end; ++i) store(grad + i, load(grad + i) * factor);                             \
  }

VAREID_NORMS(float, float)
VAREID_NORMS(double, double)
VAREID_NORMS(float16, float)
VAREID_NORMS(bfloat16, float)
#undef VAREID_NORMS

}  // namespace

int64_t linear_viewpoint_aware_cross_entropy_parts_cpu(int64_t N, int64_t columns) { return parts_of_row(N, columns); }

void linear_viewpoint_aware_cross_entropy_summarise_cpu(const LogitsTile& tile, OthersSummary* summaries,
                                                        int64_t total_parts, int64_t first_part, double* own_logits,
                                                        DType dtype, const Place& place) {
  dispatch_float(dtype, [&](auto type) {
    summarise_tile<typename decltype(type)::type>(tile, summaries, total_parts, first_part, own_logits, place.threads);
  });
}

void linear_viewpoint_aware_cross_entropy_finish_cpu(const LogitsTile& tile, const OthersSummary* summaries,
                                                     int64_t total_parts, const double* own_logits,
                                                     const Smoothing& smoothing, double* statistics, void* loss,
                                                     int64_t*, DType dtype, const Place&) {
  for (int64_t i = 0; i < tile.N; ++i) {
    OthersSummary others = summaries[i * total_parts];
    for (int64_t part = 1; part < total_parts; ++part) merge(others, summaries[i * total_parts + part]);
    RowStatistics row;
    const auto own_logit = [&](int64_t k) { return own_logits[k * tile.N + i]; };
    const double value = finish_row(others, own_logit, views_of(tile, i), smoothing, row);
    store_statistics(statistics, tile.N, i, row);
    if (dtype == DType::kFloat64)
      static_cast<double*>(loss)[i] = value;
    else
      static_cast<float*>(loss)[i] = static_cast<float>(value);
  }
}

void linear_viewpoint_aware_cross_entropy_gradient_cpu(const LogitsTile& tile, const double* statistics,
                                                       const void* upstream, int64_t upstream_stride, double share,
                                                       DType dtype, const Place& place) {
  dispatch_float(dtype, [&](auto type) {
    gradient_tile<typename decltype(type)::type>(tile, statistics, upstream, upstream_stride, share, place.threads);
  });
}

void linear_viewpoint_aware_cross_entropy_inverse_norms_cpu(const void* x, void* inverse, int64_t rows, int64_t D,
                                                            DType dtype, const Place& place) {
  dispatch_float(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    using Acc = typename Accumulator<T>::type;
    parallel_for(rows, place.threads, [&](int64_t begin, int64_t end, int) {
      inverse_norm_rows(static_cast<const T*>(x), static_cast<Acc*>(inverse), D, begin, end);
    });
  });
}

void linear_viewpoint_aware_cross_entropy_project_cpu(const void* x, const void* inverse, void* grad, int64_t rows,
                                                      int64_t D, DType dtype, const Place& place) {
  dispatch_float(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    using Acc = typename Accumulator<T>::type;
    parallel_for(rows, place.threads, [&](int64_t begin, int64_t end, int) {
      project_rows(static_cast<const T*>(x), static_cast<const Acc*>(inverse), static_cast<T*>(grad), D, begin, end);
    });
  });
}

void linear_viewpoint_aware_cross_entropy_scale_cpu(void* grad, const void* factor, int64_t n, DType dtype,
                                                    const Place& place) {
  dispatch_float(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    using Acc = typename Accumulator<T>::type;
    const Acc by = *static_cast<const Acc*>(factor);
    if (by == 1) return;
    parallel_for(n, place.threads,
                 [&](int64_t begin, int64_t end, int) { scale_elements(static_cast<T*>(grad), by, begin, end); });
  });
}

}  // namespace vareid
