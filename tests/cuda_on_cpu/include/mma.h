#error "CUDA-on-CPU: tensor-core fragments (mma.h) is not supported: write the plain multiply-add and guard the tensor-core variant with #ifndef VAREID_CUDA_ON_CPU"
