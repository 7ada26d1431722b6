#include "nearest_neighbors.h"

#include <algorithm>
#include <cstring>
#include <optional>

#include "cpu/byte_products.h"
#include "cpu/float_products.h"
#include "cpu/nearest_neighbors_candidates.h"
#include "cpu/parallel.h"
#include "cpu/simd.h"

namespace vareid {
namespace {

constexpr int64_t kSegment = 1024;  // columns whose bounds stay in the first-level cache
constexpr int64_t kChunk = 64;      // columns tested at once
constexpr int64_t kTriangleParts = 8;

// Where the largest distance of each row comes from: the products, FarPairs, or it is not wanted.
enum class Largest { kOfProducts, kOfPairs, kNone };

// One rectangle of a block, at most kSegment columns wide. With kWrite, its distances go to `out`, which may be it.
template <bool kTwoSided, bool kWrite, Largest kLargest>
VAREID_INLINE void scan_rectangle(const float* block, int64_t ld, int64_t rows, int64_t columns, int64_t row_begin,
                                  int64_t column_begin, const Bounds& left_bounds, const Bounds& right_bounds,
                                  const Candidates& left, const Candidates* right, const Measure* measure,
                                  const FarPairs* pairs, float* out, int64_t out_ld) {
  constexpr bool kProducts = kLargest == Largest::kOfProducts, kPairs = kLargest == Largest::kOfPairs;
  alignas(64) float shrunk[kSegment], norm[kSegment], limit[kSegment], largest[kSegment];
  alignas(64) float grown[kSegment], far_limit[kSegment];
  alignas(64) uint8_t hit[kChunk];
  const int64_t padded = (columns + kChunk - 1) / kChunk * kChunk;
  for (int64_t c = 0; c < padded; ++c) {
    const int64_t j = column_begin + std::min(c, columns - 1);
    norm[c] = right_bounds.norm[j];
    shrunk[c] = norm[c] - right_bounds.window[j];
    limit[c] = kTwoSided ? right->threshold[j] - shrunk[c] : 0.0f;
    largest[c] = -kInf;
    if (kPairs) {
      grown[c] = norm[c] + right_bounds.window[j];
      far_limit[c] = kTwoSided ? pairs->row_max[j] - grown[c] : 0.0f;
    }
  }
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t i = row_begin + r;
    const float row_norm = left_bounds.norm[i], row_shrunk = row_norm - left_bounds.window[i];
    float row_limit = left.threshold[i] - row_shrunk;
    float row_largest = -kInf;
    const float row_grown = row_norm + left_bounds.window[i];
    float row_far_limit = kPairs ? pairs->row_max[i] - row_grown : 0.0f;
    for (int64_t c0 = 0; c0 < columns; c0 += kChunk) {
      const int64_t n = std::min(kChunk, columns - c0);
      const float* const part = block + r * ld + c0;
      // How far a pair is inside one of the limits; those of a chunk are looked at one by one if any is.
      float inside = -kInf;
      alignas(64) float twice[kChunk], excess[kChunk];
#pragma omp simd reduction(max : row_largest) reduction(max : inside)
      for (int64_t c = 0; c < n; ++c) {
        const float product = -2 * part[c];
        twice[c] = product;
        const float from_row = product + norm[c0 + c], from_column = product + row_norm;
        if (kProducts) row_largest = std::max(row_largest, from_row);
        if (kProducts && kTwoSided) largest[c0 + c] = std::max(largest[c0 + c], from_column);
        float most = row_limit - (product + shrunk[c0 + c]);
        if (kTwoSided) most = std::max(most, limit[c0 + c] - (product + row_shrunk));
        if (kPairs) most = std::max(most, product + grown[c0 + c] - row_far_limit);
        if (kPairs && kTwoSided) most = std::max(most, product + row_grown - far_limit[c0 + c]);
        excess[c] = most;
        inside = std::max(inside, most);
        if (kWrite) out[r * out_ld + c0 + c] = std::max(from_row + row_norm, 0.0f);
      }
      if (!(inside >= 0)) continue;
      for (int64_t c = 0; c < n; ++c) hit[c] = excess[c] >= 0;
      for (int64_t c8 = 0; c8 < n; c8 += 8) {
        uint64_t hits = 0;
        std::memcpy(&hits, hit + c8, std::min<int64_t>(8, n - c8));
        for (; hits; hits &= hits - 1) {
          const int64_t c = c8 + __builtin_ctzll(hits) / 8;
          const int64_t j = column_begin + c0 + c;
          const float lower = twice[c] + shrunk[c0 + c] + row_shrunk;
          if (twice[c] + shrunk[c0 + c] <= row_limit) {
            push(left, i, lower, j, left_bounds.window[i], right_bounds.window, measure);
            row_limit = left.threshold[i] - row_shrunk;
          }
          if (kTwoSided && twice[c] + row_shrunk <= limit[c0 + c]) {
            push(*right, j, lower, i, right_bounds.window[j], left_bounds.window, measure);
            limit[c0 + c] = right->threshold[j] - shrunk[c0 + c];
          }
          if (!kPairs) continue;
          const float upper = twice[c] + grown[c0 + c] + row_grown;
          if (twice[c] + grown[c0 + c] >= row_far_limit) {
            pairs->push(i, j, lower, upper);
            row_far_limit = pairs->row_max[i] - row_grown;
          }
          if (kTwoSided && twice[c] + row_grown >= far_limit[c0 + c]) {
            pairs->push(j, i, lower, upper);
            far_limit[c0 + c] = pairs->row_max[j] - grown[c0 + c];
          }
        }
      }
    }
    if (kProducts) left.row_max[i] = std::max(left.row_max[i], row_largest + row_norm);
  }
  if (kProducts && kTwoSided)
    for (int64_t c = 0; c < columns; ++c) {
      float& value = right->row_max[column_begin + c];
      value = std::max(value, largest[c] + norm[c]);
    }
}

#define VAREID_SCAN(name, two_sided, write, largest)                                                                   \
  VAREID_MULTIVERSION void name(const float* block, int64_t ld, int64_t rows, int64_t columns, int64_t row_begin,      \
                                int64_t column_begin, const Bounds& left_bounds, const Bounds& right_bounds,           \
                                const Candidates& left, const Candidates* right, const Measure* measure,               \
                                const FarPairs* pairs, float* out, int64_t out_ld) {                                   \
    scan_rectangle<two_sided, write, Largest::largest>(block, ld, rows, columns, row_begin, column_begin, left_bounds, \
                                                       right_bounds, left, right, measure, pairs, out, out_ld);        \
  }
VAREID_SCAN(scan_left, false, false, kOfProducts)
VAREID_SCAN(scan_both, true, false, kOfProducts)
VAREID_SCAN(scan_both_write, true, true, kOfProducts)
VAREID_SCAN(scan_left_pairs, false, false, kOfPairs)
VAREID_SCAN(scan_both_pairs, true, false, kOfPairs)
VAREID_SCAN(scan_both_pairs_write, true, true, kOfPairs)
VAREID_SCAN(scan_left_only, false, false, kNone)
VAREID_SCAN(scan_both_only, true, false, kNone)
#undef VAREID_SCAN

struct Rectangle {
  int64_t r0, r1, c0, c1;
  bool both;
};

// Where the parts of `size` begin and end, at multiples of `unit`.
int64_t edge(int64_t size, int64_t unit, int64_t part, int64_t parts) {
  return std::min(size, (size + unit - 1) / unit * part / parts * unit);
}

// Calls body(rectangle, thread) for parts of a block that begin at multiples of `unit`: bands of rows or, with both, in
// as many rounds as there are threads, rectangles whose rows and columns no other thread has.
template <typename Body>
void by_rectangles(int64_t rows, int64_t columns, int64_t unit, bool both, const Place& place, const Body& body) {
  const auto units = [unit](int64_t size) { return (size + unit - 1) / unit; };
  const int64_t parts = usable_threads(std::min(units(rows), units(columns)), place.threads);
  for (int64_t round = 0; round < (both ? parts : 1); ++round)
    parallel_for(parts, static_cast<int>(parts), [&](int64_t first, int64_t last, int) {
      for (int64_t part = first; part < last; ++part) {
        const int64_t other = (part + round) % parts;
        body(Rectangle{edge(rows, unit, part, parts), edge(rows, unit, part + 1, parts),
                       both ? edge(columns, unit, other, parts) : 0,
                       both ? edge(columns, unit, other + 1, parts) : columns, both},
             part);
      }
    });
}

// The same for a block on the diagonal, without what lies below it: the parts against themselves, then the pairs of
// parts, in rounds in which no two pairs have a part in common, as in a tournament.
template <typename Body>
void by_triangle(int64_t rows, int64_t unit, const Place& place, const Body& body) {
  const int64_t fitting = (rows + 2 * unit - 1) / (2 * unit);  // pairs of parts, of a unit at least
  const int64_t parts = 2 * std::min(fitting, kTriangleParts / 2);
  const int64_t others = parts - 1;
  const auto pair_of = [&](int64_t a, int64_t b) {
    if (a > b) std::swap(a, b);
    return Rectangle{edge(rows, unit, a, parts), edge(rows, unit, a + 1, parts), edge(rows, unit, b, parts),
                     edge(rows, unit, b + 1, parts), a != b};
  };
  parallel_for(parts, place.threads, [&](int64_t first, int64_t last, int thread) {
    for (int64_t part = first; part < last; ++part) body(pair_of(part, part), thread);
  });
  for (int64_t round = 0; round < others; ++round)
    parallel_for(parts / 2, place.threads, [&](int64_t first, int64_t last, int thread) {
      for (int64_t p = first; p < last; ++p)
        body(pair_of(p == 0 ? others : (round + p) % others, (round + others - p) % others), thread);
    });
}

// Scans a block part by part.
void scan_block(decltype(scan_left)* scan, float* block, int64_t ld, int64_t rows, int64_t columns, int64_t row_begin,
                int64_t column_begin, const Bounds& left_bounds, const Bounds& right_bounds,
                const Candidates& candidates, bool both, const FarPairs* pairs, const Place& place) {
  by_rectangles(rows, columns, 1, both, place, [&](const Rectangle& part, int64_t) {
    for (int64_t c = part.c0; c < part.c1; c += kSegment)
      scan(block + part.r0 * ld + c, ld, part.r1 - part.r0, std::min(kSegment, part.c1 - c), row_begin + part.r0,
           column_begin + c, left_bounds, right_bounds, candidates, both ? &candidates : nullptr,
           pairs ? &pairs->measure : nullptr, pairs, block + part.r0 * ld + c, ld);
  });
}

// The same of products that are made strip by strip, in `workspace`: product(row, rows, column, columns, out). Blocks
// on the diagonal are scanned for both sides, too.
template <typename Product>
void scan_strips(decltype(scan_left)* one_sided, decltype(scan_left)* two_sided, int64_t rows, int64_t columns,
                 int64_t row_begin, int64_t column_begin, const Bounds& left_bounds, const Bounds& right_bounds,
                 const Candidates& candidates, bool both, const Measure& measure, const FarPairs* pairs, float* out,
                 int64_t ld, void* workspace, const Place& place, const Product& product) {
  constexpr int64_t kStrip = kPackedScanBytes / (kSegment * sizeof(float));  // rows of products that stay in cache
  const auto scan_part = [&](const Rectangle& part, int64_t thread) {
    const auto scan = part.both ? two_sided : one_sided;
    float* const products = static_cast<float*>(workspace) + thread * kStrip * kSegment;
    for (int64_t c = part.c0; c < part.c1; c += kSegment)
      for (int64_t r = part.r0; r < part.r1; r += kStrip) {
        const int64_t height = std::min(kStrip, part.r1 - r), width = std::min(kSegment, part.c1 - c);
        product(r, height, c, packed_rows(width), products);
        scan(products, kSegment, height, width, row_begin + r, column_begin + c, left_bounds, right_bounds, candidates,
             part.both ? &candidates : nullptr, &measure, pairs, out ? out + r * ld + c : nullptr, ld);
      }
  };
  const bool diagonal = both && row_begin == column_begin;
  if (diagonal && place.threads <= kTriangleParts / 2)
    by_triangle(rows, kByteColumns, place, scan_part);
  else  // more threads would meet more often than that saves
    by_rectangles(rows, columns, kByteColumns, both && !diagonal, place, scan_part);
}

}  // namespace

