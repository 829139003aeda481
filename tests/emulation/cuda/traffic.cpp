// Counts what memory accesses cost: sectors of 32 bytes in global memory, wavefronts in shared memory.
//
// Shared memory has 32 banks of 4 bytes. A wavefront serves one word a bank, and an access of 16 bytes a lane goes out
// in four parts of 8 lanes, one of 8 bytes in two parts of 16. The fibers of a warp do not run in step: the n-th time
// that a lane passes a place in the code belongs to the same request as the n-th time of the other lanes.
#include <algorithm>
#include <deque>
#include <map>
#include <tuple>

#include "runtime.h"

namespace grank::emulation {

namespace {

struct Request {
  int bytes;
  unsigned lanes;
  uintptr_t addresses[kWarp];
};

// A place in the code, for one warp.
struct Site {
  uint64_t passed[kWarp];  // how often a lane has been here
  uint64_t first;          // the number of requests[0]
  std::deque<Request> requests;
};

std::map<std::tuple<int, uintptr_t, Kind>, Site> sites;

bool in_shared(Kind kind) {
  return kind != Kind::kGlobalLoad && kind != Kind::kGlobalStore && kind != Kind::kCopySource;
}

// Addresses of the lanes from `first` on, `count` of them, that take part; ascending, each once.
int distinct(const Request& request, int first, int count, uintptr_t unit, uintptr_t (&addresses)[kWarp]) {
  int found = 0;
  for (int lane = first; lane < first + count; ++lane) {
    if (request.lanes >> lane & 1) addresses[found++] = request.addresses[lane] / unit * unit;
  }
  std::sort(addresses, addresses + found);
  return static_cast<int>(std::unique(addresses, addresses + found) - addresses);
}

void count_wavefronts(const Request& request, Traffic& traffic) {
  const int lanes_at_once = std::min(kWarp, 128 / request.bytes);
  for (int first = 0; first < kWarp; first += lanes_at_once) {
    uintptr_t addresses[kWarp];
    const int found = distinct(request, first, lanes_at_once, std::max(4, request.bytes), addresses);
    if (found == 0) continue;
    int in_bank[32] = {};
    for (int i = 0; i < found; ++i) {
      for (int byte = 0; byte < request.bytes; byte += 4) ++in_bank[(addresses[i] + byte) / 4 % 32];
    }
    traffic.transactions += *std::max_element(in_bank, in_bank + 32);
    ++traffic.ideal;
  }
}

void count_sectors(const Request& request, Traffic& traffic) {
  uintptr_t addresses[kWarp];
  const int found = distinct(request, 0, kWarp, 1, addresses);
  uintptr_t next_sector = 0;
  for (int i = 0; i < found; ++i) {
    const uintptr_t first_sector = std::max(addresses[i] / 32, next_sector);
    next_sector = (addresses[i] + request.bytes - 1) / 32 + 1;
    if (first_sector < next_sector) traffic.transactions += next_sector - first_sector;
  }
  traffic.ideal += (static_cast<uint64_t>(found) * request.bytes + 31) / 32;
}

void count_request(const Request& request, Kind kind) {
  Traffic& traffic = counters.traffic[static_cast<int>(kind)];
  ++traffic.requests;
  traffic.bytes += static_cast<uint64_t>(request.bytes) * __builtin_popcount(request.lanes);
  if (in_shared(kind)) {
    count_wavefronts(request, traffic);
  } else {
    count_sectors(request, traffic);
  }
}

}  // namespace

void count_access(const Lane& lane, const void* address, int bytes, Kind kind, uintptr_t pc) {
  Site& site = sites[{lane.number / kWarp, pc, kind}];
  const int number = lane.number % kWarp;
  const size_t i = site.passed[number]++ - site.first;
  if (i >= site.requests.size()) site.requests.push_back({bytes, 0, {}});
  Request& request = site.requests[i];
  request.lanes |= 1u << number;
  request.addresses[number] = reinterpret_cast<uintptr_t>(address);
  if (i == 0 && request.lanes == ~0u) {
    count_request(request, kind);
    site.requests.pop_front();
    ++site.first;
  }
}

void count_block() {
  for (const auto& [site, requests] : sites) {
    for (const Request& request : requests.requests) count_request(request, std::get<Kind>(site));
  }
  sites.clear();
}

}  // namespace grank::emulation
