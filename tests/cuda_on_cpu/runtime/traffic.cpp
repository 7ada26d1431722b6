// Measures: what a launch moves. Between two points where a warp's lanes are known to be together, the n-th access that
// each lane makes from one place in the code forms one request of the warp.
#include <algorithm>
#include <bitset>
#include <cstring>
#include <map>
#include <unordered_map>

#include "runtime.h"

namespace cuda_on_cpu {

// Read from Python by position.
struct Traffic {
  uint64_t launches, threads, dynamic_shared;  // of a block, the most
  uint64_t bytes_loaded, bytes_stored, distinct_loaded, distinct_stored;
  uint64_t requests, sectors, ideal_sectors;
  uint64_t shared_requests, wavefronts, ideal_wavefronts;
};

namespace {

constexpr uintptr_t kSector = 32, kBankBytes = 4, kBanks = 32;
std::map<const void*, Traffic> traffic;

struct Lane {
  uint32_t occurrence;
  uint16_t lane;
  LogEntry entry;
};

void count_global(Traffic& sum, const Lane* lanes, size_t n) {
  std::vector<std::pair<uintptr_t, uintptr_t>> ranges;
  for (size_t i = 0; i < n; ++i) {
    const LogEntry& entry = lanes[i].entry;
    ranges.emplace_back(entry.address, entry.address + entry.size);
    uint8_t* state = global_region.state + (entry.address - global_region.base);
    const uint8_t seen = entry.write ? kWritten : kRead;
    for (uint32_t b = 0; b < entry.size; ++b) {
      if (!(state[b] & seen)) ++(entry.write ? sum.distinct_stored : sum.distinct_loaded);
      state[b] |= seen;
    }
  }
  std::sort(ranges.begin(), ranges.end());
  uint64_t bytes = 0, sectors = 0;
  uintptr_t end = 0, next_sector = 0;
  for (const auto& [first, last] : ranges) {
    if (last > end) bytes += last - std::max(first, end);
    end = std::max(end, last);
    const uintptr_t from = std::max(first / kSector, next_sector), to = (last - 1) / kSector + 1;
    if (to > from) sectors += to - from;
    next_sector = std::max(next_sector, to);
  }
  (lanes[0].entry.write ? sum.bytes_stored : sum.bytes_loaded) += bytes;
  ++sum.requests;
  sum.sectors += sectors;
  sum.ideal_sectors += (bytes + kSector - 1) / kSector;
}

// A request of 8 or 16 bytes a lane is served in halves or quarters of the warp.
void count_shared(Traffic& sum, const Lane* lanes, size_t n) {
  const unsigned together = kWarp / std::max(1u, static_cast<unsigned>(lanes[0].entry.size) / 4);
  ++sum.shared_requests;
  for (size_t i = 0; i < n;) {
    std::vector<uintptr_t> words;
    const unsigned group = lanes[i].lane / together;
    for (; i < n && lanes[i].lane / together == group; ++i)
      for (uintptr_t a = lanes[i].entry.address; a < lanes[i].entry.address + lanes[i].entry.size; a += kBankBytes)
        words.push_back(a / kBankBytes);
    std::sort(words.begin(), words.end());
    words.erase(std::unique(words.begin(), words.end()), words.end());
    uint64_t bank[kBanks] = {};
    for (const uintptr_t word : words) ++bank[word % kBanks];
    sum.wavefronts += *std::max_element(bank, bank + kBanks);
    sum.ideal_wavefronts += (words.size() + kBanks - 1) / kBanks;
  }
}

}  // namespace

void traffic_begin_launch() {
  if (!machine.measure) return;
  forget_seen();
  Traffic& sum = traffic[machine.kernel];
  ++sum.launches;
  sum.threads = std::max<uint64_t>(sum.threads, machine.threads);
  sum.dynamic_shared = std::max<uint64_t>(sum.dynamic_shared, machine.dynamic_bytes);
}

void traffic_flush(unsigned first_thread, unsigned threads) {
  if (!machine.measure) return;
  Traffic& sum = traffic[machine.kernel];
  std::vector<Lane> all;
  for (unsigned first = first_thread; first < first_thread + threads; first += kWarp) {
    all.clear();
    for (unsigned t = first; t < std::min(first + kWarp, machine.threads); ++t) {
      std::unordered_map<uintptr_t, uint32_t> count;
      for (const LogEntry& entry : machine.thread[t].log)
        if (entry.shared || global_region.contains(entry.address))
          all.push_back({count[entry.pc * 2 + entry.write]++, static_cast<uint16_t>(t % kWarp), entry});
      machine.thread[t].log.clear();
    }
    const auto request = [](const Lane& l) {
      return std::tuple(l.entry.pc, static_cast<bool>(l.entry.write), static_cast<bool>(l.entry.shared),
                        static_cast<uint32_t>(l.entry.size), l.occurrence);
    };
    std::stable_sort(all.begin(), all.end(), [&](const Lane& a, const Lane& b) { return request(a) < request(b); });
    for (size_t i = 0; i < all.size();) {
      size_t end = i;
      while (end < all.size() && request(all[end]) == request(all[i])) ++end;
      (all[i].entry.shared ? count_shared : count_global)(sum, &all[i], end - i);
      i = end;
    }
  }
}

}  // namespace cuda_on_cpu

extern "C" {
void cuda_on_cpu_measure(int on) {
  cuda_on_cpu::machine.measure = on != 0;
  if (on) cuda_on_cpu::traffic.clear();
}
int cuda_on_cpu_traffic_count() { return static_cast<int>(cuda_on_cpu::traffic.size()); }
const void* cuda_on_cpu_traffic(int i, uint64_t* values) {
  const auto found = std::next(cuda_on_cpu::traffic.begin(), i);
  std::memcpy(values, &found->second, sizeof(cuda_on_cpu::Traffic));
  return found->first;
}
}