void nearest_neighbors_scan_cpu(float* block, int64_t ld, int64_t rows, int64_t columns, int64_t row_begin,
                                int64_t column_begin, const Bounds& left_bounds, const Bounds& right_bounds,
                                const Candidates& candidates, bool both, bool write, const Place& place) {
  const auto scan = write ? scan_both_write : both ? scan_both : scan_left;
  scan_block(scan, block, ld, rows, columns, row_begin, column_begin, left_bounds, right_bounds, candidates, both,
             nullptr, place);
}

void nearest_neighbors_scan_farthest_cpu(float* block, int64_t ld, int64_t rows, int64_t columns, int64_t row_begin,
                                         int64_t column_begin, const Bounds& left_bounds, const Bounds& right_bounds,
                                         const Candidates& candidates, bool both, const PairSets& sets,
                                         const Farthest& farthest, const Place& place) {
  const Measure measure(sets);
  const FarPairs pairs{farthest, measure, candidates.row_max};
  scan_block(both ? scan_both_pairs : scan_left_pairs, block, ld, rows, columns, row_begin, column_begin, left_bounds,
             right_bounds, candidates, both, &pairs, place);
}

void nearest_neighbors_round_cpu(const float* x, int64_t stride, int64_t rows, int64_t D, float* scale, double* rounded,
                                 const Place& place) {
  parallel_for(rows, place.threads, [&](int64_t begin, int64_t end, int) {
    for (int64_t r = begin; r < end; ++r) byte_rounding(x + r * stride, D, scale + r, rounded + r);
  });
}

