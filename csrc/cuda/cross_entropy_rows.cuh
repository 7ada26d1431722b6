// Rows of the soft-label cross-entropy on the device, shared by the ops that have them: the names are in
// vareid_ext/reference/viewpoint_aware_cross_entropy.py.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <stdexcept>

#include "cuda/reduce.cuh"
#include "cuda/vector.cuh"
#include "soft_target.h"

namespace vareid {

constexpr int kRowThreads = 256;
constexpr int kRowWarps = kRowThreads / kWarp;
constexpr int kRowBatch = 4;             // packs that a thread has under way at once
constexpr int64_t kRowPart = 16 * 1024;  // subclasses for one block, unless that makes too many blocks
constexpr int kHeldViews = 4;            // own logits of a row that a thread keeps in registers

// The logits of one head, or a block of their columns.
template <typename T>
struct DeviceRows {
  using Acc = typename DeviceAccumulator<T>::type;
  const T* logits;           // [N, columns], rows row_stride apart
  T* grad;                   // [N, columns], rows grad_stride apart; may be the logits
  const uint8_t* mask;       // [columns] or null: 0 = the subclass does not exist
  const Acc* scale;          // [columns] or null: a factor of each logit
  const double* statistics;  // [5, N]
  const Acc* upstream;       // [1], or [N] where each row has its own
  int64_t row_stride, grad_stride;
  int64_t columns;
  int64_t first;            // the first column's subclass, a multiple of V
  int64_t views;            // V
  int64_t parts, part;      // a row is cut into `parts` of `part` columns
  double share;             // factor of the upstream gradient
  int64_t upstream_stride;  // 0 or 1
};

// Host: std::invalid_argument for more rows than a grid surely holds, whatever number of parts each is cut into.
inline void check_samples(int64_t N) {
  if (N > int64_t{1} << 29) throw std::invalid_argument("identity: at most 2^29 samples on a GPU");
}

// Host: cuts the rows so that there are neither very long blocks nor more than a grid can hold.
template <typename T>
void cut_rows(DeviceRows<T>& rows, int64_t N) {
  rows.part = kRowPart;
  while ((rows.columns + rows.part - 1) / rows.part > ((int64_t{1} << 30) - 1) / std::max<int64_t>(N, 1) &&
         rows.part < (int64_t{1} << 30))
    rows.part *= 2;
  rows.parts = std::max<int64_t>(1, (rows.columns + rows.part - 1) / rows.part);
}

// Host: enough warps for a row, with kRowBatch packs for each thread: every warp reads the row's label and statistics.
inline unsigned row_threads(int64_t columns, int64_t width) {
  const int64_t elements = width * kWarp * kRowBatch;
  const int64_t warps = (columns + elements - 1) / elements;
  return static_cast<unsigned>(std::min<int64_t>(std::max<int64_t>(warps, 1), kRowWarps) * kWarp);
}

__device__ __forceinline__ int64_t identity_or_none(const int64_t* __restrict__ identity, int64_t i, int64_t K) {
  const int64_t y = identity[i];
  return y >= 0 && y < K ? y : -1;
}

__device__ __forceinline__ float exponential(float x) { return expf(x); }
__device__ __forceinline__ double exponential(double x) { return exp(x); }

template <typename Acc>
__device__ __forceinline__ Acc minus_infinity() {
  return -std::numeric_limits<Acc>::infinity();
}

// The largest of the threads' values, in every thread; NaN is ignored. Calls that share `partial` need a barrier
// between.
template <int kMaxWarps, typename Acc>
__device__ __forceinline__ Acc block_largest(Acc value, Acc (&partial)[kMaxWarps]) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    const Acc other = __shfl_xor_sync(kFullWarp, value, offset);
    value = value < other ? other : value;
  }
  if (threadIdx.x % kWarp == 0) partial[threadIdx.x / kWarp] = value;
  __syncthreads();
  value = partial[0];
  for (int warp = 1; warp < static_cast<int>(blockDim.x) / kWarp; ++warp)
    value = value < partial[warp] ? partial[warp] : value;
  return value;
}

// A part of a row: where it begins, how long it is, and which of its columns are the sample's own.
struct RowPart {
  int64_t begin;
  int size;
  int own;  // first own column, relative to begin; where there is none, nothing compares equal
  unsigned views;

