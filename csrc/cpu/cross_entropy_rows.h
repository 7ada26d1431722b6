// Rows of the soft-label cross-entropy on the CPU, shared by the ops that have them. `mask` (a byte for each subclass,
// 0 = it does not exist) and `scale` (a factor of each logit) may be null.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "cpu/simd.h"
#include "soft_target.h"

namespace vareid {

// Few long rows are cut into parts to keep all threads busy; how many does not depend on the number of threads.
constexpr int64_t kTasks = 64;
constexpr int64_t kRowPart = 32 * 1024;
inline int64_t parts_of_row(int64_t N, int64_t elements) {
  const int64_t wanted = (kTasks + N - 1) / std::max<int64_t>(N, 1);
  return std::max<int64_t>(1, std::min(wanted, (elements + kRowPart - 1) / kRowPart));
}

// How many threads to wake for so many elements: waking one takes as long as some ten thousands.
constexpr int64_t kElementsPerThread = 64 * 1024;
inline int worthwhile_threads(int64_t elements, int threads) {
  return static_cast<int>(std::min<int64_t>(threads, std::max<int64_t>(1, elements / kElementsPerThread)));
}

// Adds the subclasses at [0, n) to the summary.
void summarise(const float* logits, const uint8_t* mask, const float* scale, int64_t n, OthersSummary& summary);
void summarise(const double* logits, const uint8_t* mask, const double* scale, int64_t n, OthersSummary& summary);
void summarise(const float16* logits, const uint8_t* mask, const float* scale, int64_t n, OthersSummary& summary);
void summarise(const bfloat16* logits, const uint8_t* mask, const float* scale, int64_t n, OthersSummary& summary);

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

// Calls body(begin, end) on what is left of part `part` of a row's `size` subclasses without the own ones.
template <typename Body>
void visit_others(int64_t size, int64_t own_begin, int64_t own_end, int64_t part, int64_t parts, const Body& body) {
  const int64_t begin = size / parts * part + std::min(part, size % parts);
  const int64_t end = begin + size / parts + (part < size % parts ? 1 : 0);
  if (begin < std::min(end, own_begin)) body(begin, std::min(end, own_begin));
  if (std::max(begin, own_end) < end) body(std::max(begin, own_end), end);
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
