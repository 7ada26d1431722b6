#error "CUDA-on-CPU: asynchronous copies (cuda_pipeline.h) is not supported: load through registers"
