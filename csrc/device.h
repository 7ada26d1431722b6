// The device probe.
#pragma once

#include <string>

namespace vareid {

// Why the CUDA kernels of this build cannot run on a device (counted from 0), or "" if they can. Never throws: any
// failure of the driver or the runtime is a reason. The current device is the same afterwards.
std::string cuda_unusable_reason(int device);

}  // namespace vareid
