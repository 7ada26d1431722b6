#include "cpu/pages.h"

#include <algorithm>
#include <fstream>
#include <string>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace vareid {

#if defined(__linux__) && defined(MADV_HUGEPAGE)
namespace {

// Whether a balloon device of this virtual machine reports free pages (bit 5 of virtio's features) to the host.
bool hands_free_pages_back() {
  for (int device = 0; device < 64; ++device) {
    std::ifstream file("/sys/bus/virtio/drivers/virtio_balloon/virtio" + std::to_string(device) + "/features");
    std::string bits;
    if (file >> bits && bits.size() > 5 && bits[5] == '1') return true;
  }
  return false;
}

}  // namespace

void prefer_large_pages(void* data, int64_t bytes) {
  constexpr uintptr_t kLargePage = uintptr_t{1} << 21;
  static const bool costly = hands_free_pages_back();
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kLargePage - 1) & ~(kLargePage - 1);
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + static_cast<uintptr_t>(bytes)) & ~(kLargePage - 1);
  if (!costly && bytes >= kFreshFrom && begin < end)
    (void)madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
}
#else
void prefer_large_pages(void*, int64_t) {}
#endif

#if defined(__linux__) && defined(MADV_POPULATE_WRITE)
void FreshPages::back_next(uintptr_t until) {
  constexpr uintptr_t kPage = 4096, kPiece = uintptr_t{256} << 10;
  const uintptr_t begin = next_ & ~(kPage - 1), end = end_ & ~(kPage - 1);
  const uintptr_t stop = std::min(end, (std::max(until, next_ + kPiece) + kPage - 1) & ~(kPage - 1));
  // A kernel that does not know the call says so, and pages are backed as they are touched.
  const bool done = begin >= stop || madvise(reinterpret_cast<void*>(begin), stop - begin, MADV_POPULATE_WRITE) != 0;
  next_ = done ? end_ : stop;
}
#else
void FreshPages::back_next(uintptr_t) { next_ = end_; }
#endif

}  // namespace vareid
