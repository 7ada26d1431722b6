// The device probe.
#pragma once

#include <string>

namespace vareid {

// Why the CUDA kernels of this build cannot run on this machine, or "" if they can. Never throws: any failure of the
// driver or the runtime is a reason.
std::string cuda_unusable_reason();

}  // namespace vareid
