#error "CUDA-on-CPU: cooperative groups is not supported: use __syncthreads, __syncwarp and the _sync warp intrinsics"
