#include "pairwise_distance.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "cpu/exact_distance.h"
#include "cpu/float_products.h"
#include "cpu/parallel.h"
#include "cpu/simd.h"

namespace vareid {
namespace {

// A distance below this share of n_i + n_j is summed again: the product's error is then below 2e-4 of the distance. So
// is one so small that its products may have been flushed to 0.
constexpr float kCancellation = 1.0f / 32;
constexpr float kFlushed = 0x1p-60f;
constexpr int64_t kChunk = 64;  // columns tested at once for such a distance

VAREID_INLINE bool is_small(float distance, float norms) {
  return distance < std::max(kCancellation * norms, kFlushed);
}

template <typename T>
VAREID_INLINE double max_abs_row(const T* x, int64_t D) {
  using Acc = typename Accumulator<T>::type;
  Acc largest = 0, poison = 0;
#pragma omp simd reduction(max : largest) reduction(+ : poison)
  for (int64_t d = 0; d < D; ++d) {
    const Acc value = load(x + d);
    poison += value * 0;  // 0, or NaN for NaN and Inf
    largest = std::max(largest, std::abs(value));
  }
  return poison == 0 ? static_cast<double>(largest) : std::numeric_limits<double>::quiet_NaN();
}

template <typename T>
VAREID_INLINE double norm_row(const T* x, double factor, int64_t D) {
  double sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t d = 0; d < D; ++d) {
    const double value = factor * load(x + d);
    sum += value * value;
  }
  return sum;
}

template <typename T>
VAREID_INLINE float prepare_row(const T* x, double factor, const double* center, float* out, int64_t D) {
  double sum = 0;
  if (center) {
#pragma omp simd reduction(+ : sum)
    for (int64_t d = 0; d < D; ++d) {
      const float value = static_cast<float>(factor * load(x + d) - center[d]);
      out[d] = value;
      sum += static_cast<double>(value) * value;
    }
  } else {
#pragma omp simd reduction(+ : sum)
    for (int64_t d = 0; d < D; ++d) {
      const float value = static_cast<float>(factor * load(x + d));
      out[d] = value;
      sum += static_cast<double>(value) * value;
    }
  }
  return static_cast<float>(sum);
}

VAREID_INLINE double factor_of(const Features& x, int64_t row) { return x.factor ? x.factor[row] : 1.0; }

#define VAREID_FEATURE_ROWS(T)                                                                                         \
  VAREID_MULTIVERSION void max_abs_rows(const T* data, const Features& x, int64_t D, double* out, int64_t begin,       \
                                        int64_t end) {                                                                 \
    for (int64_t r = begin; r < end; ++r) out[r] = max_abs_row<T>(data + r * x.stride, D);                             \
  }                                                                                                                    \
  VAREID_MULTIVERSION void norm_rows(const T* data, const Features& x, int64_t D, double* out, int64_t begin,          \
                                     int64_t end) {                                                                    \
    for (int64_t r = begin; r < end; ++r) out[r] = norm_row<T>(data + r * x.stride, factor_of(x, r), D);               \
  }                                                                                                                    \
  VAREID_MULTIVERSION void prepare_rows(const T* data, const Features& x, int64_t D, const double* center, float* out, \
                                        float* norm, int64_t begin, int64_t end) {                                     \
    for (int64_t r = begin; r < end; ++r)                                                                              \
      norm[r] = prepare_row<T>(data + r * x.stride, factor_of(x, r), center, out + r * D, D);                          \
  }

VAREID_FEATURE_ROWS(float)
VAREID_FEATURE_ROWS(double)
VAREID_FEATURE_ROWS(float16)
VAREID_FEATURE_ROWS(bfloat16)
#undef VAREID_FEATURE_ROWS

// Squared distances of a row of products, which may be `row`; returns for each chunk whether any of them is small.
VAREID_MULTIVERSION void squared_row(const float* products, float x_norm, const float* __restrict__ y_norm, float* row,
                                     int64_t columns, uint8_t* __restrict__ small) {
  for (int64_t begin = 0; begin < columns; begin += kChunk) {
    const int64_t n = std::min(kChunk, columns - begin);
    const float* const product = products + begin;
    float* const part = row + begin;
    const float* const norm = y_norm + begin;
    int any = 0;
#pragma omp simd reduction(| : any)
    for (int64_t c = 0; c < n; ++c) {
      const float sum = x_norm + norm[c];
      const float distance = sum - 2 * product[c];
      part[c] = std::max(distance, 0.0f);
      any |= is_small(distance, sum);
    }
    small[begin / kChunk] = any != 0;
  }
}

// In float64, so that a scale beyond float32's range leaves 0 at 0.
VAREID_MULTIVERSION void scale_row(float* row, int64_t columns, double scale) {
  for (int64_t c = 0; c < columns; ++c) row[c] = static_cast<float>(row[c] * scale);
}

VAREID_MULTIVERSION void root_row(float* row, int64_t columns) {
  for (int64_t c = 0; c < columns; ++c) row[c] = std::sqrt(row[c]);
}

// Turns products into distances: of row r and up to kSegment columns.
class Finish {
 public:
  static constexpr int64_t kSegment = 64 * kChunk;

