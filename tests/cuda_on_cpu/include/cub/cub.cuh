#error "CUDA-on-CPU: CUB is not supported: write the block or warp primitive out (csrc/cuda/reduce.cuh has reductions)"