  template <typename T>
  __device__ __forceinline__ RowPart(const DeviceRows<T>& rows, int64_t part, int64_t identity)
      : begin(part * rows.part),
        size(static_cast<int>(rows.columns - begin < rows.part ? rows.columns - begin : rows.part)),
        own(0),
        views(0) {
    const int64_t first = identity * rows.views - rows.first - begin;
    if (first < size && first + rows.views > 0) {
      own = static_cast<int>(first);
      views = static_cast<unsigned>(rows.views);
    }
  }
  __device__ __forceinline__ bool is_own(int j) const { return static_cast<unsigned>(j - own) < views; }
};

__device__ __forceinline__ bool is_packed(const void* from) { return reinterpret_cast<uintptr_t>(from) % 16 == 0; }

// The factors of kWidth neighbouring logits, from the first one's on: by 16-byte loads where they are `packed`.
template <int kWidth, typename Acc>
__device__ __forceinline__ void load_scale(const Acc* __restrict__ from, bool packed, Acc (&scale)[kWidth]) {
  constexpr int kPack = kWidth < static_cast<int>(16 / sizeof(Acc)) ? kWidth : static_cast<int>(16 / sizeof(Acc));
  if (packed) {
#pragma unroll
    for (int i = 0; i < kWidth; i += kPack) {
      const Pack<Acc, kPack> pack = load_pack<Acc, kPack>(from + i);
#pragma unroll
      for (int k = 0; k < kPack; ++k) scale[i + k] = pack.value[k];
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < kWidth; ++i) scale[i] = from[i];
}

// Elements before the first 16-byte boundary, at most n.
template <typename T, int kWidth>
__device__ __forceinline__ int ragged_head(const T* from, int n) {
  const int beyond = static_cast<int>(reinterpret_cast<uintptr_t>(from) / sizeof(T) % kWidth);
  const int head = beyond == 0 ? 0 : kWidth - beyond;
  return head < n ? head : n;
}

// What one thread has seen of a row.
template <typename Acc>
struct ThreadSummary {
  Acc largest = minus_infinity<Acc>();
  Acc total = 0;  // of exp(logit - largest)
  Acc sum = 0;    // of logit - reference
  int count = 0;

  template <int kWidth>
  __device__ __forceinline__ void add(const Acc (&value)[kWidth], const bool (&counts)[kWidth], Acc reference) {
    Acc top = largest;
#pragma unroll
    for (int i = 0; i < kWidth; ++i) top = counts[i] && top < value[i] ? value[i] : top;
    if (largest < top) {
      if (largest != minus_infinity<Acc>()) total *= exponential(largest - top);
      largest = top;
    }
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      if (!counts[i]) continue;
      if (value[i] != minus_infinity<Acc>()) total += exponential(value[i] - top);
      sum += value[i] - reference;
      ++count;
    }
  }
};

template <typename T, int kWidth>
__device__ __forceinline__ void add_pack(const DeviceRows<T>& rows, const RowPart& part, const Pack<T, kWidth>& pack,
                                         int j, bool packed, typename DeviceAccumulator<T>::type reference,
                                         ThreadSummary<typename DeviceAccumulator<T>::type>& summary) {
  typename DeviceAccumulator<T>::type value[kWidth], scale[kWidth];
  bool counts[kWidth];
  if (rows.scale) load_scale<kWidth>(rows.scale + part.begin + j, packed, scale);
#pragma unroll
  for (int i = 0; i < kWidth; ++i) {
    value[i] = widen(pack.value[i]);
    if (rows.scale) value[i] *= scale[i];
    counts[i] = !part.is_own(j + i) && (!rows.mask || rows.mask[part.begin + j + i]);
  }
  summary.add(value, counts, reference);
}