  Finish(const Features& x, const Features& y, DType dtype, int64_t D, const float* x_norm, const float* y_norm,
         Metric metric, double unscale)
      : x_(x),
        y_(y),
        D_(D),
        x_norm_(x_norm),
        y_norm_(y_norm),
        exact_(exact_distance_function(dtype, x.factor != nullptr)),
        rooted_(metric == Metric::kEuclidean),
        scale_(metric == Metric::kCosine ? 0.5 : unscale * (rooted_ ? 1 : unscale)) {}

  void operator()(const float* products, int64_t r, int64_t c0, int64_t n, float* row) const {
    uint8_t small[kSegment / kChunk];
    int32_t again[kSegment];
    squared_row(products, x_norm_[r], y_norm_ + c0, row, n, small);
    int64_t found = 0;
    for (int64_t chunk = 0; chunk * kChunk < n; ++chunk) {
      if (!small[chunk]) continue;
      for (int64_t c = chunk * kChunk; c < std::min(n, (chunk + 1) * kChunk); ++c)
        if (is_small(row[c], x_norm_[r] + y_norm_[c0 + c])) again[found++] = static_cast<int32_t>(c);
    }
    if (rooted_) root_row(row, n);
    if (scale_ != 1) scale_row(row, n, scale_);
    for (int64_t a = 0; a < found; ++a) {
      const double squared = exact_(x_, r, y_, c0 + again[a], D_);
      row[again[a]] = static_cast<float>((rooted_ ? std::sqrt(squared) : squared) * scale_);
    }
  }

 private:
  const Features &x_, &y_;
  const int64_t D_;
  const float *const x_norm_, *const y_norm_;
  const ExactDistance exact_;
  const bool rooted_;
  const double scale_;
};

// Columns that are packed, and rows whose products stay in the first-level cache until they are distances.
constexpr int64_t kStripColumns = kChunk, kStripRows = 64;
static_assert(kStripColumns % kFloatPanel == 0, "strips are whole panels");

int64_t strip_floats(int64_t D) { return kStripColumns * (kStripRows + D); }

}  // namespace

void pairwise_distance_max_abs_cpu(const Features& x, DType dtype, int64_t D, double* max_abs, const Place& place) {
  dispatch_float(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    parallel_for(x.rows, paying_threads(x.rows * D, place.threads), [&](int64_t begin, int64_t end, int) {
      max_abs_rows(static_cast<const T*>(x.data), x, D, max_abs, begin, end);
    });
  });
}

