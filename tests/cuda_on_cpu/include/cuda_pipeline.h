#error "CUDA-on-CPU: asynchronous copies (cuda_pipeline.h) are not supported: load through registers"