// A block's part of row `i`, own columns left out: its summary goes to out. The block that holds the first own column
// also copies the own logits to own_logits [V, N]: all of them lie in these columns.
template <typename T, int kWidth>
__device__ __forceinline__ void summarise_part(const DeviceRows<T>& rows, int64_t N, int64_t i, int64_t index,
                                               int64_t identity, OthersSummary* out, double* own_logits) {
  using Acc = typename DeviceAccumulator<T>::type;
  __shared__ Acc largest_of_warp[kRowWarps];
  __shared__ double partial[3][kRowWarps + 1];
  const RowPart part(rows, index, identity);
  const T* __restrict__ const row = rows.logits + i * rows.row_stride + part.begin;
  const int threads = static_cast<int>(blockDim.x), thread = static_cast<int>(threadIdx.x);
  // Sums are taken relative to some logit of the row, so that a common offset costs no precision.
  Acc reference = part.size > 0 ? widen(row[0]) * (rows.scale ? rows.scale[part.begin] : Acc(1)) : Acc(0);
  if (!isfinite(reference)) reference = 0;
  ThreadSummary<Acc> summary;
  const int head = ragged_head<T, kWidth>(row, part.size);
  const bool packed = rows.scale && is_packed(rows.scale + part.begin + head);
  const int packs = (part.size - head) / kWidth;
  const int tail = head + packs * kWidth;
  for (int first = thread; first < packs; first += kRowBatch * threads) {
    Pack<T, kWidth> pack[kRowBatch];
#pragma unroll
    for (int b = 0; b < kRowBatch; ++b)
      if (first + b * threads < packs) pack[b] = load_pack<T, kWidth>(row + head + (first + b * threads) * kWidth);
#pragma unroll
    for (int b = 0; b < kRowBatch; ++b)
      if (first + b * threads < packs)
        add_pack<T, kWidth>(rows, part, pack[b], head + (first + b * threads) * kWidth, packed, reference, summary);
  }
  if (thread < head) add_pack<T, 1>(rows, part, load_pack<T, 1>(row + thread), thread, true, reference, summary);
  if (thread < part.size - tail)
    add_pack<T, 1>(rows, part, load_pack<T, 1>(row + tail + thread), tail + thread, true, reference, summary);

  const Acc largest = block_largest<kRowWarps>(summary.largest, largest_of_warp);
  const double weight = summary.largest == largest || summary.largest == minus_infinity<Acc>()
                            ? 1.0
                            : static_cast<double>(exponential(summary.largest - largest));
  const double sums[3] = {
      static_cast<double>(summary.total) * weight,
      static_cast<double>(summary.sum) + static_cast<double>(summary.count) * static_cast<double>(reference),
      static_cast<double>(summary.count)};
  const double total = block_sums<3, kRowWarps>(sums, partial);
  double* const fields = reinterpret_cast<double*>(out);  // largest, total, sum, count
  if (thread < 3) fields[1 + thread] = total;
  if (thread == 3) fields[0] = static_cast<double>(largest);

  const int64_t own = identity * rows.views - rows.first;
  if (identity < 0 || own < 0 || own >= rows.columns || own / rows.part != index) return;
  for (int64_t k = thread; k < rows.views; k += threads) {
    Acc value = widen(rows.logits[i * rows.row_stride + own + k]);
    if (rows.scale) value *= rows.scale[own + k];
    own_logits[k * N + i] = static_cast<double>(value);
  }
}

// The gradient of element j of a part; `raw` is the logit before its scale.
template <typename T>
__device__ __forceinline__ T gradient_of(const DeviceRows<T>& rows, const RowPart& part, const SampleViews& views,
                                         const RowStatistics& statistics, typename DeviceAccumulator<T>::type largest,
                                         typename DeviceAccumulator<T>::type inverse,
                                         typename DeviceAccumulator<T>::type other,
                                         typename DeviceAccumulator<T>::type upstream,
                                         typename DeviceAccumulator<T>::type factor, T raw, int j) {
  using Acc = typename DeviceAccumulator<T>::type;
  if (rows.mask && !rows.mask[part.begin + j]) return narrow<T>(Acc(0));
  const Acc probability = exponential(widen(raw) * factor - largest) * inverse;
  const Acc target = part.is_own(j) ? static_cast<Acc>(views.target(j - part.own, statistics)) : other;
  return narrow<T>((probability - target) * upstream * factor);
}

