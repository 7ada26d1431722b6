#include "cpu/cross_entropy_rows.h"

#include <algorithm>

#include "cpu/exponential.h"

namespace vareid {
namespace {

constexpr int64_t kChunk = 2048;  // subclasses whose sums are kept in the element's accumulator; then they are widened
// How far a logit may exceed the reference of its chunk's exponentials: the difference is rounded to 2^-24 of its size,
// and that is the relative error of the exponential.
constexpr double kHeadroom = 1;

template <typename Acc>
struct ChunkSums {
  Acc largest, total, sum;
  int32_t count;
};

template <typename T, bool kMasked, bool kScaled, typename Acc>
VAREID_INLINE Acc logit_at(const T* logits, const uint8_t* mask, const Acc* scale, int64_t j) {
  const Acc value = kScaled ? load(logits + j) * scale[j] : load(logits + j);
  return kMasked ? (mask[j] ? value : -std::numeric_limits<Acc>::infinity()) : value;
}

template <typename T, bool kMasked, bool kScaled, typename Acc>
VAREID_INLINE ChunkSums<Acc> chunk_sums(const T* logits, const uint8_t* mask, const Acc* scale, int64_t n,
                                        Acc reference) {
  Acc largest = -std::numeric_limits<Acc>::infinity(), total = 0, sum = 0;
  int32_t count = 0;
#pragma omp simd reduction(max : largest) reduction(+ : total, sum, count)
  for (int64_t j = 0; j < n; ++j) {
    const Acc value = logit_at<T, kMasked, kScaled, Acc>(logits, mask, scale, j);
    const Acc shifted = value - reference;
    largest = value > largest ? value : largest;
    total += exponential(shifted);
    if (kMasked) {
      sum += mask[j] ? shifted : Acc(0);
      count += mask[j] ? 1 : 0;
    } else {
      sum += shifted;
    }
  }
  return {largest, total, sum, kMasked ? count : static_cast<int32_t>(n)};
}

template <typename T, bool kMasked, bool kScaled, typename Acc>
VAREID_INLINE Acc chunk_largest(const T* logits, const uint8_t* mask, const Acc* scale, int64_t n) {
  Acc largest = -std::numeric_limits<Acc>::infinity();
#pragma omp simd reduction(max : largest)
  for (int64_t j = 0; j < n; ++j) {
    const Acc value = logit_at<T, kMasked, kScaled, Acc>(logits, mask, scale, j);
    largest = value > largest ? value : largest;
  }
  return largest;
}

// One pass: the exponentials are taken against a reference that is only moved where a logit exceeds it clearly, which
// is rare after the first chunk.
template <typename T, bool kMasked, bool kScaled, typename Acc>
VAREID_INLINE void summarise_part(const T* logits, const uint8_t* mask, const Acc* scale, int64_t n,
                                  OthersSummary& summary) {
  double reference = summary.largest, largest = summary.largest, total = summary.total;
  for (int64_t begin = 0; begin < n; begin += kChunk) {
    const int64_t size = std::min(kChunk, n - begin);
    const T* const x = logits + begin;
    const uint8_t* const exists = kMasked ? mask + begin : nullptr;
    const Acc* const factor = kScaled ? scale + begin : nullptr;
    if (reference == -std::numeric_limits<double>::infinity()) {
      reference = chunk_largest<T, kMasked, kScaled, Acc>(x, exists, factor, size);
      if (reference == -std::numeric_limits<double>::infinity()) {  // nothing possible here: all are -inf (or NaN)
        for (int64_t j = 0; j < size; ++j) {
          if (kMasked && !exists[j]) continue;
          const Acc value = logit_at<T, kMasked, kScaled, Acc>(x, exists, factor, j);
          if (value != value) total = value;
          summary.sum += value;
          summary.count += 1;
        }
        continue;
      }
    }
    ChunkSums<Acc> sums = chunk_sums<T, kMasked, kScaled, Acc>(x, exists, factor, size, static_cast<Acc>(reference));
    if (sums.largest > reference + kHeadroom) {
      total *= rescale(reference, sums.largest);
      reference = sums.largest;
      sums = chunk_sums<T, kMasked, kScaled, Acc>(x, exists, factor, size, static_cast<Acc>(reference));
    }
    largest = std::max(largest, static_cast<double>(sums.largest));
    total += static_cast<double>(sums.total);
    summary.sum += static_cast<double>(sums.sum) + sums.count * reference;
    summary.count += sums.count;
  }
  summary.total = reference == largest ? total : total * exp(reference - largest);
  summary.largest = largest;
}

template <typename T, bool kMasked, bool kScaled, typename Acc>
VAREID_INLINE void gradient_part(const T* logits, const uint8_t* mask, const Acc* scale, T* grad, int64_t n,
                                 Acc largest, Acc inverse, Acc other) {
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) {
    const Acc value = kScaled ? load(logits + j) * scale[j] : load(logits + j);
    const Acc slope = exponential(value - largest) * inverse - other;
    const Acc scaled = kScaled ? slope * scale[j] : slope;
    store(grad + j, kMasked ? (mask[j] ? scaled : Acc(0)) : scaled);
  }
}

// target_clones does not reach templates: one plain function for each element type.
#define VAREID_ROWS(T, Acc)                                                                                      \
  VAREID_MULTIVERSION void summarise_versions(const T* logits, const uint8_t* mask, const Acc* scale, int64_t n, \
                                              OthersSummary& summary) {                                          \
    if (mask && scale)                                                                                           \
      summarise_part<T, true, true, Acc>(logits, mask, scale, n, summary);                                       \
    else if (mask)                                                                                               \
      summarise_part<T, true, false, Acc>(logits, mask, scale, n, summary);                                      \
    else if (scale)                                                                                              \
      summarise_part<T, false, true, Acc>(logits, mask, scale, n, summary);                                      \
    else                                                                                                         \
      summarise_part<T, false, false, Acc>(logits, mask, scale, n, summary);                                     \
  }                                                                                                              \
  VAREID_MULTIVERSION void gradient_versions(const T* logits, const uint8_t* mask, const Acc* scale, T* grad,    \
                                             int64_t n, Acc largest, Acc inverse, Acc other) {                   \
    if (mask && scale)                                                                                           \
      gradient_part<T, true, true, Acc>(logits, mask, scale, grad, n, largest, inverse, other);                  \
    else if (mask)                                                                                               \
      gradient_part<T, true, false, Acc>(logits, mask, scale, grad, n, largest, inverse, other);                 \
    else if (scale)                                                                                              \
      gradient_part<T, false, true, Acc>(logits, mask, scale, grad, n, largest, inverse, other);                 \
    else                                                                                                         \
      gradient_part<T, false, false, Acc>(logits, mask, scale, grad, n, largest, inverse, other);                \
  }

VAREID_ROWS(float, float)
VAREID_ROWS(double, double)
VAREID_ROWS(float16, float)
VAREID_ROWS(bfloat16, float)
#undef VAREID_ROWS

}  // namespace

#define VAREID_ROWS(T, Acc)                                                                                   \
  void summarise(const T* logits, const uint8_t* mask, const Acc* scale, int64_t n, OthersSummary& summary) { \
    summarise_versions(logits, mask, scale, n, summary);                                                      \
  }                                                                                                           \
  void others_gradient(const T* logits, const uint8_t* mask, const Acc* scale, T* grad, int64_t n,            \
                       const RowStatistics& row, double upstream) {                                           \
    gradient_versions(logits, mask, scale, grad, n, static_cast<Acc>(row.largest),                            \
                      static_cast<Acc>(row.inverse * upstream), static_cast<Acc>(row.other * upstream));      \
  }

VAREID_ROWS(float, float)
VAREID_ROWS(double, double)
VAREID_ROWS(float16, float)
VAREID_ROWS(bfloat16, float)
#undef VAREID_ROWS

}  // namespace vareid
