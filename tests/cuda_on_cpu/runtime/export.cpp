// The list of exported launchers, and the call that turns a C++ exception into a text.
#include "export.h"

#include <vector>

#include "runtime.h"

namespace cuda_on_cpu {

static std::vector<Export>& exports() {
  static std::vector<Export> list;
  return list;
}
void add_export(Export entry) { exports().push_back(std::move(entry)); }

}  // namespace cuda_on_cpu

extern "C" {
int cuda_on_cpu_exports() { return static_cast<int>(cuda_on_cpu::exports().size()); }
const char* cuda_on_cpu_export(int i, const char** signature) {
  const cuda_on_cpu::Export& entry = cuda_on_cpu::exports()[static_cast<size_t>(i)];
  *signature = entry.signature.c_str();
  return entry.name;
}
// Returns "" or the text of the exception the launcher threw (a defect, or its own complaint).
const char* cuda_on_cpu_call(int i, const cuda_on_cpu::Value* values, int64_t* result) {
  static std::string text;
  text.clear();
  cuda_on_cpu::machine.defect.clear();
  try {
    cuda_on_cpu::exports()[static_cast<size_t>(i)].call(values, result);
    cuda_on_cpu::throw_defect();
  } catch (const cuda_on_cpu::Defect& defect) {
    text = std::string("CUDA-on-CPU defect: ") + defect.what();
  } catch (const std::exception& error) {
    text = error.what();
  }
  return text.c_str();
}
}
