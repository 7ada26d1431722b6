#include "cpu/float_products.h"

#include <algorithm>

#if defined(__x86_64__) && defined(__GNUC__) && defined(__unix__)
#define VAREID_FLOAT_PRODUCTS
#include <immintrin.h>
#endif

namespace vareid {

#ifdef VAREID_FLOAT_PRODUCTS

namespace {

constexpr int64_t kRows = 8;        // with two vectors of columns: 16 sums in registers
constexpr int64_t kElements = 256;  // of a panel, 32 KiB, which stay in the first-level cache

// 8 rows and 32 columns, added to `out` or not.
__attribute__((target("avx512f"))) void product_8x32(const float* const (&x)[kRows], const float* panel,
                                                     int64_t elements, bool add, float* out, int64_t ld) {
  __m512 sums[kRows][2];
  for (int r = 0; r < kRows; ++r)
    for (int half = 0; half < 2; ++half)
      sums[r][half] = add ? _mm512_loadu_ps(out + r * ld + 16 * half) : _mm512_setzero_ps();
  for (int64_t d = 0; d < elements; ++d) {
    const __m512 first = _mm512_loadu_ps(panel + kFloatPanel * d),
                 second = _mm512_loadu_ps(panel + kFloatPanel * d + 16);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const __m512 element = _mm512_set1_ps(x[r][d]);
      sums[r][0] = _mm512_fmadd_ps(element, first, sums[r][0]);
      sums[r][1] = _mm512_fmadd_ps(element, second, sums[r][1]);
    }
  }
  for (int r = 0; r < kRows; ++r)
    for (int half = 0; half < 2; ++half) _mm512_storeu_ps(out + r * ld + 16 * half, sums[r][half]);
}

}  // namespace

bool float_products() { return __builtin_cpu_supports("avx512f"); }

void float_pack(const float* y, int64_t stride, int64_t columns, int64_t D, float* panel) {
  constexpr int64_t kLine = 16;  // elements of a column that are read at once
  for (int64_t begin = 0; begin < D; begin += kLine)
    for (int64_t c = 0; c < kFloatPanel; ++c)
      for (int64_t d = begin; d < std::min(D, begin + kLine); ++d)
        panel[d * kFloatPanel + c] = c < columns ? y[c * stride + d] : 0.0f;
}

void float_product(const float* x, int64_t stride, int64_t rows, const float* panels, int64_t columns, int64_t D,
                   float* out, int64_t ld) {
  for (int64_t c = 0; c < columns; c += kFloatPanel)
    for (int64_t d = 0; d < D; d += kElements)
      for (int64_t r = 0; r < rows; r += kRows) {
        const float* row[kRows];
        for (int64_t i = 0; i < kRows; ++i) row[i] = x + std::min(r + i, rows - 1) * stride + d;
        product_8x32(row, panels + c * D + d * kFloatPanel, std::min(kElements, D - d), d > 0, out + r * ld + c, ld);
      }
}

#else

bool float_products() { return false; }
void float_pack(const float*, int64_t, int64_t, int64_t, float*) {}
void float_product(const float*, int64_t, int64_t, const float*, int64_t, int64_t, float*, int64_t) {}

#endif

}  // namespace vareid
