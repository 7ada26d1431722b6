#error "CUDA-on-CPU: cuRAND is not supported: pass random numbers in"
