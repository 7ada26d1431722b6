// Device memory, shared memory and the host side of the runtime API. Device memory is one arena with gaps between
// allocations; the checker keeps a state byte for each byte of it.
#include <sys/mman.h>

#include <algorithm>
#include <cstring>
#include <map>

#include "cuda_on_cpu/api.h"
#include "runtime.h"

#ifdef CUDA_ON_CPU_ASAN
#include <sanitizer/asan_interface.h>
#else
#define __asan_poison_memory_region(address, bytes) static_cast<void>(address)
#define __asan_unpoison_memory_region(address, bytes) static_cast<void>(address)
#endif

namespace cuda_on_cpu {

Region global_region, static_region, dynamic_region;

namespace {

constexpr size_t kArena = size_t{1} << 30, kGap = 512, kSlot = 32768;

struct Stretch {
  size_t bytes;
  std::string label;
};
std::map<uintptr_t, Stretch> allocations, shared_variables;
size_t arena_used = kGap;
std::vector<uint8_t> dirty;  // one for each slot of the static shared region

void map_region(Region& region, size_t bytes) {
  region.size = bytes;
  region.base = reinterpret_cast<uintptr_t>(reserve(bytes));
  __asan_poison_memory_region(reinterpret_cast<void*>(region.base), bytes);
  map_shadow(region);
}

// "argument 2 of f + 4 bytes (of 256)"; an address close in front of a stretch belongs to it.
std::string describe_in(const std::map<uintptr_t, Stretch>& stretches, uintptr_t address) {
  const auto next = stretches.upper_bound(address);
  if (next != stretches.end() && (next == stretches.begin() || next->first - address <= kGap / 2))
    return next->second.label + " - " + std::to_string(next->first - address) + " bytes";
  const auto& [base, stretch] = *std::prev(next);
  return stretch.label + " + " + std::to_string(address - base) + " bytes (of " + std::to_string(stretch.bytes) + ")";
}

}  // namespace

void* reserve(size_t bytes) {
  void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw Defect("the harness cannot reserve address space");
  return memory;
}

void set_state(Region& region, uintptr_t address, size_t bytes, uint8_t state) {
  if (region.state) std::memset(region.state + (address - region.base), state, bytes);
}

std::string describe(uintptr_t address) {
  if (dynamic_region.contains(address))
    return "dynamic shared memory + " + std::to_string(address - dynamic_region.base) + " bytes (of " +
           std::to_string(machine.dynamic_bytes) + ")";
  if (static_region.contains(address)) return describe_in(shared_variables, address);
  if (global_region.contains(address) && !allocations.empty()) return describe_in(allocations, address);
  char text[64];
  snprintf(text, sizeof text, "address 0x%zx", static_cast<size_t>(address));
  return text;
}

void mark_dirty(uintptr_t address) { dirty[(address - static_region.base) / kSlot] = 1; }

void* dynamic_shared() { return reinterpret_cast<void*>(dynamic_region.base); }

void set_up_memory() {
  if (!global_region.base) {
    map_region(global_region, kArena);
    map_region(dynamic_region, 2 * kMaxDynamic);
  }
  for (const auto& [address, variable] : shared_variables)
    std::memset(reinterpret_cast<void*>(address), 0xff, variable.bytes);
}

// Shared memory starts every block as garbage: NaN for the eyes, and not initialised for the checker.
void begin_block_memory() {
  auto* base = reinterpret_cast<char*>(dynamic_region.base);
  __asan_poison_memory_region(base, dynamic_region.size);
  __asan_unpoison_memory_region(base, machine.dynamic_bytes);
  std::memset(base, 0xff, machine.dynamic_bytes);
  static size_t marked = 0;
  set_state(dynamic_region, dynamic_region.base, marked, 0);
  set_state(dynamic_region, dynamic_region.base, marked = machine.dynamic_bytes, kAllocated);
  for (size_t slot = 0; slot < dirty.size(); ++slot) {
    if (!dirty[slot]) continue;
    dirty[slot] = 0;
    for (size_t i = slot * kSlot; i < std::min((slot + 1) * kSlot, static_region.size); ++i)
      static_region.state[i] &= kAllocated | kForeign;
  }
}

void forget_seen() {
  for (const auto& [base, allocation] : allocations)
    for (size_t i = 0; i < allocation.bytes; ++i)
      global_region.state[base - global_region.base + i] &= static_cast<uint8_t>(~(kRead | kWritten));
}

}  // namespace cuda_on_cpu

