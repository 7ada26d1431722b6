// The machine's own state, shared by scheduler.cpp, memory.cpp, checker.cpp and traffic.cpp.
//
// One OS thread runs everything. A launch runs the grid block after block; a block's threads are fibers that run until
// they wait (barrier, warp operation) or end. The first defect stops the launch: its text is thrown to the launcher's
// caller. A text may hold "@0x<offset>" tokens, code addresses relative to the shared object, which Python turns into
// file and line.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "cuda_on_cpu/machine.h"

// The first and the last byte of this shared object (the linker defines them).
extern "C" {
extern const char __ehdr_start __attribute__((visibility("hidden")));
extern const char _end __attribute__((visibility("hidden")));
}

namespace cuda_on_cpu {

#ifdef CUDA_ON_CPU_CHECKER
constexpr bool kChecker = true;
#else
constexpr bool kChecker = false;
#endif
constexpr unsigned kWarp = 32, kMaxThreads = 1024, kMaxDepth = 12;
constexpr size_t kMaxDynamic = 48 * 1024;  // what a kernel gets without cudaFuncSetAttribute
#ifdef CUDA_ON_CPU_ASAN
constexpr size_t kStack = 512 * 1024;
#else
constexpr size_t kStack = 128 * 1024;
#endif

struct Defect : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// What a thread that fenced and then did an atomic has made visible: everything its block did before `epoch`, and its
// own accesses of that epoch up to `clock`.
struct Release {
  uint32_t block, epoch, thread, clock;
};

struct LogEntry {
  uintptr_t pc, address;
  uint32_t size : 30, write : 1, shared : 1;
};

enum class State : uint8_t { kReady, kAtBarrier, kAtWarp, kDone };

struct Thread {
  void* stack_pointer = nullptr;
  char* stack = nullptr;
  uint3 index{};
  State state = State::kDone;
  Site site{};                                // where it waits
  uintptr_t calls[kMaxDepth] = {}, path = 0;  // the calls that led there, and their hash
  unsigned depth = 0;
  WarpOp op{};
  unsigned mask = 0, source = 0;
  uint64_t value = 0;
  // checker
  bool fenced = false;
  uint32_t fence_epoch = 0, fence_clock = 0;
  std::vector<Release> observed, acquired;  // seen at an atomic; in force since the fence after it
  std::vector<LogEntry> log;
};

struct Machine {
  bool running = false, checking = false;
  const void* kernel = nullptr;
  uint32_t block = 0, launch_first_block = 1, next_block = 1;  // blocks are numbered across launches
  unsigned threads = 0, current = 0;
  uint32_t epoch = 0;  // block barriers passed in this block
  Thread thread[kMaxThreads];
  uintptr_t arguments = 0;  // of the launch
  size_t argument_bytes = 0;
  size_t dynamic_bytes = 0;
  std::string defect;
  std::string deferred;  // an uninitialised read of shared memory: a race that explains it may still show
  // set from Python
  int order = 0;  // 0 forward, 1 reverse, 2 random
  uint64_t seed = 0;
  bool measure = false;
  int device = 0, expected_device = 0;
  void* expected_stream = nullptr;
  Site disabled{};  // this barrier does nothing (mutation tests)
};
extern Machine machine;

// Throws what was noted in machine.defect, if anything.
inline void throw_defect() {
  if (!machine.defect.empty()) throw Defect(std::exchange(machine.defect, {}));
}
// Ends the running kernel, or the host call, with a defect.
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));
std::string thread_name(uint32_t thread);
std::string block_name(uint32_t block);
std::string place(Site site);
std::string place(uintptr_t pc);

// memory.cpp
void begin_block_memory();
void set_up_memory();

// A stretch of memory that kernels may touch, with one state byte for each of its bytes. Checker: a cell for each four
// bytes knows who accessed them whole, one for each byte who accessed it otherwise (kSplit).
enum : uint8_t {
  kAllocated = 1,
  kInitialised = 2,
  kForeign = 4,
  kRead = 8,
  kWritten = 16,
  kConstant = 32,
  kSplit = 64
};
struct Cell;
struct Region {
  uintptr_t base = 0;
  size_t size = 0;
  uint8_t* state = nullptr;
  Cell *words = nullptr, *bytes = nullptr;
  bool contains(uintptr_t address) const { return address - base < size; }
};
extern Region global_region, static_region, dynamic_region;
void* reserve(size_t bytes);
void set_state(Region& region, uintptr_t address, size_t bytes, uint8_t state);
void forget_seen();
// "variable 'tile' + 12 bytes" or "argument 2 of f + 4 bytes".
std::string describe(uintptr_t address);
void mark_dirty(uintptr_t static_shared_address);

#ifdef CUDA_ON_CPU_CHECKER  // checker.cpp and traffic.cpp
void map_shadow(Region& region);
void checker_begin_launch();
void checker_begin_block();
void checker_block_barrier();
void checker_warp_sync(unsigned warp, unsigned lanes);
void traffic_begin_launch();
void traffic_flush(unsigned first_thread, unsigned threads);
#else
inline void map_shadow(Region&) {}
inline void checker_begin_launch() {}
inline void checker_begin_block() {}
inline void checker_block_barrier() {}
inline void checker_warp_sync(unsigned, unsigned) {}
inline void traffic_begin_launch() {}
inline void traffic_flush(unsigned, unsigned) {}
#endif
#ifdef CUDA_ON_CPU_ASAN  // asan_report.cpp
std::string take_sanitizer_report();
#else
inline std::string take_sanitizer_report() { return ""; }
#endif

}  // namespace cuda_on_cpu
