// Products of rows that are rounded to whole numbers of 8 bits: p_i = scale_i a_i + r_i with |a_ik| <= 127. The sums
// of a_i . a_j are exact, so a product is off by nothing but what was rounded away, |r_i|, and instructions agree to
// the last bit. On x86-64, one multiplies and sums 64 pairs (AVX512-VNNI) or 16,384 (AMX-INT8).
//
// Packed rows lie in panels of 16: for each four elements (the last ones filled up with zeros), those of 16 rows, 64
// bytes. Rows that are missing in the last two panels are zeros. AMX takes elements by 64, and of each row of a left
// operand 64 elements together: 1,024 bytes are a tile of either operand.
#pragma once

#include <cstdint>

namespace vareid {

constexpr int64_t kBytePanel = 16;
constexpr int64_t kByteRows = 8;      // of the smallest product
constexpr int64_t kByteColumns = 32;  // likewise

enum class ByteInstructions : int32_t { kNone = 0, kVnni = 1, kAmx = 2 };

struct ByteProducts {
  ByteInstructions used;    // a product was tried and came out right
  ByteInstructions broken;  // the machine names them, and it did not
};
const ByteProducts& byte_products();

// Elements of a packed row, and rows that `rows` are packed as.
int64_t packed_elements(int64_t D);
constexpr int64_t packed_rows(int64_t rows) { return (rows + kByteColumns - 1) / kByteColumns * kByteColumns; }

// Of one row: the scale, and |p - scale a|^2.
void byte_rounding(const float* x, int64_t D, float* scale, double* rounded);

// Packs up to 16 rows, stride elements apart, as one panel. sum[r] = the sum of row r's numbers. To a left operand of
// AVX512-VNNI, 128 is added.
void byte_pack(const float* x, int64_t stride, int64_t rows, int64_t D, const float* scale, bool left, uint8_t* panel,
               int32_t* sum);

// out[r, c] = scale_r scale_c a_r . a_c of `rows` packed rows and `columns` packed columns (multiples of 8 and 32, the
// first of both the first of a panel), of `elements` packed elements. Rows are read up to the next multiple of 32.
void byte_product(const uint8_t* left, const float* left_scale, int64_t rows, const uint8_t* right,
                  const float* right_scale, const int32_t* right_sum, int64_t columns, int64_t elements, float* out,
                  int64_t ld);

}  // namespace vareid
