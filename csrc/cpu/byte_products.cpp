#include "cpu/byte_products.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#if defined(__x86_64__) && defined(__GNUC__) && defined(__unix__)
#define VAREID_BYTE_PRODUCTS
#include <immintrin.h>
#include <setjmp.h>
#include <signal.h>
#endif

namespace vareid {

#ifdef VAREID_BYTE_PRODUCTS
#define VAREID_VNNI __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")))

namespace {

// Rows of smaller elements are taken for zeros: their scale's inverse would leave float32's range.
constexpr float kSmallest = 0x1p-100f;

VAREID_VNNI inline __m512i round_elements(const float* x, __mmask16 mask, __m512 inverse) {
  return _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_maskz_loadu_ps(mask, x), inverse));
}

inline __mmask16 first_elements(int64_t count) {
  return static_cast<__mmask16>(count >= 16 ? 0xffffu : (1u << count) - 1);
}

inline float inverse_of(float scale) { return scale > 0 ? 1 / scale : 0.0f; }

// 8 rows and 32 columns: `left` points at the first row within its panel.
VAREID_VNNI void product_8x32(const uint8_t* left, const uint8_t* right, int64_t panel_bytes, const float* left_scale,
                              const float* right_scale, const int32_t* right_sum, float* out, int64_t ld) {
  __m512i sums[kByteRows][2];
  for (int half = 0; half < 2; ++half) {
    const __m512i added = _mm512_loadu_si512(right_sum + half * kBytePanel);
    const __m512i start = _mm512_slli_epi32(_mm512_sub_epi32(_mm512_setzero_si512(), added), 7);  // -128 sum
    for (int r = 0; r < kByteRows; ++r) sums[r][half] = start;
  }
  for (int64_t at = 0; at < panel_bytes; at += 64) {
    const __m512i first = _mm512_loadu_si512(right + at), second = _mm512_loadu_si512(right + panel_bytes + at);
#pragma GCC unroll 8
    for (int r = 0; r < kByteRows; ++r) {
      int32_t four;
      std::memcpy(&four, left + at + 4 * r, 4);
      const __m512i row = _mm512_set1_epi32(four);
      sums[r][0] = _mm512_dpbusd_epi32(sums[r][0], row, first);
      sums[r][1] = _mm512_dpbusd_epi32(sums[r][1], row, second);
    }
  }
  for (int half = 0; half < 2; ++half) {
    const __m512 columns = _mm512_loadu_ps(right_scale + half * kBytePanel);
    for (int r = 0; r < kByteRows; ++r) {
      const __m512 product = _mm512_mul_ps(_mm512_cvtepi32_ps(sums[r][half]), _mm512_set1_ps(left_scale[r]));
      _mm512_storeu_ps(out + r * ld + half * kBytePanel, _mm512_mul_ps(product, columns));
    }
  }
}

sigjmp_buf g_back;
void refuse_instruction(int) { siglongjmp(g_back, 1); }

// A small product whose result is known.
bool product_is_right() {
  float x[kByteColumns * 5], scale[kByteColumns], out[kByteRows * kByteColumns];
  int32_t sum[kByteColumns];
  alignas(64) uint8_t left[kByteColumns * 8], right[kByteColumns * 8];
  for (int64_t i = 0; i < kByteColumns * 5; ++i) x[i] = static_cast<float>(i * 37 % 255 - 127);
  std::fill(scale, scale + kByteColumns, 1.0f);
  for (int64_t panel = 0; panel < 2; ++panel)
    for (const bool is_left : {true, false})
      byte_pack(x + panel * kBytePanel * 5, 5, kBytePanel, 5, scale, is_left,
                (is_left ? left : right) + panel * kBytePanel * 8, sum + panel * kBytePanel);
  byte_product(left, scale, kByteRows, right, scale, sum, kByteColumns, 8, out, kByteColumns);
  for (int64_t r = 0; r < kByteRows; ++r)
    for (int64_t c = 0; c < kByteColumns; ++c) {
      float expected = 0;
      for (int64_t d = 0; d < 5; ++d) expected += x[r * 5 + d] * x[c * 5 + d];
      if (out[r * kByteColumns + c] != expected) return false;
    }
  return true;
}

ByteProducts try_byte_products() {
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
      !__builtin_cpu_supports("avx512vl") || !__builtin_cpu_supports("avx512dq") ||
      !__builtin_cpu_supports("avx512vnni"))
    return ByteProducts::kAbsent;
  // Some machines name instructions that they do not execute: the signal says so.
  struct sigaction trial = {}, before;
  trial.sa_handler = refuse_instruction;
  sigemptyset(&trial.sa_mask);
  if (sigaction(SIGILL, &trial, &before) != 0) return ByteProducts::kBroken;
  const bool right = sigsetjmp(g_back, 1) == 0 && product_is_right();
  sigaction(SIGILL, &before, nullptr);
  return right ? ByteProducts::kUsable : ByteProducts::kBroken;
}

}  // namespace

