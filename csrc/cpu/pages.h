// Advice to the operating system on memory that a kernel is about to fill.
#pragma once

#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace vareid {

// Asks for large pages under [data, data + bytes): the first touch of fresh memory then costs one fault for each 2 MiB
// instead of one for each 4 KiB, which is half the time of a large gradient. Only advice: contents and results do not
// depend on it. Below 32 MiB an allocator may hand out memory that was touched before, and nothing is asked.
inline void prefer_large_pages(void* data, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kLargePage = uintptr_t{1} << 21;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kLargePage - 1) & ~(kLargePage - 1);
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + static_cast<uintptr_t>(bytes)) & ~(kLargePage - 1);
  if (bytes >= int64_t{32} << 20 && begin < end)
    (void)madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)data;
  (void)bytes;
#endif
}

}  // namespace vareid