// A block's part of row `i`: the gradient goes to rows.grad, which may be the logits.
template <typename T, int kWidth>
__device__ __forceinline__ void differentiate_part(const DeviceRows<T>& rows, int64_t N, int64_t i, int64_t index,
                                                   int64_t identity, const SampleViews& views) {
  using Acc = typename DeviceAccumulator<T>::type;
  const RowPart part(rows, index, identity);
  const RowStatistics statistics = load_statistics(rows.statistics, N, i);
  const Acc largest = static_cast<Acc>(statistics.largest), inverse = static_cast<Acc>(statistics.inverse);
  const Acc other = static_cast<Acc>(statistics.other);
  const Acc upstream = static_cast<Acc>(static_cast<double>(rows.upstream[i * rows.upstream_stride]) * rows.share);
  const T* const row = rows.logits + i * rows.row_stride + part.begin;
  T* const grad = rows.grad + i * rows.grad_stride + part.begin;
  const int threads = static_cast<int>(blockDim.x), thread = static_cast<int>(threadIdx.x);
  const Acc* const scale = rows.scale ? rows.scale + part.begin : nullptr;
  const auto slope = [&](T raw, Acc factor, int j) {
    return gradient_of<T>(rows, part, views, statistics, largest, inverse, other, upstream, factor, raw, j);
  };
  const auto slope_of_one = [&](int j) { return slope(row[j], scale ? scale[j] : Acc(1), j); };
  const int head = ragged_head<T, kWidth>(row, part.size);
  const bool packed = scale && is_packed(scale + head);
  const int packs = (part.size - head) / kWidth;
  const int tail = head + packs * kWidth;
  for (int first = thread; first < packs; first += kRowBatch * threads) {
    Pack<T, kWidth> pack[kRowBatch];
#pragma unroll
    for (int b = 0; b < kRowBatch; ++b)
      if (first + b * threads < packs) pack[b] = load_pack<T, kWidth>(row + head + (first + b * threads) * kWidth);
#pragma unroll
    for (int b = 0; b < kRowBatch; ++b) {
      if (first + b * threads >= packs) continue;
      const int j = head + (first + b * threads) * kWidth;
      Acc factor[kWidth];
      if (scale) load_scale<kWidth>(scale + j, packed, factor);
#pragma unroll
      for (int k = 0; k < kWidth; ++k) pack[b].value[k] = slope(pack[b].value[k], scale ? factor[k] : Acc(1), j + k);
      store_pack<T, kWidth>(grad + j, pack[b]);
    }
  }
  if (thread < head) grad[thread] = slope_of_one(thread);
  if (thread < part.size - tail) grad[tail + thread] = slope_of_one(tail + thread);
}

// Labels of one head.
struct DeviceLabels {
  const int64_t* identity;     // [N]
  const int64_t* viewpoint;    // [N] or null
  const double* distribution;  // [N, V] or null
  const uint8_t* mask;         // [K, V] or null, of the whole head
  int64_t identities;          // K
  int64_t views;               // V

  // The views of sample i, whose identity is y; where that is -1, those of identity 0.
  __device__ __forceinline__ SampleViews views_of(int64_t i, int64_t y) const {
    return SampleViews(views, mask ? mask + (y < 0 ? 0 : y) * views : nullptr,
                       distribution ? distribution + i * views : nullptr, viewpoint ? viewpoint[i] : -1);
  }
};

// Why a label cannot be used: the codes that raise_label_errors knows.
enum LabelError : int {
  kLabelFits = 0,
  kBadIdentity,
  kBadViewpoint,
  kExcludedViewpoint,
  kBadDistribution,
  kNoViewpoint
};

__device__ __forceinline__ int label_error(const DeviceLabels& labels, int64_t y, const SampleViews& views) {
  if (y < 0) return kBadIdentity;
  if (views.existing == 0) return kNoViewpoint;
  if (labels.viewpoint) {
    const int64_t v = views.viewpoint;
    if (v < -1 || v >= labels.views) return kBadViewpoint;
    return v >= 0 && !views.has(v) ? kExcludedViewpoint : kLabelFits;
  }
  if (!labels.distribution) return kLabelFits;
  double sum = 0;
  for (int64_t k = 0; k < labels.views; ++k) {
    const double weight = views.weight(k);
    if (!(weight >= 0)) return kBadDistribution;
    if (weight > 0 && !views.has(k)) return kExcludedViewpoint;
    sum += weight;
  }
  return sum >= 1 - 1e-4 && sum <= 1 + 1e-4 ? kLabelFits : kBadDistribution;
}

