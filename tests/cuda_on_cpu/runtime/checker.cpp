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
  uint32_t block, epoch, pc;
  uint16_t thread : 10, mask : 4, atomic : 1, valid : 1;
  uint16_t clock;
};

// Writers: one for each byte (a 2-byte write uses its first byte's, a 4-byte write the first). Readers: the last one,
// the last other lane of its warp, the last of another warp.
struct Cell {
  Record writer[4], reader[3];
};

namespace {

using Clock = std::array<uint16_t, kWarp>;
struct Warp {
  Clock seen[kWarp];  // seen[a][b]: what lane a knows of lane b's clock; seen[a][a] is its own
  bool touched;
};
Warp warps[kMaxThreads / kWarp];
std::vector<Release> block_observed, block_acquired;
std::unordered_map<uintptr_t, std::vector<Release>> released;  // by the atomic's address
uintptr_t module_base = 0, module_end = 0;

void reset_clocks(bool always) {
  for (unsigned w = 0; w * kWarp < machine.threads; ++w) {
    if (!always && !warps[w].touched) continue;
    for (unsigned lane = 0; lane < kWarp; ++lane) {
      warps[w].seen[lane].fill(0);
      warps[w].seen[lane][lane] = 1;
    }
    warps[w].touched = false;
  }
}

bool covered(const std::vector<Release>& releases, const Record& record) {
  for (const Release& release : releases)
    if (release.block == record.block &&
        (record.epoch < release.epoch ||
         (record.epoch == release.epoch && record.thread == release.thread && record.clock <= release.clock)))
      return true;
  return false;
}

bool ordered(const Record& record, bool shared) {
  if (!record.valid || record.block < machine.launch_first_block) return true;
  const Thread& self = machine.thread[machine.current];
  if (record.block == machine.block) {
    if (record.thread == machine.current || record.epoch < machine.epoch) return true;
    const unsigned lane = machine.current % kWarp, other = record.thread % kWarp;
    if (record.thread / kWarp == machine.current / kWarp &&
        warps[machine.current / kWarp].seen[lane][other] >= record.clock)
      return true;
  } else if (shared) {
    return true;  // another block's shared memory
  }
  return covered(self.acquired, record) || covered(block_acquired, record);
}

[[noreturn]] void race(const Record& before, bool was_write, uintptr_t address, bool write, bool atomic, uintptr_t pc,
                       bool shared) {
  const bool same_block = before.block == machine.block;
  const char* missing = !same_block ? "nothing orders the blocks"
                        : before.thread / kWarp == machine.current / kWarp
                            ? "no __syncwarp or __syncthreads between them (shuffles order nothing)"
                            : "no __syncthreads between them";
  fail("data race on %s: %s%s by thread %s of block %s at %s, then %s%s by thread %s of block %s at %s: %s",
       describe(address).c_str(), before.atomic ? "atomic " : "", was_write ? "write" : "read",
       thread_name(before.thread).c_str(), block_name(before.block).c_str(), place(uintptr_t{before.pc}).c_str(),
       atomic ? "atomic " : "", write ? "write" : "read", thread_name(machine.current).c_str(),
       block_name(machine.block).c_str(), place(pc).c_str(), missing);
  (void)shared;
}

void update_cell(Cell& cell, unsigned mask, uintptr_t address, bool write, bool atomic, uintptr_t pc, bool shared) {
  const unsigned lane = machine.current % kWarp;
  Record now{};
  now.block = machine.block;
  now.epoch = machine.epoch;
  now.pc = static_cast<uint32_t>(pc);
  now.thread = static_cast<uint16_t>(machine.current);
  now.mask = static_cast<uint16_t>(mask);
  now.atomic = atomic;
  now.valid = 1;
  now.clock = warps[machine.current / kWarp].seen[lane][lane];
  for (const Record& writer : cell.writer)
    if (writer.valid && (writer.mask & mask) && !(writer.atomic && atomic) && !ordered(writer, shared))
      race(writer, true, address, write, atomic, pc, shared);
  if (write) {
    for (const Record& reader : cell.reader)
      if (reader.valid && (reader.mask & mask) && !(reader.atomic && atomic) && !ordered(reader, shared))
        race(reader, false, address, write, atomic, pc, shared);
    const unsigned slot = mask == 15 ? 0 : static_cast<unsigned>(__builtin_ctz(mask));
    for (unsigned i = 0; i < 4; ++i)
      if ((cell.writer[i].mask & ~mask) == 0) cell.writer[i].valid = 0;
    cell.writer[slot] = now;
    return;
  }
  Record& last = cell.reader[0];
  if (last.valid && !(last.block == now.block && last.thread == now.thread)) {
    if (last.block == now.block && last.thread / kWarp == machine.current / kWarp) {
      cell.reader[1] = last;
    } else {
      cell.reader[2] = last;
      cell.reader[1].valid = 0;
    }
  }
  last = now;
}

Region* find_region(uintptr_t address, bool& shared) {
  shared = false;
  if (global_region.contains(address)) return &global_region;
  shared = true;
  if (static_region.contains(address)) return &static_region;
  if (dynamic_region.contains(address)) return &dynamic_region;
  return nullptr;
}

// A thread's own stack, constants of the program and the launch's arguments need no check.
bool is_private(uintptr_t address) {
  const Thread& self = machine.thread[machine.current];
  if (address - reinterpret_cast<uintptr_t>(self.stack) < 128 * 1024) return true;
  if (address >= module_base && address < module_end) return true;
  return address >= machine.host_frame && address < machine.host_frame + 64 * 1024;
}

void check(uintptr_t address, size_t size, bool write, bool atomic, const void* return_address) {
  bool shared;
  Region* region = find_region(address, shared);
  const uintptr_t pc = reinterpret_cast<uintptr_t>(return_address) - module_base;
  const char* verb = atomic ? "atomic access" : write ? "write" : "read";
  if (!region) {
    if (is_private(address)) return;
    fail("out-of-bounds %s of %zu bytes at %s by thread %s of block %s at %s: no device memory lies there", verb, size,
         describe(address).c_str(), thread_name(machine.current).c_str(), block_name(machine.block).c_str(),
         place(pc).c_str());
  }
  uint8_t* state = region->state + (address - region->base);
  for (size_t i = 0; i < size; ++i) {
    if (state[i] & kForeign) return;
    if (!(state[i] & kAllocated))
      fail("out-of-bounds %s of %zu bytes at %s by thread %s of block %s at %s", verb, size, describe(address).c_str(),
           thread_name(machine.current).c_str(), block_name(machine.block).c_str(), place(pc).c_str());
  }
  if (size <= 16 && (size & (size - 1)) == 0 && address % size != 0)
    fail("misaligned %s of %zu bytes at %s by thread %s of block %s at %s", verb, size, describe(address).c_str(),
         thread_name(machine.current).c_str(), block_name(machine.block).c_str(), place(pc).c_str());
  for (size_t i = 0; i < size && (!write || atomic); ++i)
    if (!(state[i] & kInitialised)) {
      if (!machine.deferred.empty()) break;
      machine.deferred = std::string("uninitialised ") + verb + " of " + std::to_string(size) + " bytes at " +
                         describe(address) + " by thread " + thread_name(machine.current) + " of block " +
                         block_name(machine.block) + " at " + place(pc);
      if (!shared) fail("%s", "");
      break;
    }
  if (write) {
    if (region == &static_region) mark_dirty(address), mark_dirty(address + size - 1);
    for (size_t i = 0; i < size; ++i) state[i] |= kInitialised;
  }
  for (uintptr_t at = address; at < address + size;) {
    const uintptr_t cell_base = (at - region->base) & ~uintptr_t{3};
    const uintptr_t end = std::min(address + size, region->base + cell_base + 4);
    const unsigned first = static_cast<unsigned>(at - region->base - cell_base);
    const unsigned mask = ((1u << (end - at)) - 1) << first;
    update_cell(region->cells[cell_base / 4], mask, at, write, atomic, pc, shared);
    at = end;
  }
  if (machine.measure) {
    machine.thread[machine.current].log.push_back({pc, address, static_cast<uint32_t>(size), write, shared});
  }
}

// Code that the checker itself runs may be instrumented too (inline functions that it shares with a kernel).
void access(uintptr_t address, size_t size, bool write, bool atomic, const void* return_address) {
  if (!machine.running || machine.checking) return;
  machine.checking = true;
  check(address, size, write, atomic, return_address);
  machine.checking = false;
}

void join(std::vector<Release>& to, const std::vector<Release>& from) { to.insert(to.end(), from.begin(), from.end()); }

}  // namespace

