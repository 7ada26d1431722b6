// Launching kernels: the only place that knows how. Under nvcc a launch is cudaLaunchKernelEx; in the CUDA-on-CPU test
// build (VAREID_CUDA_ON_CPU) the included cuda_runtime.h is the test harness's own and supplies the same names.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "dtype.h"

// Dynamic shared memory: DYN_SHARED(float, name) declares `float* name`, 16-byte aligned.
#ifndef VAREID_CUDA_ON_CPU
#define DYN_SHARED(T, name)                                               \
  extern __shared__ __align__(16) unsigned char vareid_dynamic_shared_[]; \
  T* const name = reinterpret_cast<T*>(vareid_dynamic_shared_)
#endif

namespace vareid {

inline void check_cuda(cudaError_t status, const char* what) {
  if (status != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status));
}

// Selects a device for the life of the object.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    check_cuda(cudaGetDevice(&previous_), "cudaGetDevice");
    if (previous_ != device) {
      check_cuda(cudaSetDevice(device), "cudaSetDevice");
      changed_ = true;
    }
  }
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(previous_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int previous_ = 0;
  bool changed_ = false;
};

#ifndef VAREID_CUDA_ON_CPU
template <typename... Params, typename... Args>
void launch(void (*kernel)(Params...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream,
            Args&&... args) {
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  check_cuda(cudaLaunchKernelEx(&config, kernel, std::forward<Args>(args)...), "kernel launch");
}
#endif

constexpr int64_t kMostBlocks = (int64_t{1} << 31) - 1;  // of a grid

// Blocks for `items` block-sized pieces of work, at least one. A grid that cannot hold them is an error: launchers
// whose kernels stride over the rest ask for less.
inline unsigned grid_size(int64_t items) {
  if (items > kMostBlocks)
    throw std::invalid_argument("launch: " + std::to_string(items) + " blocks, but a grid holds at most 2^31 - 1");
  return static_cast<unsigned>(std::max<int64_t>(1, items));
}

}  // namespace vareid
