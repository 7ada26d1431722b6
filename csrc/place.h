// Where a function runs. For each function F there is one list of arguments, with a Place last, and two that take it:
// F_cpu and F_cuda. What one of them has no use for (a GPU for most workspaces) it leaves alone.
#pragma once

namespace vareid {

struct Place {
  int threads = 1;         // of the CPU
  int device = 0;          // the GPU
  void* stream = nullptr;  // of the GPU
};

}  // namespace vareid
