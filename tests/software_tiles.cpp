// Packs and multiplies rows of 8-bit numbers for tests/test_byte_products.py: with the instructions that the machine
// has, with AVX512-VNNI, and with AMX's kernel over tiles in software.
#include <vector>

#include "cpu/byte_products.cpp"

using namespace vareid;

namespace {

// The instructions as Intel's manual describes them. What a machine refuses, and tiles that are left, set `failed`.
struct SoftwareTiles {
  static inline TileShapes shapes;
  static inline bool configured = false, failed = false;
  static inline uint8_t bytes[8][16][64];

  static void configure(const TileShapes& given) {
    failed |= configured;
    for (uint8_t byte : given.reserved) failed |= byte != 0;
    for (int tile = 0; tile < 16; ++tile) {
      const int used = tile < 8;
      failed |= given.row_bytes[tile] > 64 * used || given.rows[tile] > 16 * used;
    }
    failed |= sizeof(given) != 64 || given.palette != 1 || given.start_row != 0;
    shapes = given;
    configured = true;
    std::memset(bytes, 0, sizeof(bytes));
  }
  static void release() {
    failed |= !configured;
    configured = false;
  }

  template <int kTile>
  static void zero() {
    failed |= !configured;
    std::memset(bytes[kTile], 0, sizeof(bytes[kTile]));
  }
  template <int kTile>
  static void load(const uint8_t* from) {
    zero<kTile>();
    for (int row = 0; row < shapes.rows[kTile]; ++row)
      std::memcpy(bytes[kTile][row], from + row * kTileElements, shapes.row_bytes[kTile]);
  }
  template <int kTile>
  static void store(int32_t (*to)[kBytePanel]) {
    failed |= !configured;
    for (int row = 0; row < shapes.rows[kTile]; ++row) std::memcpy(to[row], bytes[kTile][row], shapes.row_bytes[kTile]);
  }

  template <int kSums, int kRows, int kColumns>
  static void add_products() {
    failed |= !configured || shapes.row_bytes[kRows] != 4 * shapes.rows[kColumns] ||
              shapes.rows[kSums] != shapes.rows[kRows] || shapes.row_bytes[kSums] != shapes.row_bytes[kColumns];
    for (int m = 0; m < shapes.rows[kSums]; ++m)
      for (int n = 0; n < shapes.row_bytes[kSums] / 4; ++n) {
        int32_t sum;
        std::memcpy(&sum, &bytes[kSums][m][4 * n], 4);
        for (int k = 0; k < shapes.row_bytes[kRows]; ++k)
          sum += static_cast<int8_t>(bytes[kRows][m][k]) * static_cast<int8_t>(bytes[kColumns][k / 4][4 * n + k % 4]);
        std::memcpy(&bytes[kSums][m][4 * n], &sum, 4);
      }
  }
};

struct Packed {
  std::vector<uint8_t> bytes;
  std::vector<float> scales;
  std::vector<int32_t> sums;
};

Packed pack_rows(const float* x, int64_t rows, int64_t D, const float* scale, bool left, ByteInstructions with) {
  const int64_t padded = packed_rows(rows), elements = elements_of(D, with);
  Packed out{std::vector<uint8_t>(padded * elements, 0xee), std::vector<float>(padded), std::vector<int32_t>(padded)};
  std::copy(scale, scale + rows, out.scales.begin());
  for (int64_t r = 0; r < padded; r += kBytePanel)
    pack_panel(x + r * D, D, std::min(kBytePanel, rows - r), D, out.scales.data() + r, left, with,
               out.bytes.data() + r * elements, out.sums.data() + r);
  return out;
}

}  // namespace

// 1 for AVX512-VNNI, 2 for AMX-INT8, 0 for neither.
extern "C" int usable() { return static_cast<int>(byte_products().used); }

// out [rows rounded up to 8, columns rounded up to 32], ld apart, of x [rows, D] and y [columns, D]; false where tiles
// were used wrongly. `with` as usable() counts; AMX is the machine's or, with `software`, that above.
extern "C" bool multiply(int with, bool software, const float* x, const float* x_scale, int64_t rows, const float* y,
                         const float* y_scale, int64_t columns, int64_t D, float* out, int64_t ld) {
  const auto instructions = static_cast<ByteInstructions>(with);
  const Packed left = pack_rows(x, rows, D, x_scale, true, instructions);
  const Packed right = pack_rows(y, columns, D, y_scale, false, instructions);
  const auto product = software                                 ? tile_product<SoftwareTiles>
                       : instructions == ByteInstructions::kAmx ? amx_product
                                                                : vnni_product;
  product(left.bytes.data(), left.scales.data(), (rows + kByteRows - 1) / kByteRows * kByteRows, right.bytes.data(),
          right.scales.data(), right.sums.data(), packed_rows(columns), elements_of(D, instructions), out, ld);
  return !SoftwareTiles::failed && !SoftwareTiles::configured;
}
