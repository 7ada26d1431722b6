#include "cpu/parallel.h"

#include <atomic>

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif

namespace vareid {
namespace {

std::atomic<bool> g_forked{false};

#if defined(__unix__) || defined(__APPLE__)
void mark_forked() { g_forked.store(true, std::memory_order_relaxed); }
const int g_registered = pthread_atfork(nullptr, nullptr, mark_forked);
#endif

}  // namespace

bool process_was_forked() {
#if defined(__unix__) || defined(__APPLE__)
  (void)g_registered;
#endif
  return g_forked.load(std::memory_order_relaxed);
}

}  // namespace vareid
