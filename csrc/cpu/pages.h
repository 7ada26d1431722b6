// Fresh memory that a kernel is about to fill. All of this is advice: contents and results do not depend on it.
#pragma once

#include <cstdint>

namespace vareid {

// Results smaller than this may lie in memory that was touched before, and nothing is asked for them.
constexpr int64_t kFreshFrom = int64_t{32} << 20;

// Asks for large pages under [data, data + bytes): the first touch then costs one fault for each 2 MiB instead of one
// for each 4 KiB, which is half the time of a large gradient. Nothing is asked in a virtual machine that hands its free
// memory back to the host: there the large pages are the ones handed back, and touching one again costs milliseconds.
void prefer_large_pages(void* data, int64_t bytes);

// Has [data, data + bytes) backed with memory piece by piece, just ahead of a thread that fills it from front to back:
// one system call instead of 64 faults, and the zeros that the system writes are still in the cache.
class FreshPages {
 public:
  // `total` is the size of the whole result, of which this is the thread's part.
  FreshPages(void* data, int64_t bytes, int64_t total)
      : next_(reinterpret_cast<uintptr_t>(data)), end_(next_ + (total < kFreshFrom ? 0 : bytes)) {}

  // To be called before anything up to `until` is written.
  void reach(const void* until) {
    const auto wanted = reinterpret_cast<uintptr_t>(until);
    if (end_ > next_ && wanted > next_) back_next(wanted);
  }

 private:
  void back_next(uintptr_t until);

  uintptr_t next_, end_;
};

}  // namespace vareid
