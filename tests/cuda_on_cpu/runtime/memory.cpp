// Device memory, shared memory and the host side of the runtime API. Device memory is one arena with gaps between
// allocations; the checker keeps a state byte for each byte of it.
#include <sys/mman.h>

#include <algorithm>
#include <cstring>
#include <map>
#include <new>

#include "cuda_on_cpu/api.h"
#include "runtime.h"

#ifdef CUDA_ON_CPU_ASAN
#include <sanitizer/asan_interface.h>
#endif

namespace cuda_on_cpu {

Region global_region, static_region, dynamic_region;
void allow_dynamic(const void* kernel, size_t bytes);

namespace {

constexpr size_t kArena = size_t{1} << 30, kGap = 512, kDynamicArena = 128 * 1024, kSlot = 32768;

struct Allocation {
  size_t bytes;
  std::string label;
};
std::map<uintptr_t, Allocation> allocations;
size_t arena_used = kGap;

struct SharedVariable {
  uintptr_t address;
  size_t bytes;
  std::string name;
};
std::vector<SharedVariable> shared_variables;
std::vector<uint8_t> dirty;  // one for each slot of the static shared region

void poison([[maybe_unused]] void* address, [[maybe_unused]] size_t bytes) {
#ifdef CUDA_ON_CPU_ASAN
  __asan_poison_memory_region(address, bytes);
#endif
}
void unpoison([[maybe_unused]] void* address, [[maybe_unused]] size_t bytes) {
#ifdef CUDA_ON_CPU_ASAN
  __asan_unpoison_memory_region(address, bytes);
#endif
}

void set_up_arena() {
  if (global_region.base) return;
  global_region.size = kArena;
  global_region.base = reinterpret_cast<uintptr_t>(reserve(kArena));
  poison(reinterpret_cast<void*>(global_region.base), kArena);
  if (kChecker) map_shadow(global_region);
  dynamic_region.size = kDynamicArena;
  dynamic_region.base = reinterpret_cast<uintptr_t>(reserve(kDynamicArena));
  poison(reinterpret_cast<void*>(dynamic_region.base), kDynamicArena);
  if (kChecker) map_shadow(dynamic_region);
}

void check_host_range(uintptr_t address, size_t bytes, const char* call) {
  if (!global_region.contains(address)) return;
  const auto next = allocations.upper_bound(address);
  if (next != allocations.begin()) {
    const auto& [base, allocation] = *std::prev(next);
    if (address + bytes <= base + allocation.bytes) return;
  }
  fail("%s of %zu bytes runs past %s", call, bytes, describe(address).c_str());
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
  if (dynamic_region.contains(address)) {
    const size_t offset = address - dynamic_region.base;
    return "dynamic shared memory + " + std::to_string(offset) + " bytes (of " + std::to_string(machine.dynamic_bytes) +
           ")";
  }
  if (static_region.contains(address)) {
    const SharedVariable* best = nullptr;
    for (const SharedVariable& variable : shared_variables)
      if (variable.address <= address && (!best || variable.address > best->address)) best = &variable;
    if (best)
      return "shared variable '" + best->name + "' + " + std::to_string(address - best->address) + " bytes (of " +
             std::to_string(best->bytes) + ")";
  }
  auto next = allocations.upper_bound(address);
  if (global_region.contains(address) && !allocations.empty()) {
    // an address in front of an allocation belongs to that one, any other to the allocation behind which it lies
    if (next != allocations.end() && (next == allocations.begin() || next->first - address <= kGap / 2)) {
      return next->second.label + " - " + std::to_string(next->first - address) + " bytes";
    }
    const auto& [base, allocation] = *std::prev(next);
    return allocation.label + " + " + std::to_string(address - base) + " bytes (of " +
           std::to_string(allocation.bytes) + ")";
  }
  char text[64];
  snprintf(text, sizeof text, "address 0x%zx", static_cast<size_t>(address));
  return text;
}

void mark_dirty(uintptr_t address) { dirty[(address - static_region.base) / kSlot] = 1; }

void* dynamic_shared() { return reinterpret_cast<void*>(dynamic_region.base); }

// Shared memory starts every block as garbage: NaN for the eyes, and not initialised for the checker.
void begin_block_memory() {
  auto* base = reinterpret_cast<char*>(dynamic_region.base);
  poison(base, kDynamicArena);
  unpoison(base, machine.dynamic_bytes);
  std::memset(base, 0xff, machine.dynamic_bytes);
  if (!kChecker) return;
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

void fill_static_shared() {
  set_up_arena();
  for (const SharedVariable& variable : shared_variables)
    std::memset(reinterpret_cast<void*>(variable.address), 0xff, variable.bytes);
}

void* allocate(size_t bytes, const char* label) {
  set_up_arena();
  const size_t taken = (bytes + kGap + kGap + 255) / 256 * 256;
  if (arena_used + taken > kArena) return nullptr;
  const uintptr_t address = global_region.base + arena_used;
  arena_used += taken;
  allocations[address] = {bytes, label};
  unpoison(reinterpret_cast<void*>(address), bytes);
  std::memset(reinterpret_cast<void*>(address), 0xff, bytes);
  set_state(global_region, address, bytes, kAllocated);
  return reinterpret_cast<void*>(address);
}

bool release(void* pointer) {
  const auto found = allocations.find(reinterpret_cast<uintptr_t>(pointer));
  if (found == allocations.end()) return false;
  set_state(global_region, found->first, found->second.bytes, 0);
  poison(pointer, found->second.bytes);
  allocations.erase(found);
  if (allocations.empty()) arena_used = kGap;
  return true;
}

cudaError_t allow_dynamic_shared(const void* kernel, cudaFuncAttribute attribute, int value) {
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaSuccess;
  if (value < 0 || static_cast<size_t>(value) > kMaxShared) return cudaErrorInvalidValue;
  allow_dynamic(kernel, static_cast<size_t>(value));
  return cudaSuccess;
}

void clear_seen() {
  for (const auto& [base, allocation] : allocations)
    for (size_t i = 0; i < allocation.bytes; ++i)
      global_region.state[base - global_region.base + i] &= ~(kRead | kWritten);
}

}  // namespace cuda_on_cpu

using namespace cuda_on_cpu;

const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "no error";
    case cudaErrorMemoryAllocation:
      return "out of memory";
    case cudaErrorInvalidDevice:
      return "invalid device ordinal";
    default:
      return "invalid argument";
  }
}
cudaError_t cudaGetLastError() { return cudaSuccess; }
cudaError_t cudaPeekAtLastError() { return cudaSuccess; }
cudaError_t cudaGetDeviceCount(int* count) { return *count = 2, cudaSuccess; }
cudaError_t cudaGetDevice(int* device) { return *device = machine.device, cudaSuccess; }
cudaError_t cudaSetDevice(int device) {
  if (device < 0 || device > 1) return cudaErrorInvalidDevice;
  machine.device = device;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  if (device < 0 || device > 1) return cudaErrorInvalidDevice;
  switch (attribute) {
    case cudaDevAttrMaxThreadsPerBlock:
    case cudaDevAttrMaxThreadsPerMultiProcessor:
      return *value = 1024, cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlock:
      return *value = 48 * 1024, cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      return *value = static_cast<int>(kMaxShared), cudaSuccess;
    case cudaDevAttrWarpSize:
      return *value = static_cast<int>(kWarp), cudaSuccess;
    case cudaDevAttrMultiProcessorCount:
      return *value = 4, cudaSuccess;
    case cudaDevAttrComputeCapabilityMajor:
      return *value = 7, cudaSuccess;
    case cudaDevAttrComputeCapabilityMinor:
      return *value = 5, cudaSuccess;
  }
  return cudaErrorInvalidValue;
}
cudaError_t cudaDeviceSynchronize() { return cudaSuccess; }
cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }
cudaError_t cudaMalloc(void** pointer, size_t bytes) {
  *pointer = allocate(bytes, "cudaMalloc'ed memory");
  return *pointer ? cudaSuccess : cudaErrorMemoryAllocation;
}
cudaError_t cudaFree(void* pointer) { return !pointer || release(pointer) ? cudaSuccess : cudaErrorInvalidValue; }
cudaError_t cudaMemset(void* pointer, int value, size_t bytes) {
  const auto address = reinterpret_cast<uintptr_t>(pointer);
  check_host_range(address, bytes, "cudaMemset");
  if (bytes) std::memset(pointer, value, bytes);
  if (global_region.contains(address)) set_state(global_region, address, bytes, kAllocated | kInitialised);
  return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void* pointer, int value, size_t bytes, cudaStream_t stream) {
  if (stream != machine.expected_stream) fail("cudaMemsetAsync on another stream than the launcher was given");
  return cudaMemset(pointer, value, bytes);
}
cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind) {
  const auto target = reinterpret_cast<uintptr_t>(to), source = reinterpret_cast<uintptr_t>(from);
  check_host_range(target, bytes, "cudaMemcpy");
  check_host_range(source, bytes, "cudaMemcpy");
  if (bytes) std::memmove(to, from, bytes);
  if (!kChecker || !global_region.contains(target)) return cudaSuccess;
  uint8_t* state = global_region.state + (target - global_region.base);
  if (global_region.contains(source)) {
    std::memmove(state, global_region.state + (source - global_region.base), bytes);
  } else {
    std::memset(state, kAllocated | kInitialised, bytes);
  }
  return cudaSuccess;
}
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind kind, cudaStream_t stream) {
  if (stream != machine.expected_stream) fail("cudaMemcpyAsync on another stream than the launcher was given");
  return cudaMemcpy(to, from, bytes, kind);
}