ByteProducts byte_products() {
  static const ByteProducts found = try_byte_products();
  return found;
}

VAREID_VNNI void byte_rounding(const float* x, int64_t D, float* scale, double* rounded) {
  __m512 largest = _mm512_setzero_ps();
  for (int64_t d = 0; d < D; d += 16)
    largest = _mm512_max_ps(largest, _mm512_abs_ps(_mm512_maskz_loadu_ps(first_elements(D - d), x + d)));
  const float size = _mm512_reduce_max_ps(largest);
  *scale = size < kSmallest ? 0.0f : size / 127;
  const __m512 inverse = _mm512_set1_ps(inverse_of(*scale));
  const __m512d unit = _mm512_set1_pd(*scale);
  __m512d sum = _mm512_setzero_pd();
  for (int64_t d = 0; d < D; d += 16) {
    const __mmask16 mask = first_elements(D - d);
    const __m512 value = _mm512_maskz_loadu_ps(mask, x + d);
    const __m512i whole = round_elements(x + d, mask, inverse);
    const __m512d low = _mm512_fnmadd_pd(_mm512_cvtepi32_pd(_mm512_castsi512_si256(whole)), unit,
                                         _mm512_cvtps_pd(_mm512_castps512_ps256(value)));
    const __m512d high = _mm512_fnmadd_pd(_mm512_cvtepi32_pd(_mm512_extracti64x4_epi64(whole, 1)), unit,
                                          _mm512_cvtps_pd(_mm512_extractf32x8_ps(value, 1)));
    sum = _mm512_fmadd_pd(high, high, _mm512_fmadd_pd(low, low, sum));
  }
  *rounded = _mm512_reduce_add_pd(sum);
}

VAREID_VNNI void byte_pack(const float* x, int64_t stride, int64_t rows, int64_t D, const float* scale, bool left,
                           uint8_t* panel, int32_t* sum) {
  const int64_t elements = packed_elements(D);
  const __m512i added = _mm512_set1_epi8(left ? -128 : 0), one = _mm512_set1_epi8(1);
  for (int64_t r = 0; r < kBytePanel; r += 4) {
    const float* row[4];
    __m512 inverse[4];
    for (int64_t q = 0; q < 4; ++q) {
      row[q] = x + std::min(r + q, rows - 1) * stride;
      inverse[q] = _mm512_set1_ps(r + q < rows ? inverse_of(scale[r + q]) : 0.0f);
    }
    __m512i total = _mm512_setzero_si512();
    for (int64_t d = 0; d < elements; d += 16) {
      const __mmask16 mask = first_elements(D - d);
      __m512i whole[4];
      for (int64_t q = 0; q < 4; ++q) whole[q] = round_elements(row[q] + d, mask, inverse[q]);
      // Four elements of four rows in each quarter, as in a panel.
      const __m512i bytes =
          _mm512_packs_epi16(_mm512_packs_epi32(whole[0], whole[1]), _mm512_packs_epi32(whole[2], whole[3]));
      total = _mm512_dpbusd_epi32(total, one, bytes);
      alignas(64) uint8_t quarters[4][16];
      _mm512_store_si512(quarters, _mm512_xor_si512(bytes, added));
      const int64_t fours = std::min<int64_t>(4, (elements - d) / 4);
      for (int64_t f = 0; f < fours; ++f) std::memcpy(panel + (d + 4 * f) * kBytePanel + 4 * r, quarters[f], 16);
    }
    alignas(64) int32_t sums[4][4];
    _mm512_store_si512(sums, total);
    for (int64_t q = 0; q < 4; ++q) sum[r + q] = sums[0][q] + sums[1][q] + sums[2][q] + sums[3][q];
  }
}

VAREID_VNNI void byte_product(const uint8_t* left, const float* left_scale, int64_t rows, const uint8_t* right,
                              const float* right_scale, const int32_t* right_sum, int64_t columns, int64_t elements,
                              float* out, int64_t ld) {
  const int64_t panel_bytes = elements * kBytePanel;
  for (int64_t c = 0; c < columns; c += kByteColumns)
    for (int64_t r = 0; r < rows; r += kByteRows)
      product_8x32(left + r / kBytePanel * panel_bytes + r % kBytePanel * 4, right + c / kBytePanel * panel_bytes,
                   panel_bytes, left_scale + r, right_scale + c, right_sum + c, out + r * ld + c, ld);
}

#else

ByteProducts byte_products() { return ByteProducts::kAbsent; }
void byte_rounding(const float*, int64_t, float*, double*) {}
void byte_pack(const float*, int64_t, int64_t, int64_t, const float*, bool, uint8_t*, int32_t*) {}
void byte_product(const uint8_t*, const float*, int64_t, const uint8_t*, const float*, const int32_t*, int64_t, int64_t,
                  float*, int64_t) {}

#endif

}  // namespace vareid