using namespace cuda_on_cpu;

const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess              ? "no error"
         : error == cudaErrorInvalidDevice ? "invalid device ordinal"
                                           : "invalid argument";
}
cudaError_t cudaGetDevice(int* device) { return *device = machine.device, cudaSuccess; }
cudaError_t cudaSetDevice(int device) {
  if (device < 0 || device > 1) return cudaErrorInvalidDevice;
  machine.device = device;
  return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void* pointer, int value, size_t bytes, cudaStream_t stream) {
  const auto address = reinterpret_cast<uintptr_t>(pointer);
  if (stream != machine.expected_stream) fail("cudaMemsetAsync on another stream than the launcher was given");
  const auto next = allocations.upper_bound(address);
  if (next == allocations.begin() || address + bytes > std::prev(next)->first + std::prev(next)->second.bytes)
    fail("cudaMemsetAsync of %zu bytes runs past %s", bytes, describe(address).c_str());
  if (bytes) std::memset(pointer, value, bytes);
  set_state(global_region, address, bytes, kAllocated | kInitialised);
  return cudaSuccess;
}

extern "C" {
void* cuda_on_cpu_allocate(size_t bytes, const char* label) {
  set_up_memory();
  const size_t taken = (bytes + 2 * kGap + 255) / 256 * 256;
  if (arena_used + taken > kArena) return nullptr;
  const uintptr_t address = global_region.base + arena_used;
  void* const pointer = reinterpret_cast<void*>(address);
  arena_used += taken;
  allocations[address] = {bytes, label};
  __asan_unpoison_memory_region(pointer, bytes);
  std::memset(pointer, 0xff, bytes);
  set_state(global_region, address, bytes, kAllocated);
  return pointer;
}
void cuda_on_cpu_release(void* pointer) {
  const auto found = allocations.find(reinterpret_cast<uintptr_t>(pointer));
  set_state(global_region, found->first, found->second.bytes, 0);
  __asan_poison_memory_region(pointer, found->second.bytes);
  allocations.erase(found);
  if (allocations.empty()) arena_used = kGap;
}
void cuda_on_cpu_upload(void* to, const void* from, size_t bytes, int constant) {
  std::memcpy(to, from, bytes);
  set_state(global_region, reinterpret_cast<uintptr_t>(to), bytes,
            kAllocated | kInitialised | (constant ? kConstant : 0));
}
// Copies out; returns the first byte that no kernel has written, or -1.
int64_t cuda_on_cpu_download(void* to, const void* from, size_t bytes) {
  std::memcpy(to, from, bytes);
  if (!kChecker) return -1;
  const uint8_t* state = global_region.state + (reinterpret_cast<uintptr_t>(from) - global_region.base);
  const uint8_t* end = std::find_if(state, state + bytes, [](uint8_t s) { return !(s & kInitialised); });
  return end == state + bytes ? -1 : end - state;
}
// Says where the shared variables of the loaded object lie: all offsets are relative to its first byte.
void cuda_on_cpu_shared_region(size_t offset, size_t bytes) {
  static_region.base = reinterpret_cast<uintptr_t>(&__ehdr_start) + offset;
  static_region.size = bytes;
  map_shadow(static_region);
  dirty.assign((bytes + kSlot - 1) / kSlot, 0);
}
void cuda_on_cpu_shared_variable(size_t offset, size_t bytes, const char* name, int foreign) {
  const uintptr_t address = reinterpret_cast<uintptr_t>(&__ehdr_start) + offset;
  set_state(static_region, address, bytes, foreign ? kForeign : kAllocated);
  if (!foreign) shared_variables[address] = {bytes, name};
}
void cuda_on_cpu_expect(int device, void* stream) {
  machine.device = 0;
  machine.expected_device = device;
  machine.expected_stream = stream;
}
}