// One head's rows, finished: statistics and losses from the summaries of their parts. Acc is float or double.
template <typename Acc>
struct DeviceFinish {
  const OthersSummary* summaries;  // [N, parts]
  int64_t parts;
  const double* own_logits;  // [V, N]
  DeviceLabels labels;
  Smoothing smoothing;
  double* statistics;    // [5, N]
  Acc* loss;             // [1], or [N] where each row keeps its own; null: not wanted
  bool each;             // whether each row keeps its own loss
  double share;          // factor of the summed loss
  int64_t* label_error;  // out: 8 * row + code of the first bad label; untouched where all fit
};

// The summary of one part of row first + lane. The warp's lanes read what lies side by side, four to a summary, and
// take their own row's fields from each other.
__device__ __forceinline__ OthersSummary load_summary(const OthersSummary* __restrict__ summaries, int64_t parts,
                                                      int64_t part, int64_t first, int64_t N) {
  constexpr int kFields = sizeof(OthersSummary) / sizeof(double), kRows = kWarp / kFields;
  const int lane = threadIdx.x % kWarp;
  double own[kFields] = {};
#pragma unroll
  for (int read = 0; read < kFields; ++read) {
    const int64_t i = first + read * kRows + lane / kFields;
    const double field = i < N ? reinterpret_cast<const double*>(summaries + i * parts + part)[lane % kFields] : 0.0;
#pragma unroll
    for (int f = 0; f < kFields; ++f) {
      const double taken = __shfl_sync(kFullWarp, field, lane % kRows * kFields + f);
      if (lane / kRows == read) own[f] = taken;
    }
  }
  return {own[0], own[1], own[2], own[3]};
}

// The own logits of a row, each read once where there are few.
struct OwnLogits {
  const double* logits;  // those of the row, N apart
  int64_t N;
  double held[kHeldViews];

  __device__ __forceinline__ OwnLogits(const double* __restrict__ logits, int64_t N, int64_t views)
      : logits(logits), N(N) {
#pragma unroll
    for (int k = 0; k < kHeldViews; ++k) held[k] = k < views ? logits[k * N] : 0.0;
  }
  __device__ __forceinline__ double operator()(int64_t k) const {
    if (k >= kHeldViews) return logits[k * N];
    double value = held[0];
#pragma unroll
    for (int h = 1; h < kHeldViews; ++h)
      if (k == h) value = held[h];
    return value;
  }
};

// One block, so that the sum's order depends on nothing but N. A row with a bad label is NaN throughout.
template <typename Acc>
__device__ __forceinline__ void finish_rows(const DeviceFinish<Acc>& head, int64_t N) {
  __shared__ double partial[1][kRowWarps + 1];
  __shared__ double first_of_warp[kRowWarps];
  double sums[1] = {0.0};
  double first_bad = minus_infinity<double>();  // its negative, to take the largest
  const int lane = threadIdx.x % kWarp;
  for (int64_t first = threadIdx.x - lane; first < N; first += blockDim.x) {
    OthersSummary others = load_summary(head.summaries, head.parts, 0, first, N);
    for (int64_t part = 1; part < head.parts; ++part)
      merge(others, load_summary(head.summaries, head.parts, part, first, N));
    const int64_t i = first + lane;
    if (i >= N) continue;
    const int64_t y = identity_or_none(head.labels.identity, i, head.labels.identities);
    const SampleViews views = head.labels.views_of(i, y);
    const int error = label_error(head.labels, y, views);
    RowStatistics row;
    double loss;
    if (error == kLabelFits) {
      loss = finish_row(others, OwnLogits(head.own_logits + i, N, views.views), views, head.smoothing, row);
    } else {
      loss = std::numeric_limits<double>::quiet_NaN();
      row = {loss, loss, loss, loss, loss};
      const double code = -static_cast<double>(8 * i + error);
      first_bad = first_bad < code ? code : first_bad;
    }
    store_statistics(head.statistics, N, i, row);
    if (head.each && head.loss) head.loss[i] = static_cast<Acc>(loss);
    sums[0] += loss;
  }
  const double total = block_sums<1, kRowWarps>(sums, partial);
  first_bad = block_largest<kRowWarps>(first_bad, first_of_warp);
  if (threadIdx.x != 0) return;
  if (!head.each && head.loss) head.loss[0] = static_cast<Acc>(total * head.share);
  if (head.label_error && first_bad > minus_infinity<double>()) *head.label_error = static_cast<int64_t>(-first_bad);
}

}  // namespace vareid
