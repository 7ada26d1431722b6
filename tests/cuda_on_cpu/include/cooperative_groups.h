#error "CUDA-on-CPU: cooperative groups are not supported: use __syncthreads, __syncwarp and the _sync warp intrinsics"
