#error "CUDA-on-CPU: tensor-core fragments (mma.h) are not supported: guard that variant"