extern "C" {
void* cuda_on_cpu_allocate(size_t bytes, const char* label) { return allocate(bytes, label); }
void cuda_on_cpu_release(void* pointer) { release(pointer); }
void cuda_on_cpu_upload(void* to, const void* from, size_t bytes) {
  std::memcpy(to, from, bytes);
  set_state(global_region, reinterpret_cast<uintptr_t>(to), bytes, kAllocated | kInitialised);
}
// Copies out; returns the first byte that no kernel has written, or -1.
int64_t cuda_on_cpu_download(void* to, const void* from, size_t bytes) {
  std::memcpy(to, from, bytes);
  if (!kChecker) return -1;
  const uint8_t* state = global_region.state + (reinterpret_cast<uintptr_t>(from) - global_region.base);
  for (size_t i = 0; i < bytes; ++i)
    if (!(state[i] & kInitialised)) return static_cast<int64_t>(i);
  return -1;
}
// Says where the shared variables of the loaded object lie: all offsets are relative to its first byte.
void cuda_on_cpu_shared_region(size_t offset, size_t bytes) {
  static_region.base = reinterpret_cast<uintptr_t>(&__ehdr_start) + offset;
  static_region.size = bytes;
  if (kChecker) map_shadow(static_region);
  dirty.assign((bytes + kSlot - 1) / kSlot, 0);
}
void cuda_on_cpu_shared_variable(size_t offset, size_t bytes, const char* name, int foreign) {
  const uintptr_t address = reinterpret_cast<uintptr_t>(&__ehdr_start) + offset;
  set_state(static_region, address, bytes, foreign ? kForeign : kAllocated);
  if (!foreign) shared_variables.push_back({address, bytes, name});
}
void cuda_on_cpu_expect(int device, void* stream) {
  machine.device = 0;
  machine.expected_device = device;
  machine.expected_stream = stream;
}
}
