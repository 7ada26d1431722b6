// Threads for the CPU kernels, OpenMP underneath.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>

#ifdef _OPENMP
#include <omp.h>
#endif

namespace vareid {

// True in a process made by fork(): OpenMP's pool did not survive the fork, and waiting for it would hang.
bool process_was_forked();

// The number of threads to use for `items` independent items when the caller allows `threads`.
inline int usable_threads(int64_t items, int threads) {
#ifdef _OPENMP
  if (threads <= 1 || items <= 1 || omp_in_parallel() || process_was_forked()) return 1;
  return static_cast<int>(std::min<int64_t>(items, threads));
#else
  (void)items;
  (void)threads;
  return 1;
#endif
}

// The number of threads that pay for work on so many elements, about a nanosecond each: on a busy machine the threads'
// meeting at the end waits four to eight milliseconds for one that other programs keep from running.
inline int paying_threads(int64_t elements, int threads) {
  constexpr int64_t kThreadElements = 1 << 22;
  return static_cast<int>(std::clamp<int64_t>(elements / kThreadElements, 1, std::max(threads, 1)));
}

// Calls body(begin, end, thread) on blocks of [0, items), which the threads take in turn: one that wakes late takes
// fewer. For bodies whose results do not depend on the split; `thread`, below `threads`, says whose workspace is free.
template <typename Body>
void parallel_for(int64_t items, int threads, const Body& body) {
  if (items <= 0) return;
  const int used = usable_threads(items, threads);
  if (used == 1) {
    body(int64_t{0}, items, 0);
    return;
  }
#ifdef _OPENMP
  constexpr int64_t kBlocksPerThread = 16;
  const int64_t block = (items + kBlocksPerThread * used - 1) / (kBlocksPerThread * used);
  std::atomic<int64_t> next{0};
#pragma omp parallel num_threads(used)
  {
    const int thread = omp_get_thread_num();
    for (int64_t begin = next.fetch_add(block); begin < items; begin = next.fetch_add(block))
      body(begin, std::min(items, begin + block), thread);
  }
#endif
}

}  // namespace vareid
