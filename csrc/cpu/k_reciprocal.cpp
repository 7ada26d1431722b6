#include "k_reciprocal.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

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

struct Scored {
  double distance;
  int32_t index;

  bool operator<(const Scored& other) const {
    return distance < other.distance || (distance == other.distance && index < other.index);
  }
};

// The k smallest values that were shown, ties by the lower index; indices come in ascending order.
template <typename T>
struct Smallest {
  Scored* kept;
  int64_t k, capacity, count = 0;
  double threshold = std::numeric_limits<double>::infinity();
  double largest = 0;

  void compact() {
    std::nth_element(kept, kept + k - 1, kept + count);
    count = k;
    threshold = kept[k - 1].distance;
  }
  void show(const T* values, int64_t n, int64_t first) {
    constexpr int64_t kChunk = 32;
    for (int64_t c0 = 0; c0 < n; c0 += kChunk) {
      const int64_t size = std::min(kChunk, n - c0);
      using Acc = typename Accumulator<T>::type;
      const Acc limit = static_cast<Acc>(threshold);  // exact: it was such a value, or Inf
      Acc top = 0;
      int any = 0;
#pragma omp simd reduction(max : top) reduction(| : any)
      for (int64_t c = 0; c < size; ++c) {
        const Acc value = load(values + c0 + c);
        top = std::max(top, value);
        any |= value < limit;
      }
      largest = std::max(largest, static_cast<double>(top));
      if (!any) continue;
      for (int64_t c = 0; c < size; ++c) {
        const double value = load(values + c0 + c);
        if (!(value < threshold)) continue;
        kept[count++] = {value, static_cast<int32_t>(first + c0 + c)};
        if (count == capacity) compact();
      }
    }
  }
  void write(int32_t* out) {
    if (count > k) compact();
    std::sort(kept, kept + k);
    for (int64_t c = 0; c < k; ++c) out[c] = kept[c].index;
  }
};

template <typename T>
void matrix_neighbors(const T* q_g, const T* q_q, const T* g_g, int64_t Q, int64_t G, int64_t k, int32_t* neighbor,
                      double* row_max, void* workspace, int threads) {
  constexpr int64_t kTile = 16;  // gallery rows whose columns of q_g are gathered together
  const int64_t bytes = 128 * Q + 32 * k + 1024;
  const auto rows_of = [&](int thread, int64_t row, const T* first, const T* second) {
    auto* const kept = reinterpret_cast<Scored*>(static_cast<unsigned char*>(workspace) + thread * bytes + 128 * Q);
    Smallest<T> smallest{kept, k, 2 * k + 64};
    smallest.show(first, Q, 0);
    smallest.show(second, G, Q);
    smallest.write(neighbor + row * k);
    row_max[row] = smallest.largest;
  };
  parallel_for(Q, threads, [&](int64_t begin, int64_t end, int thread) {
    for (int64_t q = begin; q < end; ++q) rows_of(thread, q, q_q + q * Q, q_g + q * G);
  });
  parallel_for((G + kTile - 1) / kTile, threads, [&](int64_t begin, int64_t end, int thread) {
    auto* const columns = reinterpret_cast<T*>(static_cast<unsigned char*>(workspace) + thread * bytes);
    for (int64_t tile = begin; tile < end; ++tile) {
      const int64_t g0 = tile * kTile, n = std::min(kTile, G - g0);
      for (int64_t q = 0; q < Q; ++q)
        for (int64_t c = 0; c < n; ++c) columns[c * Q + q] = q_g[q * G + g0 + c];
      for (int64_t c = 0; c < n; ++c) rows_of(thread, Q + g0 + c, columns + c * Q, g_g + (g0 + c) * G);
    }
  });
}

}  // namespace

