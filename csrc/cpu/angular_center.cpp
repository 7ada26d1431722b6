#include "angular_center.h"

#include <algorithm>
#include <cmath>

#include "cpu/parallel.h"
#include "cpu/simd.h"

namespace vareid {
namespace {

// Columns handled at once in the backward pass, so that the sum over the views stays in the first-level cache.
constexpr int64_t kColumns = 1024;

template <typename T, typename Acc>
VAREID_INLINE void forward_identity(const T* w, const T* u, const uint8_t* mask, Acc* cosine, Acc* identity_norm,
                                    Acc* viewpoint_norm, int64_t V, int64_t D) {
  Acc ww = 0;
#pragma omp simd reduction(+ : ww)
  for (int64_t d = 0; d < D; ++d) ww += load(w + d) * load(w + d);
  const Acc w_norm = std::sqrt(ww);
  *identity_norm = w_norm;
  for (int64_t v = 0; v < V; ++v) {
    cosine[v] = 0;
    viewpoint_norm[v] = 0;
    if (mask && !mask[v]) continue;
    const T* const row = u + v * D;
    Acc dot = 0, uu = 0;
#pragma omp simd reduction(+ : dot, uu)
    for (int64_t d = 0; d < D; ++d) {
      const Acc value = load(row + d);
      dot += load(w + d) * value;
      uu += value * value;
    }
    viewpoint_norm[v] = std::sqrt(uu);
    const Acc product = w_norm * viewpoint_norm[v];
    cosine[v] = product == 0 ? Acc(0) : dot / product;
  }
}

template <typename T, typename Acc>
VAREID_INLINE void backward_identity(Acc upstream, const T* w, const T* u, const uint8_t* mask, const Acc* cosine,
                                     Acc identity_norm, const Acc* viewpoint_norm, T* grad_w, T* grad_u, int64_t V,
                                     int64_t D) {
  const Acc w_inverse = identity_norm == 0 ? Acc(0) : 1 / identity_norm;
  Acc along_w = 0;
  for (int64_t v = 0; v < V; ++v)
    if (!mask || mask[v]) along_w += viewpoint_norm[v] == 0 ? Acc(0) : upstream * cosine[v] * w_inverse * w_inverse;
  alignas(64) Acc sum[kColumns];
  for (int64_t begin = 0; begin < D; begin += kColumns) {
    const int64_t n = std::min(kColumns, D - begin);
    const T* const w_part = w + begin;
    if (grad_w)
      for (int64_t d = 0; d < n; ++d) sum[d] = along_w * load(w_part + d);
    for (int64_t v = 0; v < V; ++v) {
      T* const out = grad_u ? grad_u + v * D + begin : nullptr;
      if (mask && !mask[v]) {
        if (out)
          for (int64_t d = 0; d < n; ++d) store(out + d, Acc(0));
        continue;
      }
      const T* const u_part = u + v * D + begin;
      const Acc u_inverse = viewpoint_norm[v] == 0 ? Acc(0) : 1 / viewpoint_norm[v];
      const Acc across = -upstream * w_inverse * u_inverse;
      const Acc along_u = w_inverse == 0 ? Acc(0) : upstream * cosine[v] * u_inverse * u_inverse;
      if (grad_w && out) {
#pragma omp simd
        for (int64_t d = 0; d < n; ++d) {
          const Acc value = load(u_part + d);
          store(out + d, across * load(w_part + d) + along_u * value);
          sum[d] += across * value;
        }
      } else if (out) {
#pragma omp simd
        for (int64_t d = 0; d < n; ++d) store(out + d, across * load(w_part + d) + along_u * load(u_part + d));
      } else {
#pragma omp simd
        for (int64_t d = 0; d < n; ++d) sum[d] += across * load(u_part + d);
      }
    }
    if (grad_w)
      for (int64_t d = 0; d < n; ++d) store(grad_w + begin + d, sum[d]);
  }
}

// target_clones does not reach templates: one plain function for each element type.
#define VAREID_ANGULAR_CENTER(T, Acc)                                                                                  \
  VAREID_MULTIVERSION void forward_rows(const T* W, const T* U, const uint8_t* mask, Acc* cosine, Acc* identity_norm,  \
                                        Acc* viewpoint_norm, int64_t V, int64_t D, int64_t begin, int64_t end) {       \
    for (int64_t j = begin; j < end; ++j)                                                                              \
      forward_identity<T, Acc>(W + j * D, U + j * V * D, mask ? mask + j * V : nullptr, cosine + j * V,                \
                               identity_norm + j, viewpoint_norm + j * V, V, D);                                       \
  }                                                                                                                    \
  VAREID_MULTIVERSION void backward_rows(Acc upstream, const T* W, const T* U, const uint8_t* mask, const Acc* cosine, \
                                         const Acc* identity_norm, const Acc* viewpoint_norm, T* grad_W, T* grad_U,    \
                                         int64_t V, int64_t D, int64_t begin, int64_t end) {                           \
    for (int64_t j = begin; j < end; ++j)                                                                              \
      backward_identity<T, Acc>(upstream, W + j * D, U + j * V * D, mask ? mask + j * V : nullptr, cosine + j * V,     \
                                identity_norm[j], viewpoint_norm + j * V, grad_W ? grad_W + j * D : nullptr,           \
                                grad_U ? grad_U + j * V * D : nullptr, V, D);                                          \
  }

VAREID_ANGULAR_CENTER(float, float)
VAREID_ANGULAR_CENTER(double, double)
VAREID_ANGULAR_CENTER(float16, float)
VAREID_ANGULAR_CENTER(bfloat16, float)
#undef VAREID_ANGULAR_CENTER

template <typename T>
void forward(const void* W, const void* U, const uint8_t* mask, void* loss, void* cosine, void* identity_norm,
             void* viewpoint_norm, int64_t K, int64_t V, int64_t D, int threads) {
  using Acc = typename Accumulator<T>::type;
  Acc* const cosines = static_cast<Acc*>(cosine);
  parallel_for(K, threads, [&](int64_t begin, int64_t end, int) {
    forward_rows(static_cast<const T*>(W), static_cast<const T*>(U), mask, cosines, static_cast<Acc*>(identity_norm),
                 static_cast<Acc*>(viewpoint_norm), V, D, begin, end);
  });
  double sum = 0;  // in index order, so that the loss does not depend on the number of threads
  for (int64_t pair = 0; pair < K * V; ++pair)
    if (!mask || mask[pair]) sum += 1.0 - static_cast<double>(cosines[pair]);
  *static_cast<Acc*>(loss) = static_cast<Acc>(sum);
}

template <typename T>
void backward(const void* upstream, const void* W, const void* U, const uint8_t* mask, const void* cosine,
              const void* identity_norm, const void* viewpoint_norm, void* grad_W, void* grad_U, int64_t K, int64_t V,
              int64_t D, int threads) {
  using Acc = typename Accumulator<T>::type;
  parallel_for(K, threads, [&](int64_t begin, int64_t end, int) {
    backward_rows(*static_cast<const Acc*>(upstream), static_cast<const T*>(W), static_cast<const T*>(U), mask,
                  static_cast<const Acc*>(cosine), static_cast<const Acc*>(identity_norm),
                  static_cast<const Acc*>(viewpoint_norm), static_cast<T*>(grad_W), static_cast<T*>(grad_U), V, D,
                  begin, end);
  });
}

}  // namespace

void angular_center_forward_cpu(const void* W, const void* U, const uint8_t* mask, void* loss, void* cosine,
                                void* identity_norm, void* viewpoint_norm, DType dtype, int64_t K, int64_t V, int64_t D,
                                const Place& place) {
  dispatch_float(dtype, [&](auto type) {
    forward<typename decltype(type)::type>(W, U, mask, loss, cosine, identity_norm, viewpoint_norm, K, V, D,
                                           place.threads);
  });
}

void angular_center_backward_cpu(const void* upstream, const void* W, const void* U, const uint8_t* mask,
                                 const void* cosine, const void* identity_norm, const void* viewpoint_norm,
                                 void* grad_W, void* grad_U, DType dtype, int64_t K, int64_t V, int64_t D,
                                 const Place& place) {
  dispatch_float(dtype, [&](auto type) {
    backward<typename decltype(type)::type>(upstream, W, U, mask, cosine, identity_norm, viewpoint_norm, grad_W, grad_U,
                                            K, V, D, place.threads);
  });
}

}  // namespace vareid