void map_shadow(Region& region) {
  region.state = static_cast<uint8_t*>(reserve(region.size));
  region.cells = static_cast<Cell*>(reserve((region.size / 4 + 1) * sizeof(Cell)));
}

std::string place(uintptr_t pc) {
  char text[32];
  snprintf(text, sizeof text, "@0x%zx", static_cast<size_t>(pc));
  return text;
}

void checker_begin_launch() {
  module_base = reinterpret_cast<uintptr_t>(&__ehdr_start);
  module_end = reinterpret_cast<uintptr_t>(&_end);
  released.clear();
}

void checker_begin_block() {
  reset_clocks(true);
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
  reset_clocks(false);
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

std::string take_sanitizer_report() { return ""; }

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
  const auto where = reinterpret_cast<uintptr_t>(address);
  access(where, bytes, true, true, pc);
  Thread& self = machine.thread[machine.current];
  std::vector<Release>& here = released[where];
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
// -------------------------------------------------------------------------------------------
using cuda_on_cpu::access;
#define CALLED_FROM __builtin_return_address(0)
#define ACCESS_OF(size)                                                                                        \
  void __tsan_read##size(void* a) { access(reinterpret_cast<uintptr_t>(a), size, false, false, CALLED_FROM); } \
  void __tsan_write##size(void* a) { access(reinterpret_cast<uintptr_t>(a), size, true, false, CALLED_FROM); } \
  void __tsan_unaligned_read##size(void* a) {                                                                  \
    access(reinterpret_cast<uintptr_t>(a), size, false, false, CALLED_FROM);                                   \
  }                                                                                                            \
  void __tsan_unaligned_write##size(void* a) {                                                                 \
    access(reinterpret_cast<uintptr_t>(a), size, true, false, CALLED_FROM);                                    \
  }                                                                                                            \
  void __tsan_volatile_read##size(void* a) {                                                                   \
    access(reinterpret_cast<uintptr_t>(a), size, false, false, CALLED_FROM);                                   \
  }                                                                                                            \
  void __tsan_volatile_write##size(void* a) { access(reinterpret_cast<uintptr_t>(a), size, true, false, CALLED_FROM); }
extern "C" {
ACCESS_OF(1)
ACCESS_OF(2)
ACCESS_OF(4)
ACCESS_OF(8)
ACCESS_OF(16)
void __tsan_read_range(void* a, size_t n) { access(reinterpret_cast<uintptr_t>(a), n, false, false, CALLED_FROM); }
void __tsan_write_range(void* a, size_t n) { access(reinterpret_cast<uintptr_t>(a), n, true, false, CALLED_FROM); }
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
}
