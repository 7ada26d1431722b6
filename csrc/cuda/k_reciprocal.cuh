// What the stages of re-ranking share on a GPU.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace vareid {

// sums[i + 1] holds a count; it becomes the sum of the first i + 1 counts, and sums[0] becomes 0.
void k_reciprocal_running_sums(int64_t* sums, int64_t count, cudaStream_t stream);

}  // namespace vareid
