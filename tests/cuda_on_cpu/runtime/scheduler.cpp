// Runs a grid: one fiber for each thread of the block, switched at barriers and warp operations.
#include <sys/mman.h>

#include <algorithm>
#include <cstdarg>
#include <cstring>
#include <numeric>
#include <set>
#include <utility>

#include "runtime.h"

#ifdef CUDA_ON_CPU_ASAN
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

// Saves the running fiber's registers and stack pointer, and goes on where another one did so.
extern "C" void cuda_on_cpu_switch(void** save, void* load);
__asm__(R"(
.text
.globl cuda_on_cpu_switch
.hidden cuda_on_cpu_switch
.type cuda_on_cpu_switch, @function
cuda_on_cpu_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size cuda_on_cpu_switch, .-cuda_on_cpu_switch
)");

namespace cuda_on_cpu {

Machine machine;

namespace {

constexpr size_t kGuard = 4096;

void (*body)(const void*) = nullptr;
const void* body_context = nullptr;
std::set<std::pair<std::string, int>> sites;  // every barrier that ran
Site last_site{};
std::set<std::pair<uintptr_t, uintptr_t>> met;  // paths by which threads came to the same operation
std::string meetings;                           // the same as text: "site|calls|calls" a line
uint64_t random_state = 0;
uint64_t resumes = 0;
void* scheduler_stack_pointer = nullptr;
uint32_t arrived[kMaxThreads / kWarp];  // for each warp: the lanes that wait at a warp operation or have ended

uint64_t next_random() {
  random_state += 0x9e3779b97f4a7c15ull;
  uint64_t z = random_state;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
  return z ^ (z >> 31);
}

template <typename T>
void arrange(std::vector<T>& order) {
  std::iota(order.begin(), order.end(), T(0));
  if (machine.order == 1) std::reverse(order.begin(), order.end());
  if (machine.order == 2)
    for (size_t i = order.size(); i > 1; --i) std::swap(order[i - 1], order[next_random() % i]);
}

void allocate_stacks() {
  if (machine.thread[0].stack) return;
  const size_t each = kStack + kGuard;
  char* const memory = static_cast<char*>(reserve(each * kMaxThreads));
  for (unsigned t = 0; t < kMaxThreads; ++t) {
    mprotect(memory + t * each, kGuard, PROT_NONE);
    machine.thread[t].stack = memory + t * each + kGuard;
  }
}

// ---- fibers: the address sanitizer is told of every switch

#ifdef CUDA_ON_CPU_ASAN
const void* scheduler_stack = nullptr;
size_t scheduler_stack_size = 0;
void leave(void** fake, const void* stack, size_t size) { __sanitizer_start_switch_fiber(fake, stack, size); }
void arrive(void* fake, bool at_thread) {
  __sanitizer_finish_switch_fiber(fake, at_thread ? &scheduler_stack : nullptr,
                                  at_thread ? &scheduler_stack_size : nullptr);
}
#else
constexpr const void* scheduler_stack = nullptr;
constexpr size_t scheduler_stack_size = 0;
void leave(void**, const void*, size_t) {}
void arrive(void*, bool) {}
#endif

void switch_to_scheduler(bool last) {
  void* fake = nullptr;
  leave(last ? nullptr : &fake, scheduler_stack, scheduler_stack_size);
  cuda_on_cpu_switch(&machine.thread[machine.current].stack_pointer, scheduler_stack_pointer);
  arrive(fake, true);
}

void fiber_main() {
  arrive(nullptr, true);
  body(body_context);
  machine.thread[machine.current].state = State::kDone;
  arrived[machine.current / kWarp] |= 1u << machine.current % kWarp;
  switch_to_scheduler(true);
  __builtin_unreachable();
}

void make_fiber(unsigned t) {
  Thread& thread = machine.thread[t];
  thread.state = State::kReady;
#ifdef CUDA_ON_CPU_ASAN
  __asan_unpoison_memory_region(thread.stack, kStack);
#endif
  auto** top = reinterpret_cast<void**>(thread.stack + kStack);
  *--top = nullptr;                               // a caller's frame that does not exist
  *--top = reinterpret_cast<void*>(&fiber_main);  // where the first switch returns to
  for (int r = 0; r < 6; ++r) *--top = nullptr;
  thread.stack_pointer = top;
}

void resume(unsigned t) {
  ++resumes;
  machine.current = t;
  threadIdx = machine.thread[t].index;
  machine.running = true;
  machine.checking = false;
  void* fake = nullptr;
  leave(&fake, machine.thread[t].stack, kStack);
  cuda_on_cpu_switch(&scheduler_stack_pointer, machine.thread[t].stack_pointer);
  arrive(fake, false);
  machine.running = false;
  if (machine.defect.empty()) machine.defect = take_sanitizer_report();
  throw_defect();
}

// ---- waiting

bool same(Site a, Site b) { return a.line == b.line && (a.file == b.file || std::strcmp(a.file, b.file) == 0); }

// A barrier does nothing while Python has it disabled.
bool is_disabled(Site site) {
  if (!last_site.file || !same(site, last_site)) sites.emplace(site.file, site.line);
  last_site = site;
  return machine.disabled.file && same(site, machine.disabled);
}

// The calls that lead here: a barrier inside a function that is called from two places is two barriers.
__attribute__((always_inline)) inline void take_path(Thread& thread) {
  thread.depth = 0;
  thread.path = 0;
  for (auto** frame = static_cast<void**>(__builtin_frame_address(0)); frame && thread.depth < kMaxDepth;
       frame = static_cast<void**>(*frame)) {
    thread.calls[thread.depth++] = reinterpret_cast<uintptr_t>(frame[1]);
    thread.path = thread.path * 31 + reinterpret_cast<uintptr_t>(frame[1]);
  }
}

std::string calls_of(const Thread& thread) {
  std::string text;
  for (unsigned i = 0; i < thread.depth && thread.calls[i]; ++i)
    text += " " + place(thread.calls[i] - reinterpret_cast<uintptr_t>(&__ehdr_start));
  return text;
}

// Whether two threads are at the same operation. g++ may have made two of one, so that threads which came by different
// addresses are noted: Python knows whether these are different calls in the source too.
bool together(const Thread& a, const Thread& b) {
  if (a.path == b.path) return true;
  if (!same(a.site, b.site)) return false;
  if (met.insert(std::minmax(a.path, b.path)).second)
    meetings += place(a.site) + "|" + calls_of(a) + "|" + calls_of(b) + "\n";
  return true;
}

[[noreturn]] void diverged(unsigned a, unsigned b, const char* where) {
  const Thread &first = machine.thread[a], &second = machine.thread[b];
  fail("barrier divergence in block %s: thread %s waits at %s, thread %s%s %s%s", block_name(machine.block).c_str(),
       thread_name(a).c_str(), place(first.site).c_str(), thread_name(b).c_str(), where,
       second.state == State::kDone ? "has ended" : "at ",
       second.state == State::kDone ? "" : place(second.site).c_str());
}

// Lets the block barrier open once every thread has reached it.
void open_barrier() {
  unsigned first = 0;
  uint64_t trues = 0;
  while (machine.thread[first].state == State::kDone) ++first;
  for (unsigned t = 0; t < machine.threads; ++t) {
    const Thread& thread = machine.thread[t];
    if (thread.state == State::kDone || !together(machine.thread[first], thread)) diverged(first, t, "");
    trues += thread.value;
  }
  traffic_flush(0, machine.threads);
  ++machine.epoch;
  checker_block_barrier();
  for (unsigned t = 0; t < machine.threads; ++t) {
    machine.thread[t].state = State::kReady;
    machine.thread[t].value = trues;
  }
}

// Completes a warp operation if every lane of its mask that still lives has arrived at it.
bool complete_warp(unsigned t) {
  const unsigned first = t / kWarp * kWarp, lanes = std::min(kWarp, machine.threads - first);
  const Thread& self = machine.thread[t];
  const unsigned existing = lanes == kWarp ? 0xffffffffu : (1u << lanes) - 1;
  if ((arrived[first / kWarp] & self.mask & existing) != (self.mask & existing)) return false;
  unsigned present = 0, ballot = 0;
  uint64_t value[kWarp];
  for (unsigned lane = 0; lane < lanes; ++lane) {
    const Thread& other = machine.thread[first + lane];
    if (!(self.mask >> lane & 1) || other.state == State::kDone) continue;
    if (other.mask != self.mask || !together(self, other)) return false;
    present |= 1u << lane;
    value[lane] = other.value;
    if (other.value) ballot |= 1u << lane;
  }
  arrived[first / kWarp] &= ~present;
  for (unsigned lane = 0; lane < lanes; ++lane) {
    if (!(present >> lane & 1)) continue;
    Thread& other = machine.thread[first + lane];
    if (self.op == WarpOp::kVote) other.value = ballot;
    if (self.op == WarpOp::kMatch) {
      other.value = 0;
      for (unsigned peer = 0; peer < lanes; ++peer)
        if ((present >> peer & 1) && value[peer] == value[lane]) other.value |= 1u << peer;
    }
    if (self.op == WarpOp::kShuffle) {
      if (other.source >= kWarp || !(present >> other.source & 1))
        fail("shuffle from an absent lane: thread %s of block %s reads lane %u at %s, which %s",
             thread_name(first + lane).c_str(), block_name(machine.block).c_str(), other.source,
             place(self.site).c_str(),
             other.source >= lanes              ? "does not exist"
             : !(self.mask >> other.source & 1) ? "is not in the mask"
                                                : "has ended");
      other.value = value[other.source];
    }
    other.state = State::kReady;
  }
  if (self.op == WarpOp::kSync) checker_warp_sync(first / kWarp, present);
  if (present == existing) traffic_flush(first, lanes);
  return true;
}

// Nobody can go on: some lane waits for another one of its mask, which waits elsewhere.
[[noreturn]] void deadlock() {
  for (unsigned t = 0; t < machine.threads; ++t) {
    const Thread& thread = machine.thread[t];
    if (thread.state != State::kAtWarp) continue;
    const unsigned first = t / kWarp * kWarp;
    for (unsigned other = first; other < std::min(first + kWarp, machine.threads); ++other)
      if ((thread.mask >> (other - first) & 1) && machine.thread[other].state != State::kDone &&
          (machine.thread[other].mask != thread.mask || !together(thread, machine.thread[other])))
        diverged(t, other, " of the same warp and mask");
  }
  fail("block %s waits for ever", block_name(machine.block).c_str());
}

void run_block(std::vector<unsigned>& order) {
  begin_block_memory();
  checker_begin_block();
  machine.epoch = 0;
  std::fill(std::begin(arrived), std::end(arrived), 0u);
  for (unsigned t = 0; t < machine.threads; ++t) make_fiber(t);
  for (;;) {
    arrange(order);
    bool progress = false;
    for (const unsigned t : order)
      if (machine.thread[t].state == State::kReady) {
        resume(t);
        progress = true;
      }
    unsigned done = 0, at_barrier = 0;
    for (unsigned t = 0; t < machine.threads; ++t) {
      const State state = machine.thread[t].state;
      done += state == State::kDone;
      at_barrier += state == State::kAtBarrier;
      if (state == State::kAtWarp && complete_warp(t)) progress = true;
    }
    if (done == machine.threads) break;
    if (at_barrier > 0 && done + at_barrier == machine.threads) {
      open_barrier();
    } else if (!progress) {
      deadlock();
    }
  }
  if (!machine.deferred.empty()) fail("%s", "");
  traffic_flush(0, machine.threads);
}

}  // namespace

// ---- what kernels call

int block_barrier(bool predicate, Site site) {
  if (is_disabled(site)) return 0;
  Thread& self = machine.thread[machine.current];
  self.state = State::kAtBarrier;
  self.site = site;
  take_path(self);
  self.value = predicate;
  switch_to_scheduler(false);
  return static_cast<int>(self.value);
}

uint64_t warp_operation(WarpOp op, unsigned mask, uint64_t value, unsigned source, Site site) {
  const unsigned t = machine.current;
  Thread& self = machine.thread[t];
  if (op == WarpOp::kSync && is_disabled(site)) return 0;
  if (!(mask >> (t % kWarp) & 1))
    fail("thread %s of block %s calls a warp operation at %s with a mask (0x%08x) that leaves itself out",
         thread_name(t).c_str(), block_name(machine.block).c_str(), place(site).c_str(), mask);
  self.state = State::kAtWarp;
  arrived[t / kWarp] |= 1u << t % kWarp;
  self.op = op;
  self.mask = mask;
  self.value = value;
  self.source = source;
  self.site = site;
  take_path(self);
  if (!complete_warp(t)) switch_to_scheduler(false);
  return self.value;
}

unsigned lane_id() { return machine.current % kWarp; }

void fail(const char* format, ...) {
  char text[1024];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  // What went wrong first explains what goes wrong now, unless a race explains both.
  if (!machine.deferred.empty() && std::strncmp(text, "data race", 9) != 0)
    snprintf(text, sizeof text, "%s", machine.deferred.c_str());
  machine.deferred.clear();
  if (!machine.running) throw Defect(text);
  machine.defect = text;
  switch_to_scheduler(true);
  __builtin_unreachable();
}

static std::string coordinates(uint32_t linear, dim3 size) {
  return "(" + std::to_string(linear % size.x) + "," + std::to_string(linear / size.x % size.y) + "," +
         std::to_string(linear / size.x / size.y) + ")";
}
std::string thread_name(uint32_t thread) { return coordinates(thread, blockDim); }
std::string block_name(uint32_t block) { return coordinates(block - machine.launch_first_block, gridDim); }

std::string place(uintptr_t pc) {
  char text[32];
  snprintf(text, sizeof text, "@0x%zx", static_cast<size_t>(pc));
  return text;
}

std::string place(Site site) { return std::string(site.file) + ":" + std::to_string(site.line); }

void launch(const void* kernel, dim3 grid, dim3 block, size_t shared_bytes, void* stream, void (*function)(const void*),
            const void* context, size_t context_bytes) {
  const uint64_t blocks = uint64_t{grid.x} * grid.y * grid.z, threads = uint64_t{block.x} * block.y * block.z;
  if (blocks == 0 || grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535)
    fail("launch with grid (%u,%u,%u): allowed are 1 to 2147483647, 65535 and 65535 blocks", grid.x, grid.y, grid.z);
  if (threads == 0 || threads > kMaxThreads || block.z > 64)
    fail("launch with block (%u,%u,%u): allowed are 1 to 1024 threads, at most 64 in z", block.x, block.y, block.z);
  if (shared_bytes > kMaxDynamic)
    fail("launch with %zu bytes of dynamic shared memory: %zu are allowed (48 KiB without cudaFuncSetAttribute)",
         shared_bytes, kMaxDynamic);
  if (machine.device != machine.expected_device)
    fail("launch on device %d, but the launcher was given device %d: a DeviceGuard is missing", machine.device,
         machine.expected_device);
  if (stream != machine.expected_stream) fail("launch on another stream than the launcher was given");
  allocate_stacks();
  set_up_memory();
  machine.deferred.clear();
  machine.kernel = kernel;
  machine.threads = static_cast<unsigned>(threads);
  machine.dynamic_bytes = shared_bytes;
  machine.arguments = reinterpret_cast<uintptr_t>(context);
  machine.argument_bytes = context_bytes;
  body = function;
  body_context = context;
  blockDim = block;
  gridDim = grid;
  random_state = machine.seed;
  for (unsigned t = 0; t < machine.threads; ++t)
    machine.thread[t].index = {t % block.x, t / block.x % block.y, t / block.x / block.y};
  machine.launch_first_block = machine.next_block;
  machine.next_block += static_cast<uint32_t>(blocks);
  checker_begin_launch();
  traffic_begin_launch();
  std::vector<uint32_t> block_order(blocks);
  arrange(block_order);
  std::vector<unsigned> order(machine.threads);
  for (const uint32_t linear : block_order) {
    machine.block = machine.launch_first_block + linear;
    blockIdx = {linear % grid.x, linear / grid.x % grid.y, linear / grid.x / grid.y};
    run_block(order);
  }
}

}  // namespace cuda_on_cpu

extern "C" {
// How often a thread was switched to since the last call.
uint64_t cuda_on_cpu_resumes() { return std::exchange(cuda_on_cpu::resumes, 0); }
// The barriers that ran since the last call, one "file:line" a line.
const char* cuda_on_cpu_sites() {
  static std::string text;
  text.clear();
  for (const auto& [file, line] : std::exchange(cuda_on_cpu::sites, {}))
    text += file + ":" + std::to_string(line) + "\n";
  cuda_on_cpu::last_site = {};
  return text.c_str();
}
// Taken by Python after each call, see together().
const char* cuda_on_cpu_meetings() {
  static std::string text;
  text = std::exchange(cuda_on_cpu::meetings, {});
  cuda_on_cpu::met.clear();
  return text.c_str();
}
void cuda_on_cpu_disable(const char* file, int line) {
  static std::string held;
  held = file ? file : "";
  cuda_on_cpu::machine.disabled = {file ? held.c_str() : nullptr, line};
}
void cuda_on_cpu_order(int order, uint64_t seed) {
  cuda_on_cpu::machine.order = order;
  cuda_on_cpu::machine.seed = seed;
}
}