void nearest_neighbors_pack_cpu(const float* x, int64_t stride, int64_t rows, int64_t D, const float* scale, bool left,
                                uint8_t* bytes, float* packed_scale, int32_t* sum, const Place& place) {
  std::copy(scale, scale + rows, packed_scale);
  std::fill(packed_scale + rows, packed_scale + packed_rows(rows), 0.0f);
  parallel_for(packed_rows(rows) / kBytePanel, place.threads, [&](int64_t begin, int64_t end, int) {
    for (int64_t r = begin * kBytePanel; r < end * kBytePanel; r += kBytePanel)
      byte_pack(x + r * stride, stride, std::min(kBytePanel, rows - r), D, packed_scale + r, left,
                bytes + r * packed_elements(D), sum + r);
  });
}

void nearest_neighbors_scan_packed_cpu(const PackedRows& left, const PackedRows& right, int64_t D, int64_t row_begin,
                                       int64_t column_begin, const Bounds& left_bounds, const Bounds& right_bounds,
                                       const Candidates& candidates, bool both, const PairSets& sets,
                                       const Farthest* farthest, void* workspace, const Place& place) {
  const Measure measure(sets);
  std::optional<FarPairs> pairs;
  if (farthest) pairs.emplace(FarPairs{*farthest, measure, candidates.row_max});
  const int64_t elements = packed_elements(D);
  scan_strips(
      farthest ? scan_left_pairs : scan_left_only, farthest ? scan_both_pairs : scan_both_only, left.rows, right.rows,
      row_begin, column_begin, left_bounds, right_bounds, candidates, both, measure, pairs ? &*pairs : nullptr, nullptr,
      0, workspace, place, [&](int64_t r, int64_t rows, int64_t c, int64_t columns, float* products) {
        byte_product(left.bytes + r * elements, left.scale + r, (rows + kByteRows - 1) / kByteRows * kByteRows,
                     right.bytes + c * elements, right.scale + c, right.sum + c, columns, elements, products, kSegment);
      });
}

