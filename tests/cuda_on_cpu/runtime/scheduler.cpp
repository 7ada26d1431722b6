// Runs a grid: one fiber for each thread of the block, switched at barriers and warp operations.
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <map>
#include <numeric>
#include <set>
#include <tuple>

#include "runtime.h"

#if defined(__SANITIZE_ADDRESS__) || defined(CUDA_ON_CPU_ASAN)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#define CUDA_ON_CPU_WITH_ASAN 1
#endif

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

// ---- context switch
// ----------------------------------------------------------------------------------------------------
#if defined(__x86_64__) && !defined(CUDA_ON_CPU_UCONTEXT)
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
#else
#include <ucontext.h>
#endif

namespace cuda_on_cpu {

Machine machine;

namespace {

#ifdef CUDA_ON_CPU_WITH_ASAN
constexpr size_t kStack = 512 * 1024;
#else
constexpr size_t kStack = 128 * 1024;
#endif
constexpr size_t kGuard = 4096;

void (*body)(void*) = nullptr;
void* body_context = nullptr;
std::map<const void*, size_t> allowed_dynamic;
std::set<std::tuple<std::string, int, const void*>> sites;  // every barrier that ran: file, line, kernel
Site last_site{};
const void* last_kernel = nullptr;
uint64_t random_state = 0;
uint64_t resumes = 0;
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
  if (machine.order == 1) std::reverse(order.begin(), order.end());
  if (machine.order == 2)
    for (size_t i = order.size(); i > 1; --i) std::swap(order[i - 1], order[next_random() % i]);
}

void allocate_stacks() {
  if (machine.thread[0].stack) return;
  const size_t each = kStack + kGuard;
  void* memory =
      mmap(nullptr, each * kMaxThreads, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw Defect("the harness cannot reserve memory for the fibers' stacks");
  for (unsigned t = 0; t < kMaxThreads; ++t) {
    char* base = static_cast<char*>(memory) + t * each;
    mprotect(base, kGuard, PROT_NONE);
    machine.thread[t].stack = base + kGuard;
  }
}

// ---- fibers
// ------------------------------------------------------------------------------------------------------------
#ifdef CUDA_ON_CPU_WITH_ASAN
const void* scheduler_stack = nullptr;
size_t scheduler_stack_size = 0;
void* scheduler_fake_stack = nullptr;
#endif

#if defined(__x86_64__) && !defined(CUDA_ON_CPU_UCONTEXT)
void* scheduler_stack_pointer = nullptr;
#else
ucontext_t scheduler_context, thread_context[kMaxThreads];
#endif

void switch_to_scheduler(bool last) {
#ifdef CUDA_ON_CPU_WITH_ASAN
  void* fake = nullptr;
  __sanitizer_start_switch_fiber(last ? nullptr : &fake, scheduler_stack, scheduler_stack_size);
#else
  (void)last;
#endif
#if defined(__x86_64__) && !defined(CUDA_ON_CPU_UCONTEXT)
  cuda_on_cpu_switch(&machine.thread[machine.current].stack_pointer, scheduler_stack_pointer);
#else
  swapcontext(&thread_context[machine.current], &scheduler_context);
#endif
#ifdef CUDA_ON_CPU_WITH_ASAN
  __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#endif
}

void fiber_main() {
#ifdef CUDA_ON_CPU_WITH_ASAN
  __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_stack_size);
#endif
  body(body_context);
  machine.thread[machine.current].state = State::kDone;
  arrived[machine.current / kWarp] |= 1u << machine.current % kWarp;
  switch_to_scheduler(true);
  __builtin_unreachable();
}

void make_fiber(unsigned t) {
  Thread& thread = machine.thread[t];
  thread.state = State::kReady;
#ifdef CUDA_ON_CPU_WITH_ASAN
  __asan_unpoison_memory_region(thread.stack, kStack);
#endif
#if defined(__x86_64__) && !defined(CUDA_ON_CPU_UCONTEXT)
  auto** top = reinterpret_cast<void**>(thread.stack + kStack);
  *--top = nullptr;                               // a caller's frame that does not exist
  *--top = reinterpret_cast<void*>(&fiber_main);  // where the first switch returns to
  for (int r = 0; r < 6; ++r) *--top = nullptr;
  thread.stack_pointer = top;
#else
  getcontext(&thread_context[t]);
  thread_context[t].uc_stack.ss_sp = thread.stack;
  thread_context[t].uc_stack.ss_size = kStack;
  makecontext(&thread_context[t], fiber_main, 0);
#endif
}

void resume(unsigned t) {
  ++resumes;
  machine.current = t;
  threadIdx = machine.thread[t].index;
  machine.running = true;
  machine.checking = false;
#ifdef CUDA_ON_CPU_WITH_ASAN
  __sanitizer_start_switch_fiber(&scheduler_fake_stack, machine.thread[t].stack, kStack);
#endif
#if defined(__x86_64__) && !defined(CUDA_ON_CPU_UCONTEXT)
  cuda_on_cpu_switch(&scheduler_stack_pointer, machine.thread[t].stack_pointer);
#else
  swapcontext(&scheduler_context, &thread_context[t]);
#endif
#ifdef CUDA_ON_CPU_WITH_ASAN
  __sanitizer_finish_switch_fiber(scheduler_fake_stack, nullptr, nullptr);
#endif
  machine.running = false;
  if (machine.defect.empty()) machine.defect = take_sanitizer_report();
  if (!machine.defect.empty()) {
    const std::string text = std::move(machine.defect);
    machine.defect.clear();
    throw Defect(text);
  }
}

// ---- waiting
// -----------------------------------------------------------------------------------------------------------
bool same(Site a, Site b) { return a.line == b.line && (a.file == b.file || std::strcmp(a.file, b.file) == 0); }

bool is_disabled(Site site) { return machine.disabled.file && same(site, machine.disabled); }

void record_site(Site site) {
  if (last_site.file && last_kernel == machine.kernel && same(site, last_site)) return;
  last_site = site;
  last_kernel = machine.kernel;
  sites.emplace(site.file, site.line, machine.kernel);
}

// Lets the block barrier open once every thread has reached it.
void open_barrier() {
  Thread* first = nullptr;
  int trues = 0;
  for (unsigned t = 0; t < machine.threads; ++t) {
    Thread& thread = machine.thread[t];
    if (thread.state == State::kDone) continue;
    if (!first) first = &thread;
    if (!same(thread.site, first->site))
      fail("barrier divergence in block %s: thread %s waits at %s, thread %s at %s", block_name(machine.block).c_str(),
           thread_name(static_cast<unsigned>(first - machine.thread)).c_str(), place(first->site).c_str(),
           thread_name(t).c_str(), place(thread.site).c_str());
    trues += thread.predicate;
  }
  for (unsigned t = 0; t < machine.threads; ++t)
    if (machine.thread[t].state == State::kDone)
      fail("barrier divergence in block %s: thread %s has ended, thread %s waits for it at %s",
           block_name(machine.block).c_str(), thread_name(t).c_str(),
           thread_name(static_cast<unsigned>(first - machine.thread)).c_str(), place(first->site).c_str());
  traffic_flush(0, machine.threads);
  ++machine.epoch;
  checker_block_barrier();
  for (unsigned t = 0; t < machine.threads; ++t) {
    machine.thread[t].state = State::kReady;
    machine.thread[t].value = static_cast<uint64_t>(trues);
  }
}

// Completes a warp operation if every lane of its mask that still lives has arrived at it.
bool complete_warp(unsigned t) {
  const unsigned first = t / kWarp * kWarp, lanes = std::min(kWarp, machine.threads - first);
  const Thread& self = machine.thread[t];
  unsigned present = 0;
  const unsigned existing = lanes == kWarp ? 0xffffffffu : (1u << lanes) - 1;
  if ((arrived[first / kWarp] & self.mask & existing) != (self.mask & existing)) return false;
  for (unsigned lane = 0; lane < lanes; ++lane) {
    const Thread& other = machine.thread[first + lane];
    if (!(self.mask >> lane & 1) || other.state == State::kDone) continue;
    if (other.op != self.op || other.mask != self.mask || !same(other.site, self.site)) return false;
    present |= 1u << lane;
  }
  uint64_t value[kWarp];
  unsigned ballot = 0;
  arrived[first / kWarp] &= ~present;
  for (unsigned lane = 0; lane < lanes; ++lane) {
    value[lane] = machine.thread[first + lane].value;
    if ((present >> lane & 1) && value[lane]) ballot |= 1u << lane;
  }
  for (unsigned lane = 0; lane < lanes; ++lane) {
    if (!(present >> lane & 1)) continue;
    Thread& other = machine.thread[first + lane];
    if (self.op == WarpOp::kShuffle) {
      if (other.source >= kWarp || !(present >> other.source & 1))
        fail("shuffle from an absent lane: thread %s of block %s reads lane %u at %s, which %s",
             thread_name(first + lane).c_str(), block_name(machine.block).c_str(), other.source,
             place(self.site).c_str(),
             other.source >= lanes              ? "does not exist"
             : !(self.mask >> other.source & 1) ? "is not in the mask"
                                                : "has ended");
      other.value = value[other.source];
    } else if (self.op == WarpOp::kVote) {
      other.value = ballot;
    } else if (self.op == WarpOp::kMatch) {
      other.value = 0;
      for (unsigned peer = 0; peer < lanes; ++peer)
        if ((present >> peer & 1) && value[peer] == value[lane]) other.value |= 1u << peer;
    }
    other.state = State::kReady;
  }
  if (self.op == WarpOp::kSync) checker_warp_sync(first / kWarp, present);
  if (present == existing) traffic_flush(first, lanes);
  return true;
}

[[noreturn]] void deadlock() {
  unsigned waiting = kMaxThreads, other = kMaxThreads;
  for (unsigned t = 0; t < machine.threads && waiting == kMaxThreads; ++t)
    if (machine.thread[t].state == State::kAtWarp) waiting = t;
  const unsigned first = waiting / kWarp * kWarp;
  for (unsigned t = first; t < std::min(first + kWarp, machine.threads); ++t)
    if (t != waiting && (machine.thread[waiting].mask >> (t - first) & 1) &&
        (machine.thread[t].state == State::kAtBarrier ||
         (machine.thread[t].state == State::kAtWarp && (machine.thread[t].mask != machine.thread[waiting].mask ||
                                                        !same(machine.thread[t].site, machine.thread[waiting].site)))))
      other = t;
  if (other == kMaxThreads)
    fail("barrier divergence in block %s: thread %s waits at %s for ever", block_name(machine.block).c_str(),
         thread_name(waiting).c_str(), place(machine.thread[waiting].site).c_str());
  fail("barrier divergence in block %s: thread %s waits at %s, thread %s of the same warp and mask at %s",
       block_name(machine.block).c_str(), thread_name(waiting).c_str(), place(machine.thread[waiting].site).c_str(),
       thread_name(other).c_str(), place(machine.thread[other].site).c_str());
}

void run_block(std::vector<unsigned>& order) {
  begin_block_memory();
  checker_begin_block();
  machine.epoch = 0;
  std::fill(std::begin(arrived), std::end(arrived), 0u);
  for (unsigned t = 0; t < machine.threads; ++t) make_fiber(t);
  for (;;) {
    std::iota(order.begin(), order.end(), 0u);
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
// -------------------------------------------------------------------------------------------------
int block_barrier(bool predicate, Site site) {
  record_site(site);
  if (is_disabled(site)) return 0;
  Thread& self = machine.thread[machine.current];
  self.state = State::kAtBarrier;
  self.site = site;
  self.predicate = predicate;
  switch_to_scheduler(false);
  return static_cast<int>(self.value);
}

uint64_t warp_operation(WarpOp op, unsigned mask, uint64_t value, unsigned source, Site site) {
  const unsigned t = machine.current;
  Thread& self = machine.thread[t];
  if (op == WarpOp::kSync) {
    record_site(site);
    if (is_disabled(site)) return 0;
  }
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
  if (!complete_warp(t)) switch_to_scheduler(false);
  return self.value;
}

unsigned lane_id() { return machine.current % kWarp; }

void trap(Site site) {
  fail("__trap() in thread %s of block %s at %s", thread_name(machine.current).c_str(),
       block_name(machine.block).c_str(), place(site).c_str());
}

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

std::string thread_name(uint32_t thread) {
  const unsigned x = blockDim.x, y = blockDim.y;
  return "(" + std::to_string(thread % x) + "," + std::to_string(thread / x % y) + "," +
         std::to_string(thread / (x * y)) + ")";
}

std::string block_name(uint32_t block) {
  const uint32_t linear = block - machine.launch_first_block;
  const unsigned x = gridDim.x, y = gridDim.y;
  return "(" + std::to_string(linear % x) + "," + std::to_string(linear / x % y) + "," +
         std::to_string(linear / x / y) + ")";
}

std::string place(Site site) { return std::string(site.file) + ":" + std::to_string(site.line); }

void launch(const void* kernel, dim3 grid, dim3 block, size_t shared_bytes, void* stream, void (*function)(void*),
            void* context) {
  const uint64_t blocks = uint64_t{grid.x} * grid.y * grid.z, threads = uint64_t{block.x} * block.y * block.z;
  if (blocks == 0 || grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535)
    fail("launch with grid (%u,%u,%u): allowed are 1 to 2147483647, 65535 and 65535 blocks", grid.x, grid.y, grid.z);
  if (threads == 0 || threads > kMaxThreads || block.z > 64)
    fail("launch with block (%u,%u,%u): allowed are 1 to 1024 threads, at most 64 in z", block.x, block.y, block.z);
  const auto asked = allowed_dynamic.find(kernel);
  const size_t allowed = asked == allowed_dynamic.end() ? 48 * 1024 : asked->second;
  if (shared_bytes > allowed)
    fail("launch with %zu bytes of dynamic shared memory: %zu are allowed (48 KiB without cudaFuncSetAttribute)",
         shared_bytes, allowed);
  if (machine.device != machine.expected_device)
    fail("launch on device %d, but the launcher was given device %d: a DeviceGuard is missing", machine.device,
         machine.expected_device);
  if (stream != machine.expected_stream) fail("launch on another stream than the launcher was given");
  allocate_stacks();
  machine.deferred.clear();
  machine.kernel = kernel;
  machine.threads = static_cast<unsigned>(threads);
  machine.dynamic_bytes = shared_bytes;
  machine.host_frame = reinterpret_cast<uintptr_t>(__builtin_frame_address(0));
  body = function;
  body_context = context;
  blockDim = block;
  gridDim = grid;
  random_state = machine.seed;
  for (unsigned t = 0; t < machine.threads; ++t)
    machine.thread[t].index = {t % block.x, t / block.x % block.y, t / block.x / block.y};
  machine.launch_first_block = machine.next_block;
  machine.next_block += static_cast<uint32_t>(blocks);
  fill_static_shared();
  checker_begin_launch();
  traffic_begin_launch();
  std::vector<uint32_t> block_order(blocks);
  std::iota(block_order.begin(), block_order.end(), 0u);
  arrange(block_order);
  std::vector<unsigned> order(machine.threads);
  for (const uint32_t linear : block_order) {
    machine.block = machine.launch_first_block + linear;
    blockIdx = {linear % grid.x, linear / grid.x % grid.y, linear / grid.x / grid.y};
    run_block(order);
  }
}

void allow_dynamic(const void* kernel, size_t bytes) { allowed_dynamic[kernel] = bytes; }

}  // namespace cuda_on_cpu

extern "C" {
// How often a thread was switched to since the last call.
uint64_t cuda_on_cpu_resumes() {
  const uint64_t n = cuda_on_cpu::resumes;
  cuda_on_cpu::resumes = 0;
  return n;
}
int cuda_on_cpu_sites() { return static_cast<int>(cuda_on_cpu::sites.size()); }
// The i-th barrier that has run so far: its file, line and the kernel's address.
const char* cuda_on_cpu_site(int i, int* line, const void** kernel) {
  auto site = std::next(cuda_on_cpu::sites.begin(), i);
  *line = std::get<1>(*site);
  *kernel = std::get<2>(*site);
  return std::get<0>(*site).c_str();
}
void cuda_on_cpu_forget_sites() {
  cuda_on_cpu::sites.clear();
  cuda_on_cpu::last_site = {};
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
