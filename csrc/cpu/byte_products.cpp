#include "cpu/byte_products.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#if defined(__x86_64__) && defined(__GNUC__) && defined(__unix__)
#define VAREID_BYTE_PRODUCTS
#include <immintrin.h>
#include <setjmp.h>
#include <signal.h>
// The assemblers of older compilers do not know AMX.
#if defined(__linux__) && (defined(__clang__) ? __clang_major__ >= 12 : __GNUC__ >= 11)
#define VAREID_AMX
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace vareid {

#ifdef VAREID_BYTE_PRODUCTS
#define VAREID_VNNI __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")))

namespace {

// Rows of smaller elements are taken for zeros: their scale's inverse would leave float32's range.
constexpr float kSmallest = 0x1p-100f;

constexpr int64_t kTileElements = 64;  // of each row of a tile
constexpr int64_t kTileBytes = kBytePanel * kTileElements;

VAREID_VNNI inline __m512i round_elements(const float* x, __mmask16 mask, __m512 inverse) {
  return _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_maskz_loadu_ps(mask, x), inverse));
}

inline __mmask16 first_elements(int64_t count) {
  return static_cast<__mmask16>((1u << std::clamp<int64_t>(count, 0, 16)) - 1);
}

inline float inverse_of(float scale) { return scale > 0 ? 1 / scale : 0.0f; }

VAREID_VNNI inline __m512 scaled(__m512i sums, float row, __m512 columns) {
  return _mm512_mul_ps(_mm512_mul_ps(_mm512_cvtepi32_ps(sums), _mm512_set1_ps(row)), columns);
}

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
    for (int r = 0; r < kByteRows; ++r)
      _mm512_storeu_ps(out + r * ld + half * kBytePanel, scaled(sums[r][half], left_scale[r], columns));
  }
}

VAREID_VNNI void vnni_product(const uint8_t* left, const float* left_scale, int64_t rows, const uint8_t* right,
                              const float* right_scale, const int32_t* right_sum, int64_t columns, int64_t elements,
                              float* out, int64_t ld) {
  const int64_t panel_bytes = elements * kBytePanel;
  for (int64_t c = 0; c < columns; c += kByteColumns)
    for (int64_t r = 0; r < rows; r += kByteRows)
      product_8x32(left + r / kBytePanel * panel_bytes + r % kBytePanel * 4, right + c / kBytePanel * panel_bytes,
                   panel_bytes, left_scale + r, right_scale + c, right_sum + c, out + r * ld + c, ld);
}

// What LDTILECFG reads: eight tiles of 16 rows of 64 bytes.
struct TileShapes {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// Tiles holds AMX's instructions: the machine's, or those of a test in software. Of 32 rows and 32 columns at once,
// four tiles hold the sums, two 64 elements of the rows, two those of the columns. No tile is in use before or after: a
// signal's handler, a fork and other libraries find none.
template <typename Tiles>
VAREID_VNNI void tile_product(const uint8_t* left, const float* left_scale, int64_t rows, const uint8_t* right,
                              const float* right_scale, const int32_t*, int64_t columns, int64_t elements, float* out,
                              int64_t ld) {
  const int64_t panel_bytes = elements * kBytePanel;
  alignas(64) int32_t sums[2][2][kBytePanel][kBytePanel];
  Tiles::configure(TileShapes{});
  for (int64_t c = 0; c < columns; c += kByteColumns)
    for (int64_t r = 0; r < rows; r += kByteColumns) {
      const uint8_t *const first_rows = left + r * elements, *const first_columns = right + c * elements;
      Tiles::template zero<0>();
      Tiles::template zero<1>();
      Tiles::template zero<2>();
      Tiles::template zero<3>();
      for (int64_t at = 0; at < panel_bytes; at += kTileBytes) {
        Tiles::template load<4>(first_rows + at);
        Tiles::template load<6>(first_columns + at);
        Tiles::template add_products<0, 4, 6>();
        Tiles::template load<7>(first_columns + panel_bytes + at);
        Tiles::template add_products<1, 4, 7>();
        Tiles::template load<5>(first_rows + panel_bytes + at);
        Tiles::template add_products<2, 5, 6>();
        Tiles::template add_products<3, 5, 7>();
      }
      Tiles::template store<0>(sums[0][0]);
      Tiles::template store<1>(sums[0][1]);
      Tiles::template store<2>(sums[1][0]);
      Tiles::template store<3>(sums[1][1]);
      for (int half = 0; half < 2; ++half) {
        const __m512 scales = _mm512_loadu_ps(right_scale + c + half * kBytePanel);
        for (int64_t i = 0; i < std::min(kByteColumns, rows - r); ++i)
          _mm512_storeu_ps(
              out + (r + i) * ld + c + half * kBytePanel,
              scaled(_mm512_load_si512(sums[i / kBytePanel][half][i % kBytePanel]), left_scale[r + i], scales));
      }
    }
  Tiles::release();
}

#ifdef VAREID_AMX
struct AmxTiles {
  static void configure(const TileShapes& shapes) { asm volatile("ldtilecfg %0" ::"m"(shapes)); }
  static void release() { asm volatile("tilerelease"); }

  template <int kTile>
  static void zero() {
    asm volatile("tilezero %%tmm%c0" ::"i"(kTile));
  }

  template <int kTile>
  static void load(const uint8_t* bytes) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(bytes), "r"(kTileElements), "i"(kTile) : "memory");
  }

  template <int kSums, int kRows, int kColumns>
  static void add_products() {
    asm volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kSums), "i"(kRows), "i"(kColumns));
  }

  template <int kTile>
  static void store(int32_t (*sums)[kBytePanel]) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(sums), "r"(sizeof(*sums)), "i"(kTile) : "memory");
  }
};
constexpr auto* amx_product = tile_product<AmxTiles>;