void nearest_neighbors_scan_written_cpu(const float* x, int64_t stride, int64_t rows, const float* y, int64_t y_stride,
                                        int64_t columns, int64_t D, int64_t row_begin, int64_t column_begin,
                                        const Bounds& left_bounds, const Bounds& right_bounds,
                                        const Candidates& candidates, const PairSets& sets, const Farthest& farthest,
                                        float* out, int64_t ld, float* panels, void* workspace, const Place& place) {
  static_assert(kFloatPanel == kByteColumns, "rectangles begin at panels");
  parallel_for(packed_rows(columns) / kFloatPanel, place.threads, [&](int64_t begin, int64_t end, int) {
    for (int64_t c = begin * kFloatPanel; c < end * kFloatPanel; c += kFloatPanel)
      float_pack(y + c * y_stride, y_stride, columns - c, D, panels + c * D);
  });
  const Measure measure(sets);
  const FarPairs pairs{farthest, measure, candidates.row_max};
  scan_strips(nullptr, scan_both_pairs_write, rows, columns, row_begin, column_begin, left_bounds, right_bounds,
              candidates, true, measure, &pairs, out, ld, workspace, place,
              [&](int64_t r, int64_t height, int64_t c, int64_t width, float* products) {
                float_product(x + r * stride, stride, height, panels + c * D, width, D, products, kSegment);
              });
}

void nearest_neighbors_farthest_cpu(const PairSets& sets, const Farthest& farthest, float* row_max,
                                    const Place& place) {
  const Measure measure(sets);
  const FarPairs pairs{farthest, measure, row_max};
  parallel_for(sets.x.rows + sets.x2.rows, place.threads, [&](int64_t begin, int64_t end, int) {
    for (int64_t i = begin; i < end; ++i) pairs.settle(i, 0);
  });
}

}  // namespace vareid