void k_reciprocal_sets_cpu(const int32_t* neighbor, int64_t rows, int64_t width, int64_t k, int32_t* reciprocal,
                           int32_t* size, const Place& place) {
  const int64_t n = std::min(k + 1, width);
  parallel_for(rows, place.threads, [&](int64_t begin, int64_t end, int) {
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

void k_reciprocal_robust_sets_cpu(const int32_t* reciprocal, const int32_t* size, int64_t width, const int32_t* half,
                                  const int32_t* half_size, int64_t half_width, int64_t rows, int64_t* indptr,
                                  int32_t* index, void* workspace, const Place& place) {
  constexpr uint8_t kOriginal = 1, kAdded = 2;
  parallel_for(rows, place.threads, [&](int64_t begin, int64_t end, int thread) {
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

void k_reciprocal_listed_distance_cpu(const Features& x, const Features& y, DType dtype, int64_t D,
                                      const int32_t* neighbor, const float* neighbor_distance, int64_t width,
                                      const int64_t* indptr, const int32_t* index, float* out, const Place& place) {
  constexpr int64_t kMeasured = 64;  // pairs that are measured together
  const ExactDistances exact = exact_distances_function(dtype, x.factor != nullptr);
  const Rows rows{x, y};
  parallel_for(x.rows + y.rows, place.threads, [&](int64_t begin, int64_t end, int) {
    int32_t member[kMeasured];
    int64_t entry[kMeasured];
    double measured[kMeasured];
    for (int64_t i = begin; i < end; ++i) {
      const int32_t* const near = neighbor + i * width;
      int64_t open = 0;
      for (int64_t e = indptr[i]; e < indptr[i + 1]; ++e) {
        const int64_t at = std::find(near, near + width, index[e]) - near;
        if (at < width) {
          out[e] = neighbor_distance[i * width + at];
        } else {
          member[open] = index[e];
          entry[open++] = e;
        }
        if (open < kMeasured && e + 1 < indptr[i + 1]) continue;
        exact(rows, i, rows, member, open, D, measured);
        for (int64_t m = 0; m < open; ++m) out[entry[m]] = static_cast<float>(measured[m]);
        open = 0;
      }
    }
  });
}

void k_reciprocal_encode_cpu(const int64_t* indptr, const float* distance, const float* row_max, int64_t rows,
                             float* value, const Place& place) {
  parallel_for(rows, place.threads, [&](int64_t begin, int64_t end, int) {
    for (int64_t i = begin; i < end; ++i) {
      const double scale = row_max[i] > 0 ? 1.0 / row_max[i] : 0.0;
      double sum = 0;
      for (int64_t e = indptr[i]; e < indptr[i + 1]; ++e) sum += std::exp(-distance[e] * scale);
      for (int64_t e = indptr[i]; e < indptr[i + 1]; ++e)
        value[e] = static_cast<float>(std::exp(-distance[e] * scale) / sum);
    }
  });
}

void k_reciprocal_query_expansion_cpu(const int32_t* neighbor, int64_t rows, int64_t width, int64_t k2,
                                      const int64_t* indptr, const int32_t* index, const float* value,
                                      int64_t* new_indptr, int32_t* new_index, float* new_value, void* workspace,
                                      const Place& place) {
  const int64_t n = std::min(k2, width);
  parallel_for(rows, place.threads, [&](int64_t begin, int64_t end, int thread) {
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

void k_reciprocal_invert_cpu(const int64_t* indptr, const int32_t* index, const float* value, int64_t rows,
                             int64_t first, int64_t columns, int64_t, int64_t* start, int32_t* owner, float* weight,
                             void* workspace, const Place&) {
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

void k_reciprocal_blend_cpu(float* distance, int64_t ld, int64_t queries, int64_t gallery, const float* row_max,
                            const int64_t* indptr, const int32_t* index, const float* value, const int64_t* start,
                            const int32_t* owner, const float* weight, double lambda_value, void* workspace,
                            const Place& place) {
  parallel_for(queries, place.threads, [&](int64_t begin, int64_t end, int thread) {
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

void k_reciprocal_matrix_neighbors_cpu(const void* q_g, const void* q_q, const void* g_g, DType dtype, int64_t Q,
                                       int64_t G, int64_t k, int32_t* neighbor, double* row_max, void* workspace,
                                       const Place& place) {
  dispatch_float(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    matrix_neighbors(static_cast<const T*>(q_g), static_cast<const T*>(q_q), static_cast<const T*>(g_g), Q, G, k,
                     neighbor, row_max, workspace, place.threads);
  });
}

void k_reciprocal_topk_cpu(const Features& query, const Features& gallery, DType dtype, int64_t D,
                           const int32_t* nearest, const float* original, int64_t listed, const float* row_max,
                           const int64_t* indptr, const int32_t* index, const float* value, const int64_t* start,
                           const int32_t* owner, const float* weight, double lambda_value, int64_t k, float* distance,
                           int64_t* gallery_index, void* workspace, const Place& place) {
  const ExactDistance exact = exact_distance_function(dtype, query.factor != nullptr);
  const int64_t G = gallery.rows;
  parallel_for(query.rows, place.threads, [&](int64_t begin, int64_t end, int thread) {
    auto* const scored = reinterpret_cast<Scored*>(static_cast<unsigned char*>(workspace) + thread * 24 * G);
    auto* const touched = reinterpret_cast<int32_t*>(scored + G);
    auto* const shared = reinterpret_cast<float*>(touched + G);
    std::fill(shared, shared + G, 0.0f);
    for (int64_t q = begin; q < end; ++q) {
      int64_t sharing = 0;
      for (int64_t e = indptr[q]; e < indptr[q + 1]; ++e)
        for (int64_t at = start[index[e]]; at < start[index[e] + 1]; ++at) {
          const int32_t g = owner[at];
          if (shared[g] == 0) touched[sharing++] = g;
          shared[g] += std::min(value[e], weight[at]);
        }
      const double scale = row_max[q] > 0 ? lambda_value / row_max[q] : 0.0;
      const auto final_distance = [&](double squared, int32_t g) {
        const double m = std::min(shared[g], 1.0f);
        return (1 - lambda_value) * (1 - m / (2 - m)) + std::min(squared * scale, lambda_value);
      };
      // Those that share nothing are ordered by their original distance or, where that weighs nothing, by index.
      const bool by_index = !(scale > 0);
      int64_t count = 0;
      for (int64_t c = 0; c < (by_index ? k : listed); ++c) {
        const int32_t g = by_index ? static_cast<int32_t>(c) : nearest[q * listed + c];
        scored[count++] = {final_distance(by_index ? 0.0 : original[q * listed + c], g), g};
        shared[g] = -shared[g];  // done
      }
      for (int64_t c = 0; c < sharing; ++c) {
        const int32_t g = touched[c];
        if (shared[g] > 0) {
          const double squared = by_index ? 0.0 : static_cast<float>(exact(query, q, gallery, g, D));
          scored[count++] = {final_distance(squared, g), g};
        }
        shared[g] = 0;
      }
      std::nth_element(scored, scored + k - 1, scored + count);
      std::sort(scored, scored + k);
      for (int64_t c = 0; c < k; ++c) {
        distance[q * k + c] = static_cast<float>(scored[c].distance);
        gallery_index[q * k + c] = scored[c].index;
      }
    }
  });
}

}  // namespace vareid
