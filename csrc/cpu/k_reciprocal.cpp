#include "k_reciprocal.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "cpu/exact_distance.h"
#include "cpu/parallel.h"
#include "cpu/simd.h"

namespace vareid {
namespace {

bool contains(const int32_t* list, int64_t n, int32_t value) {
  int found = 0;
#pragma omp simd reduction(| : found)
  for (int64_t c = 0; c < n; ++c) found |= list[c] == value;
  return found != 0;
}

// The running sums become a prefix sum: indptr[r + 1] holds the size of row r before.
void accumulate(int64_t* indptr, int64_t rows) {
  indptr[0] = 0;
  for (int64_t r = 0; r < rows; ++r) indptr[r + 1] += indptr[r];
}

struct Csr {
  const int64_t* indptr;
  const int32_t* index;
};

// A thread's set of rows: a mark for each and the list of those marked.
struct MarkedRows {
  int32_t* list;
  uint8_t* mark;
  int64_t count = 0;

  MarkedRows(void* workspace, int64_t rows, int64_t bytes_per_row, int thread) {
    auto* const base = static_cast<unsigned char*>(workspace) + thread * rows * bytes_per_row;
    list = reinterpret_cast<int32_t*>(base);
    mark = base + rows * static_cast<int64_t>(sizeof(int32_t));
    std::memset(mark, 0, static_cast<size_t>(rows));
  }
  void add(int32_t row, uint8_t value) {
    if (mark[row]) return;
    mark[row] = value;
    list[count++] = row;
  }
  void clear() {
    for (int64_t c = 0; c < count; ++c) mark[list[c]] = 0;
    count = 0;
  }
};

VAREID_MULTIVERSION void blend_row(float* __restrict__ distance, float* __restrict__ shared, int64_t gallery,
                                   float scale, float lambda_value) {
#pragma omp simd
  for (int64_t g = 0; g < gallery; ++g) {
    const float m = std::min(shared[g], 1.0f);
    distance[g] = (1.0f - lambda_value) * (1.0f - m / (2.0f - m)) + std::min(distance[g] * scale, lambda_value);
    shared[g] = 0;
  }
}

}  // namespace

void reciprocal_sets_cpu(const int32_t* neighbor, int64_t rows, int64_t width, int64_t k, int32_t* reciprocal,
                         int32_t* size, int threads) {
  const int64_t n = std::min(k + 1, width);
  parallel_for(rows, threads, [&](int64_t begin, int64_t end, int) {
    for (int64_t i = begin; i < end; ++i) {
      int32_t* const out = reciprocal + i * n;
      int64_t count = 0;
      for (int64_t c = 0; c < n; ++c) {
        const int32_t j = neighbor[i * width + c];
        if (contains(neighbor + j * width, n, static_cast<int32_t>(i))) out[count++] = j;
      }
      std::sort(out, out + count);
      size[i] = static_cast<int32_t>(count);
    }
  });
}

void expanded_sets_cpu(const int32_t* reciprocal, const int32_t* size, int64_t width, const int32_t* half,
                       const int32_t* half_size, int64_t half_width, int64_t rows, int64_t* indptr, int32_t* index,
                       void* workspace, int threads) {
  constexpr uint8_t kOriginal = 1, kAdded = 2;
  parallel_for(rows, threads, [&](int64_t begin, int64_t end, int thread) {
    MarkedRows set(workspace, rows, 8, thread);
    for (int64_t i = begin; i < end; ++i) {
      const int32_t* const own = reciprocal + i * width;
      for (int64_t c = 0; c < size[i]; ++c) set.add(own[c], kOriginal);
      for (int64_t c = 0; c < size[i]; ++c) {
        const int64_t candidate = own[c];
        const int32_t* const theirs = half + candidate * half_width;
        const int64_t n = half_size[candidate];
        int64_t common = 0;
        for (int64_t e = 0; e < n; ++e) common += set.mark[theirs[e]] == kOriginal;
        if (3 * common > 2 * n)
          for (int64_t e = 0; e < n; ++e) set.add(theirs[e], kAdded);
      }
      if (index) {
        std::sort(set.list, set.list + set.count);
        std::copy(set.list, set.list + set.count, index + indptr[i]);
      } else {
        indptr[i + 1] = set.count;
      }
      set.clear();
    }
  });
  if (!index) accumulate(indptr, rows);
}

void listed_distance_cpu(const Features& x, const Features& y, DType dtype, int64_t D, const int32_t* neighbor,
                         const float* neighbor_distance, int64_t width, const int64_t* indptr, const int32_t* index,
                         float* out, int threads) {
  const ExactDistance exact = exact_distance_function(dtype, x.factor != nullptr);
  parallel_for(x.rows + y.rows, threads, [&](int64_t begin, int64_t end, int) {
    for (int64_t i = begin; i < end; ++i) {
      const int32_t* const near = neighbor + i * width;
      const bool in_x = i < x.rows;
      for (int64_t e = indptr[i]; e < indptr[i + 1]; ++e) {
        const int64_t j = index[e];
        const int64_t at = std::find(near, near + width, index[e]) - near;
        if (at < width) {
          out[e] = neighbor_distance[i * width + at];
          continue;
        }
        const bool other_in_x = j < x.rows;
        out[e] = static_cast<float>(exact(in_x ? x : y, in_x ? i : i - x.rows, other_in_x ? x : y,
                                          other_in_x ? j : j - x.rows, D));
      }
    }
  });
}

void encode_cpu(const int64_t* indptr, const float* distance, const float* row_max, int64_t rows, float* value,
                int threads) {
  parallel_for(rows, threads, [&](int64_t begin, int64_t end, int) {
    for (int64_t i = begin; i < end; ++i) {
      const double scale = row_max[i] > 0 ? 1.0 / row_max[i] : 0.0;
      double sum = 0;
      for (int64_t e = indptr[i]; e < indptr[i + 1]; ++e) sum += std::exp(-distance[e] * scale);
      for (int64_t e = indptr[i]; e < indptr[i + 1]; ++e)
        value[e] = static_cast<float>(std::exp(-distance[e] * scale) / sum);
    }
  });
}

void expand_query_cpu(const int32_t* neighbor, int64_t rows, int64_t width, int64_t k2, const int64_t* indptr,
                      const int32_t* index, const float* value, int64_t* new_indptr, int32_t* new_index,
                      float* new_value, void* workspace, int threads) {
  const int64_t n = std::min(k2, width);
  parallel_for(rows, threads, [&](int64_t begin, int64_t end, int thread) {
    MarkedRows set(workspace, rows, 16, thread);
    auto* const sum = reinterpret_cast<double*>(static_cast<unsigned char*>(workspace) + thread * rows * 16 + rows * 8);
    for (int64_t i = begin; i < end; ++i) {
      for (int64_t c = 0; c < n; ++c) {
        const int64_t j = neighbor[i * width + c];
        for (int64_t e = indptr[j]; e < indptr[j + 1]; ++e) {
          const int32_t column = index[e];
          if (new_index) sum[column] = (set.mark[column] ? sum[column] : 0.0) + value[e];
          set.add(column, 1);
        }
      }
      if (new_index) {
        std::sort(set.list, set.list + set.count);
        std::copy(set.list, set.list + set.count, new_index + new_indptr[i]);
        for (int64_t c = 0; c < set.count; ++c)
          new_value[new_indptr[i] + c] = static_cast<float>(sum[set.list[c]] / static_cast<double>(n));
      } else {
        new_indptr[i + 1] = set.count;
      }
      set.clear();
    }
  });
  if (!new_index) accumulate(new_indptr, rows);
}

void invert_cpu(const int64_t* indptr, const int32_t* index, const float* value, int64_t rows, int64_t first,
                int64_t columns, int64_t* start, int32_t* owner, float* weight, void* workspace) {
  std::memset(start, 0, static_cast<size_t>(columns + 1) * sizeof(int64_t));
  for (int64_t e = indptr[first]; e < indptr[rows]; ++e) ++start[index[e] + 1];
  accumulate(start, columns);
  auto* const next = static_cast<int64_t*>(workspace);
  std::copy(start, start + columns, next);
  for (int64_t r = first; r < rows; ++r)
    for (int64_t e = indptr[r]; e < indptr[r + 1]; ++e) {
      const int64_t at = next[index[e]]++;
      owner[at] = static_cast<int32_t>(r - first);
      weight[at] = value[e];
    }
}

void blend_cpu(float* distance, int64_t ld, int64_t queries, int64_t gallery, const float* row_max,
               const int64_t* indptr, const int32_t* index, const float* value, const int64_t* start,
               const int32_t* owner, const float* weight, double lambda_value, void* workspace, int threads) {
  parallel_for(queries, threads, [&](int64_t begin, int64_t end, int thread) {
    float* const shared = static_cast<float*>(workspace) + thread * gallery;
    std::fill(shared, shared + gallery, 0.0f);
    for (int64_t q = begin; q < end; ++q) {
      for (int64_t e = indptr[q]; e < indptr[q + 1]; ++e) {
        const float own = value[e];
        for (int64_t at = start[index[e]]; at < start[index[e] + 1]; ++at)
          shared[owner[at]] += std::min(own, weight[at]);
      }
      const double scale = row_max[q] > 0 ? lambda_value / row_max[q] : 0.0;
      blend_row(distance + q * ld, shared, gallery, static_cast<float>(scale), static_cast<float>(lambda_value));
    }
  });
}

}  // namespace vareid