void pairwise_distance_norm_cpu(const Features& x, DType dtype, int64_t D, double* norm, const Place& place) {
  dispatch_float(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    parallel_for(x.rows, paying_threads(x.rows * D, place.threads), [&](int64_t begin, int64_t end, int) {
      norm_rows(static_cast<const T*>(x.data), x, D, norm, begin, end);
    });
  });
}

void pairwise_distance_prepare_cpu(const Features& x, DType dtype, int64_t D, const double* center, float* out,
                                   float* norm, const Place& place) {
  dispatch_float(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    parallel_for(x.rows, paying_threads(x.rows * D, place.threads), [&](int64_t begin, int64_t end, int) {
      prepare_rows(static_cast<const T*>(x.data), x, D, center, out, norm, begin, end);
    });
  });
}

void pairwise_distance_block_cpu(float* block, int64_t ld, const Features& x, const Features& y, DType dtype, int64_t D,
                                 const float* x_norm, const float* y_norm, Metric metric, double unscale, float* mirror,
                                 int64_t mirror_ld, const Place& place) {
  const Finish finish(x, y, dtype, D, x_norm, y_norm, metric, unscale);
  constexpr int64_t kTile = 16;  // rows finished before they are mirrored, so that the mirror's stores share lines
  const int64_t tiles = (x.rows + kTile - 1) / kTile;
  parallel_for(tiles, paying_threads(x.rows * y.rows, place.threads), [&](int64_t first, int64_t last, int) {
    for (int64_t tile = first; tile < last; ++tile) {
      const int64_t begin = tile * kTile, end = std::min(x.rows, begin + kTile);
      for (int64_t c0 = 0; c0 < y.rows; c0 += Finish::kSegment) {
        const int64_t n = std::min(Finish::kSegment, y.rows - c0);
        for (int64_t r = begin; r < end; ++r) finish(block + r * ld + c0, r, c0, n, block + r * ld + c0);
        if (mirror)
          for (int64_t c = c0; c < c0 + n; ++c)
            for (int64_t r = begin; r < end; ++r) mirror[c * mirror_ld + r] = block[r * ld + c];
      }
    }
  });
}

int64_t pairwise_distance_strip_bytes_cpu(int64_t D) {
  return float_products() ? strip_floats(D) * static_cast<int64_t>(sizeof(float)) : 0;
}

void pairwise_distance_strips_cpu(const float* x_prepared, int64_t x_stride, const float* y_prepared, int64_t y_stride,
                                  float* block, int64_t ld, const Features& x, const Features& y, DType dtype,
                                  int64_t D, const float* x_norm, const float* y_norm, Metric metric, double unscale,
                                  void* workspace, const Place& place) {
  const Finish finish(x, y, dtype, D, x_norm, y_norm, metric, unscale);
  const int64_t strips = (y.rows + kStripColumns - 1) / kStripColumns;
  const int64_t elements = y.rows * (D + x.rows + x.rows * D / 64);
  parallel_for(strips, paying_threads(elements, place.threads), [&](int64_t first, int64_t last, int thread) {
    float* const products = static_cast<float*>(workspace) + thread * strip_floats(D);
    float* const panels = products + kStripRows * kStripColumns;
    for (int64_t c0 = first * kStripColumns; c0 < std::min(y.rows, last * kStripColumns); c0 += kStripColumns) {
      const int64_t n = std::min(kStripColumns, y.rows - c0);
      for (int64_t c = 0; c < n; c += kFloatPanel)
        float_pack(y_prepared + (c0 + c) * y_stride, y_stride, n - c, D, panels + c * D);
      for (int64_t r0 = 0; r0 < x.rows; r0 += kStripRows) {
        const int64_t rows = std::min(kStripRows, x.rows - r0);
        float_product(x_prepared + r0 * x_stride, x_stride, rows, panels, n, D, products, kStripColumns);
        for (int64_t r = 0; r < rows; ++r)
          finish(products + r * kStripColumns, r0 + r, c0, n, block + (r0 + r) * ld + c0);
      }
    }
  });
}

}  // namespace vareid
