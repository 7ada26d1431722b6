// The checker: g++ -fsanitize=thread puts a call in front of every memory access of a kernel; these are the called
// functions (the sanitizer's own library is not linked). Finds accesses outside allocations, misaligned ones, reads of
// memory nobody wrote, and data races.
//
// A race is two accesses to a byte by different threads, one of them a write, not both atomic, that nothing orders.
// Orders: a later launch; a block barrier (same block); a __syncwarp of both lanes (vector clocks for each warp); a
// fence and an atomic on one side, the same atomic and a fence on the other.
#include <algorithm>
#include <array>
#include <unordered_map>

#include "runtime.h"

namespace cuda_on_cpu {

struct Record {
  uint32_t block, pc;
  uint64_t thread : 10, atomic : 1, valid : 1, epoch : 26, clock : 26;
};

// Of each kind of access the last one, the last by another lane of its warp, by another warp, by another block. What
// was ordered once stays so: old records do no harm.
struct Cell {
  Record writes[4], reads[4];
};

namespace {

using Clock = std::array<uint32_t, kWarp>;
struct Warp {
  Clock seen[kWarp];  // seen[a][b]: what lane a knows of lane b's clock; seen[a][a] is its own
  bool touched = true;
};
Warp warps[kMaxThreads / kWarp];
std::vector<Release> block_observed, block_acquired;
std::unordered_map<uintptr_t, std::vector<Release>> released;  // by the atomic's address
uintptr_t module_base = 0, module_end = 0;

void reset_clocks() {
  for (Warp& warp : warps) {
    if (!warp.touched) continue;
    for (unsigned lane = 0; lane < kWarp; ++lane) {
      warp.seen[lane].fill(0);
      warp.seen[lane][lane] = 1;
    }
    warp.touched = false;
  }
}

bool covered(const std::vector<Release>& releases, const Record& record) {
  for (const Release& release : releases)  // the releasing atomic itself is one tick behind its fence
    if (release.block == record.block &&
        (record.epoch < release.epoch || (record.epoch == release.epoch && record.thread == release.thread &&
                                          record.clock <= release.clock + record.atomic)))
      return true;
  return false;
}

bool ordered(const Record& record, bool shared) {
  if (record.block < machine.launch_first_block) return true;
  const Thread& self = machine.thread[machine.current];
  if (record.block == machine.block) {
    if (record.thread == machine.current || record.epoch < machine.epoch) return true;
    if (record.thread / kWarp == machine.current / kWarp &&
        warps[machine.current / kWarp].seen[machine.current % kWarp][record.thread % kWarp] >= record.clock)
      return true;
  } else if (shared) {
    return true;  // another block's shared memory
  }
  return covered(self.acquired, record) || covered(block_acquired, record);
}

struct Access {
  uintptr_t address;
  size_t size;
  bool write, atomic, shared;
  uintptr_t pc;
  const char* verb() const { return atomic ? "atomic access" : write ? "write" : "read"; }
};

// " by thread (1,0,0) of block (0,0,0) at file:line" of the running thread.
std::string by_whom(uintptr_t pc, uint32_t thread = machine.current, uint32_t block = machine.block) {
  return " by thread " + thread_name(thread) + " of block " + block_name(block) + " at " + place(pc);
}

[[noreturn]] void bad_access(const char* what, const Access& access, const char* why = "") {
  fail("%s %s of %zu bytes at %s%s%s", what, access.verb(), access.size, describe(access.address).c_str(),
       by_whom(access.pc).c_str(), why);
}

void compare(const Record (&records)[4], bool writes, const Access& access, uintptr_t at) {
  for (const Record& before : records) {
    if (!before.valid || (before.atomic && access.atomic) || ordered(before, access.shared)) continue;
    const char* missing = before.block != machine.block ? "nothing orders the blocks"
                          : before.thread / kWarp == machine.current / kWarp
                              ? "no __syncwarp or __syncthreads between them (shuffles order nothing)"
                              : "no __syncthreads between them";
    fail("data race on %s: %s%s%s, then %s%s%s: %s", describe(at).c_str(), before.atomic ? "atomic " : "",
         writes ? "write" : "read", by_whom(before.pc, before.thread, before.block).c_str(),
         access.atomic ? "atomic " : "", access.write ? "write" : "read", by_whom(access.pc).c_str(), missing);
  }
}

void compare(const Cell& cell, const Access& access, uintptr_t at) {
  compare(cell.writes, true, access, at);
  if (access.write) compare(cell.reads, false, access, at);
}

void remember(Record (&records)[4], const Record& now) {
  const Record& last = records[0];
  const bool same_thread = last.block == now.block && last.thread == now.thread;
  if (last.valid && !(same_thread && last.atomic >= now.atomic)) {
    const bool same_warp = last.block == now.block && last.thread / kWarp == now.thread / kWarp;
    records[same_warp ? 1 : last.block == now.block ? 2 : 3] = last;
  }
  records[0] = now;
}

void check_race(Region& region, const Access& access) {
  Record now{};
  now.block = machine.block;
  now.pc = static_cast<uint32_t>(access.pc);
  now.thread = machine.current;
  now.atomic = access.atomic;
  now.valid = 1;
  now.epoch = machine.epoch;
  now.clock = warps[machine.current / kWarp].seen[machine.current % kWarp][machine.current % kWarp];
  const size_t end = access.address + access.size - region.base;
  for (size_t word = (access.address - region.base) / 4; 4 * word < end; ++word) {
    const size_t from = std::max(4 * word, access.address - region.base), to = std::min(4 * word + 4, end);
    compare(region.words[word], access, region.base + from);
    for (size_t byte = from; byte < to; ++byte)
      if (region.state[byte] & kSplit) compare(region.bytes[byte], access, region.base + byte);
    if (to - from == 4) {
      remember(access.write ? region.words[word].writes : region.words[word].reads, now);
      continue;
    }
    for (size_t byte = from; byte < to; ++byte) {
      remember(access.write ? region.bytes[byte].writes : region.bytes[byte].reads, now);
      region.state[byte] |= kSplit;
    }
  }
}

// A thread's own stack and the launch's arguments need no check, constants of the program may be read.
void check_elsewhere(const Access& access) {
  const uintptr_t stack = reinterpret_cast<uintptr_t>(machine.thread[machine.current].stack);
  if (access.address - stack < kStack || access.address - machine.arguments < machine.argument_bytes) return;
  if (access.address < module_base || access.address >= module_end)
    bad_access("out-of-bounds", access, ": no device memory lies there");
  if (access.write) bad_access("unchecked", access, ": __device__ variables are not supported: pass a pointer");
}

void check(const Access& access, Region* region) {
  if (!region) return check_elsewhere(access);
  uint8_t* const state = region->state + (access.address - region->base);
  uint8_t all = 0xff, any = 0;
  for (size_t i = 0; i < access.size; ++i) all &= state[i], any |= state[i];
  if (any & kForeign) return check_elsewhere(access);
  if (!(all & kAllocated)) bad_access("out-of-bounds", access);
  if (access.write && (any & kConstant)) bad_access("constant input:", access);
  if (access.size <= 16 && (access.size & (access.size - 1)) == 0 && access.address % access.size != 0)
    bad_access("misaligned", access);
  if ((!access.write || access.atomic) && !(all & kInitialised) && machine.deferred.empty()) {
    machine.deferred = std::string("uninitialised ") + access.verb() + " of " + std::to_string(access.size) +
                       " bytes at " + describe(access.address) + by_whom(access.pc);
    if (!access.shared) fail("%s", "");
  }
  if (access.write) {
    if (region == &static_region) mark_dirty(access.address), mark_dirty(access.address + access.size - 1);
    for (size_t i = 0; i < access.size; ++i) state[i] |= kInitialised;
  }
  check_race(*region, access);
  if (machine.measure)
    machine.thread[machine.current].log.push_back(
        {access.pc, access.address, static_cast<uint32_t>(access.size), access.write, access.shared});
}

// Code that the checker itself runs may be instrumented too (inline functions that it shares with a kernel).
void access(const void* pointer, size_t size, bool write, bool atomic, const void* return_address) {
  const auto address = reinterpret_cast<uintptr_t>(pointer);
  if (!machine.running && global_region.contains(address) && machine.defect.empty())
    machine.defect = "the host " + std::string(write ? "writes " : "reads ") + describe(address) + " at " +
                     place(reinterpret_cast<uintptr_t>(return_address) - reinterpret_cast<uintptr_t>(&__ehdr_start)) +
                     ": that is device memory";
  if (!machine.running || machine.checking) return;
  machine.checking = true;
  Region* const region = global_region.contains(address)    ? &global_region
                         : static_region.contains(address)  ? &static_region
                         : dynamic_region.contains(address) ? &dynamic_region
                                                            : nullptr;
  check({address, size, write, atomic, region != &global_region,
         reinterpret_cast<uintptr_t>(return_address) - module_base},
        region);
  machine.checking = false;
}

void join(std::vector<Release>& to, const std::vector<Release>& from) { to.insert(to.end(), from.begin(), from.end()); }

}  // namespace

void map_shadow(Region& region) {
  region.state = static_cast<uint8_t*>(reserve(region.size));
  region.words = static_cast<Cell*>(reserve((region.size / 4 + 1) * sizeof(Cell)));
  region.bytes = static_cast<Cell*>(reserve(region.size * sizeof(Cell)));
}

void checker_begin_launch() {
  module_base = reinterpret_cast<uintptr_t>(&__ehdr_start);
  module_end = reinterpret_cast<uintptr_t>(&_end);
  released.clear();
}

void checker_begin_block() {
  reset_clocks();
  block_observed.clear();
  block_acquired.clear();
  for (unsigned t = 0; t < machine.threads; ++t) {
    Thread& thread = machine.thread[t];
    thread.fenced = false;
    thread.observed.clear();
    thread.acquired.clear();
    thread.log.clear();
  }
}

void checker_block_barrier() {
  reset_clocks();
  for (unsigned t = 0; t < machine.threads; ++t) {
    Thread& thread = machine.thread[t];
    join(block_observed, thread.observed);
    join(block_acquired, thread.acquired);
    thread.observed.clear();
    thread.acquired.clear();
  }
}

void checker_warp_sync(unsigned w, unsigned lanes) {
  Warp& warp = warps[w];
  warp.touched = true;
  Clock latest{};
  std::vector<Release> observed, acquired;
  for (unsigned lane = 0; lane < kWarp; ++lane) {
    if (!(lanes >> lane & 1)) continue;
    for (unsigned i = 0; i < kWarp; ++i) latest[i] = std::max(latest[i], warp.seen[lane][i]);
    join(observed, machine.thread[w * kWarp + lane].observed);
    join(acquired, machine.thread[w * kWarp + lane].acquired);
  }
  for (unsigned lane = 0; lane < kWarp; ++lane) {
    if (!(lanes >> lane & 1)) continue;
    warp.seen[lane] = latest;
    ++warp.seen[lane][lane];
    machine.thread[w * kWarp + lane].observed = observed;
    machine.thread[w * kWarp + lane].acquired = acquired;
  }
}

void fence() {
  Thread& self = machine.thread[machine.current];
  Warp& warp = warps[machine.current / kWarp];
  const unsigned lane = machine.current % kWarp;
  self.fenced = true;
  self.fence_epoch = machine.epoch;
  self.fence_clock = warp.seen[lane][lane]++;
  warp.touched = true;
  join(self.acquired, self.observed);
  join(self.acquired, block_observed);
  self.observed.clear();
}

void atomic_access(const void* address, size_t bytes, void* pc) {
  if (!machine.running) return;
  access(address, bytes, true, true, pc);
  Thread& self = machine.thread[machine.current];
  std::vector<Release>& here = released[reinterpret_cast<uintptr_t>(address)];
  const size_t before = here.size();
  if (self.fenced) {
    here.push_back({machine.block, self.fence_epoch, machine.current, self.fence_clock});
    std::vector<Release> passed_on = self.acquired;
    join(passed_on, block_acquired);
    join(here, passed_on);
  }
  self.observed.insert(self.observed.end(), here.begin(), here.begin() + static_cast<ptrdiff_t>(before));
}

}  // namespace cuda_on_cpu

// ---- what the compiler calls

using cuda_on_cpu::access;
#define CALLED_FROM __builtin_return_address(0)
#define ACCESSES(kind, size)                                                              \
  void __tsan_##kind##read##size(void* a) { access(a, size, false, false, CALLED_FROM); } \
  void __tsan_##kind##write##size(void* a) { access(a, size, true, false, CALLED_FROM); }
#define ACCESSES_OF(size) ACCESSES(, size) ACCESSES(unaligned_, size) ACCESSES(volatile_, size)
extern "C" {
ACCESSES_OF(1)
ACCESSES_OF(2)
ACCESSES_OF(4)
ACCESSES_OF(8)
ACCESSES_OF(16)
void __tsan_read_range(void* a, size_t n) { access(a, n, false, false, CALLED_FROM); }
void __tsan_write_range(void* a, size_t n) { access(a, n, true, false, CALLED_FROM); }
void __tsan_init() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
}
