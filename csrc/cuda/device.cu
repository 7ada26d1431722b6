// The device probe: asks the runtime whether a kernel of this build can run on a device.
#include "device.h"

#include <cuda_runtime.h>

namespace vareid {
namespace {

__global__ void probe_kernel() {}

// Loads the probe on the current device.
cudaError_t load_probe() {
  cudaFuncAttributes attributes;
  return cudaFuncGetAttributes(&attributes, probe_kernel);
}

// The runtime calls a driver that is missing insufficient too.
std::string insufficient_driver() {
  int version = 0;
  if (cudaDriverGetVersion(&version) != cudaSuccess || version == 0) return "no CUDA device: there is no NVIDIA driver";
  return "the NVIDIA driver is for CUDA " + std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10) +
         ", these kernels for CUDA " + std::to_string(CUDART_VERSION / 1000);
}

}  // namespace

std::string cuda_unusable_reason(int device) {
  int devices = 0;
  const cudaError_t counted = cudaGetDeviceCount(&devices);
  if (counted != cudaSuccess) {
    cudaGetLastError();
    if (counted == cudaErrorInsufficientDriver) return insufficient_driver();
    return std::string("no usable CUDA device: ") + cudaGetErrorString(counted);
  }
  if (devices == 0) return "no CUDA device";
  if (device < 0 || device >= devices)
    return "no CUDA device " + std::to_string(device) + ": there are " + std::to_string(devices);
  int previous = 0;
  cudaError_t loaded = cudaGetDevice(&previous);
  if (loaded == cudaSuccess) {
    loaded = cudaSetDevice(device);
    if (loaded == cudaSuccess) loaded = load_probe();
    if (previous != device) cudaSetDevice(previous);
  }
  if (loaded != cudaSuccess) {
    cudaGetLastError();
    return std::string("the GPU cannot run this build's kernels: ") + cudaGetErrorString(loaded);
  }
  return "";
}

}  // namespace vareid