// Linux grants a process tiles when it is asked to.
bool names_amx() {
  constexpr int kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILE_DATA
  unsigned a, b, c, d;
  constexpr unsigned kTiles = 1u << 24, kInt8 = 1u << 25;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & kTiles) && (d & kInt8) &&
         syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}
#else
constexpr auto* amx_product = vnni_product;
bool names_amx() { return false; }
#endif

bool names_vnni() {
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vnni");
}

int64_t elements_of(int64_t D, ByteInstructions instructions) {
  const int64_t step = instructions == ByteInstructions::kAmx ? kTileElements : 4;
  return (D + step - 1) / step * step;
}

VAREID_VNNI void pack_panel(const float* x, int64_t stride, int64_t rows, int64_t D, const float* scale, bool left,
                            ByteInstructions instructions, uint8_t* panel, int32_t* sum) {
  const int64_t elements = elements_of(D, instructions);
  const bool left_tiles = left && instructions == ByteInstructions::kAmx;
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
      if (left_tiles) {
        uint8_t* const at = panel + d / kTileElements * kTileBytes + d % kTileElements;
        for (int64_t q = 0; q < 4; ++q)
          _mm_storeu_si128(reinterpret_cast<__m128i*>(at + (r + q) * kTileElements), _mm512_cvtsepi32_epi8(whole[q]));
        continue;
      }
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

sigjmp_buf g_back;
void refuse_instruction(int) { siglongjmp(g_back, 1); }

// A small product whose result is known.
bool product_is_right(ByteInstructions instructions) {
  constexpr int64_t kD = 70, kPadded = 128;
  float x[kByteColumns * kD], scale[kByteColumns], out[kByteColumns * kByteColumns];
  int32_t sum[kByteColumns];
  alignas(64) uint8_t left[kByteColumns * kPadded], right[kByteColumns * kPadded];
  for (int64_t i = 0; i < kByteColumns * kD; ++i) x[i] = static_cast<float>(i * 37 % 255 - 127);
  std::fill(scale, scale + kByteColumns, 1.0f);
  const int64_t elements = elements_of(kD, instructions);
  for (int64_t r = 0; r < kByteColumns; r += kBytePanel)
    for (const bool is_left : {true, false})
      pack_panel(x + r * kD, kD, kBytePanel, kD, scale, is_left, instructions, (is_left ? left : right) + r * elements,
                 sum + r);
  const auto product = instructions == ByteInstructions::kAmx ? amx_product : vnni_product;
  product(left, scale, kByteColumns, right, scale, sum, kByteColumns, elements, out, kByteColumns);
  for (int64_t r = 0; r < kByteColumns; ++r)
    for (int64_t c = 0; c < kByteColumns; ++c) {
      float expected = 0;
      for (int64_t d = 0; d < kD; ++d) expected += x[r * kD + d] * x[c * kD + d];
      if (out[r * kByteColumns + c] != expected) return false;
    }
  return true;
}

// Some machines name instructions that they do not execute: the signal says so.
bool executes(ByteInstructions instructions) {
  struct sigaction trial = {}, before;
  trial.sa_handler = refuse_instruction;
  sigemptyset(&trial.sa_mask);
  if (sigaction(SIGILL, &trial, &before) != 0) return false;
  const bool right = sigsetjmp(g_back, 1) == 0 && product_is_right(instructions);
  sigaction(SIGILL, &before, nullptr);
  return right;
}

ByteProducts try_byte_products() {
  using Instructions = ByteInstructions;
  if (!names_vnni()) return {Instructions::kNone, Instructions::kNone};
  if (!executes(Instructions::kVnni)) return {Instructions::kNone, Instructions::kVnni};
  if (!names_amx()) return {Instructions::kVnni, Instructions::kNone};
  if (!executes(Instructions::kAmx)) return {Instructions::kVnni, Instructions::kAmx};
  return {Instructions::kAmx, Instructions::kNone};
}

}  // namespace

const ByteProducts& byte_products() {
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

int64_t packed_elements(int64_t D) { return elements_of(D, byte_products().used); }

void byte_pack(const float* x, int64_t stride, int64_t rows, int64_t D, const float* scale, bool left, uint8_t* panel,
               int32_t* sum) {
  pack_panel(x, stride, rows, D, scale, left, byte_products().used, panel, sum);
}

void byte_product(const uint8_t* left, const float* left_scale, int64_t rows, const uint8_t* right,
                  const float* right_scale, const int32_t* right_sum, int64_t columns, int64_t elements, float* out,
                  int64_t ld) {
  const auto product = byte_products().used == ByteInstructions::kAmx ? amx_product : vnni_product;
  product(left, left_scale, rows, right, right_scale, right_sum, columns, elements, out, ld);
}

#else

const ByteProducts& byte_products() {
  static constexpr ByteProducts none{ByteInstructions::kNone, ByteInstructions::kNone};
  return none;
}
int64_t packed_elements(int64_t D) { return D; }
void byte_rounding(const float*, int64_t, float*, double*) {}
void byte_pack(const float*, int64_t, int64_t, int64_t, const float*, bool, uint8_t*, int32_t*) {}
void byte_product(const uint8_t*, const float*, int64_t, const uint8_t*, const float*, const int32_t*, int64_t, int64_t,
                  float*, int64_t) {}

#endif

}  // namespace vareid
