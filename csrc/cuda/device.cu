// The device probe: asks the runtime whether a kernel of this build can run.
#include "device.h"

#include <cuda_runtime.h>

namespace vareid {
namespace {

__global__ void probe_kernel() {}

}  // namespace

std::string cuda_unusable_reason() {
  int devices = 0;
  const cudaError_t counted = cudaGetDeviceCount(&devices);
  if (counted != cudaSuccess) {
    cudaGetLastError();
    return std::string("no usable CUDA device: ") + cudaGetErrorString(counted);
  }
  if (devices == 0) return "no CUDA device";
  cudaFuncAttributes attributes;
  const cudaError_t loaded = cudaFuncGetAttributes(&attributes, probe_kernel);
  if (loaded != cudaSuccess) {
    cudaGetLastError();
    return std::string("the GPU cannot run this build's kernels: ") + cudaGetErrorString(loaded);
  }
  return "";
}

}  // namespace vareid
