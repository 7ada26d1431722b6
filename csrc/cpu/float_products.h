// Products of float32 rows, for the blocks that are wanted themselves, on CPUs with AVX-512: they are scanned while
// they are in cache, and the vendor's library takes up to twice as long for features of some hundred elements.
//
// Packed columns lie in panels of 32: for each element, those of 32 columns. Columns that are missing in the last panel
// are zeros.
#pragma once

#include <cstdint>

namespace vareid {

constexpr int64_t kFloatPanel = 32;

// Whether this CPU makes them.
bool float_products();

// Packs up to 32 columns, stride elements apart, as one panel of D times 32.
void float_pack(const float* y, int64_t stride, int64_t columns, int64_t D, float* panel);

// out[r, c] = x_r . y_c for packed columns, a multiple of 32. Rows are written in eights: out has memory for that.
void float_product(const float* x, int64_t stride, int64_t rows, const float* panels, int64_t columns, int64_t D,
                   float* out, int64_t ld);

}  // namespace vareid
