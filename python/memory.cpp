#include "array.h"
#include "bindings.h"

#ifdef __linux__
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace vareid {
namespace {

// Asks for large pages where an array lies; what the system then does changes nothing but time.
void use_large_pages(const Array& array) {
#ifdef MADV_HUGEPAGE
  check_contiguous(array, "array");
  if (array.device_type != kDeviceCpu) refuse("array", "must be on a CPU");
  const auto page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  const auto address = reinterpret_cast<uintptr_t>(array.data);
  const uintptr_t bytes = static_cast<uintptr_t>(array.numel()) * (array.type_bits / 8);
  const uintptr_t begin = (address + page - 1) / page * page, end = (address + bytes) / page * page;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)array;
#endif
}

}  // namespace

void bind_memory(pybind11::module_& m) { m.def("use_large_pages", &use_large_pages); }

}  // namespace vareid
