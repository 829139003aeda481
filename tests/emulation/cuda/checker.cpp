// Watches the memory accesses of an instrumented kernel. g++ -fsanitize=thread puts a call before every load and store;
// the library is linked without ThreadSanitizer and has those functions here.
//
// Every byte of shared memory and of the buffers has a cell: its last write, and its reads since. Two accesses conflict
// when one of them writes, unless CUDA orders them: program order, __syncthreads, __syncwarp for the lanes it names,
// the end of a kernel. Shuffles, votes and mma order nothing, and neither does anything between blocks. Atomics do not
// conflict with each other. Time is a counter that every ordering event advances.
//
// Approximations: of several reads that are not ordered among themselves, a cell remembers that there were several, and
// a write after them then needs a barrier of all who may have read. Only the first report of each pair of lines is
// kept.
#include <algorithm>
#include <cstdio>
#include <memory>
#include <set>
#include <tuple>

#include "runtime.h"

extern "C" __attribute__((visibility("hidden"))) char __ehdr_start, _end;  // of this library, by the linker

namespace grank::emulation {

namespace {

constexpr uint16_t kSeveralLanes = 0xffff, kSeveralWarps = 0xfffe;  // as a reader
constexpr size_t kMaxReports = 32;

struct Cell {
  uint32_t written_at, read_at;  // 0: never
  uint32_t write_pc, read_pc;    // from the start of the library
  uint16_t writer, reader;       // threads; the reader can be several
  uint16_t warp_of_readers;      // when they are several lanes
  bool atomic, in_flight;        // how it was written
};

struct Region {
  uintptr_t begin, end;
  std::string name;
  bool is_shared;
  std::vector<Cell> cells;
};

struct Report {
  std::string kind, text;
};

std::vector<std::unique_ptr<Region>> buffers;
Region shared;
Region* last_found;
bool checking;
std::vector<Report> reports;
std::set<std::tuple<std::string, uintptr_t, uintptr_t>> reported;

constexpr uint32_t kBeforeAll = 1;  // when buffers got what they hold before the first launch
uint32_t now = kBeforeAll + 1, launch_start, block_start, last_barrier;

uintptr_t library_start() { return reinterpret_cast<uintptr_t>(&__ehdr_start); }
bool contains(const Region& region, uintptr_t address) { return region.begin <= address && address < region.end; }

Region* find(uintptr_t address) {
  if (contains(shared, address)) return &shared;
  if (last_found != nullptr && contains(*last_found, address)) return last_found;
  for (const auto& buffer : buffers) {
    if (contains(*buffer, address)) return last_found = buffer.get();
  }
  return nullptr;
}

std::string byte_of(const Region& region, uintptr_t address) {
  return region.name + "+" + std::to_string(address - region.begin);
}

std::string nearest(uintptr_t address) {
  std::string text = "far from all memory it may access";
  uintptr_t best = 1 << 16;
  const auto consider = [&](const Region& region) {
    const bool before = address < region.begin;
    const uintptr_t distance = before ? region.begin - address : address - region.end;
    if (distance >= best) return;
    best = distance;
    text = std::to_string(distance) + " bytes " + (before ? "before " : "past the end of ") + region.name;
  };
  consider(shared);
  for (const auto& buffer : buffers) consider(*buffer);
  return text;
}

// The thread's own stack, its index, or a constant of the library.
bool is_local(const Lane& lane, const void* pointer) {
  const auto* const byte = static_cast<const char*>(pointer);
  const auto* const self = reinterpret_cast<const char*>(&lane);
  return (byte >= lane.stack && byte < lane.stack + kStackBytes) || (byte >= self && byte < self + sizeof(Lane)) ||
         (byte >= &__ehdr_start && byte < &_end);
}

// The time before which nothing in this region matters: shared memory is new in every block.
uint32_t era(const Region& region) { return region.is_shared ? block_start : launch_start; }

// Whether what `thread` did at `time` comes before what `lane` does now.
bool ordered(const Lane& lane, int thread, uint32_t time) {
  if (time < block_start) return false;  // another block
  if (time < last_barrier || thread == lane.number) return true;
  return thread / kWarp == lane.number / kWarp && time < lane.known[thread % kWarp];
}

bool reads_ordered(const Lane& lane, const Cell& cell) {
  if (cell.read_at < block_start) return false;
  if (cell.reader != kSeveralLanes && cell.reader != kSeveralWarps) return ordered(lane, cell.reader, cell.read_at);
  if (cell.read_at < last_barrier) return true;
  if (cell.reader == kSeveralWarps || cell.warp_of_readers != lane.number / kWarp) return false;
  for (int i = 0; i < kWarp; ++i) {
    if (i != lane.number % kWarp && cell.read_at >= lane.known[i]) return false;
  }
  return true;
}

std::string who(const Cell& cell, uint32_t time, int thread) {
  if (time < block_start) return "another block";
  if (thread == kSeveralLanes) return "several threads of warp " + std::to_string(cell.warp_of_readers);
  if (thread == kSeveralWarps) return "threads of several warps";
  return "thread " + std::to_string(thread);
}

void remember_read(const Lane& lane, Cell& cell, uint32_t era, uintptr_t pc) {
  const bool known = cell.read_at >= era;
  if (known && cell.read_at < block_start) return;  // a read by another block: no write can come after it any more
  const auto warp = static_cast<uint16_t>(lane.number / kWarp);
  if (!known || reads_ordered(lane, cell)) {
    cell.reader = static_cast<uint16_t>(lane.number);
  } else {
    const int warp_before = cell.reader == kSeveralLanes ? cell.warp_of_readers : cell.reader / kWarp;
    cell.reader = cell.reader != kSeveralWarps && warp_before == warp ? kSeveralLanes : kSeveralWarps;
  }
  cell.warp_of_readers = warp;
  cell.read_at = now;
  cell.read_pc = static_cast<uint32_t>(pc - library_start());
}

void check_byte(const Lane& lane, const Region& region, Cell& cell, uintptr_t address, Access access, uintptr_t pc) {
  const uint32_t era = emulation::era(region);
  const char* const verb = access == Access::kRead ? "read of " : "write of ";
  const auto tell = [&](const char* kind, const std::string& text, uintptr_t other_pc) {
    report(kind, &lane, verb + byte_of(region, address) + at(pc) + text, pc, other_pc);
  };
  const uintptr_t write_pc = library_start() + cell.write_pc, read_pc = library_start() + cell.read_pc;
  const bool written = cell.written_at >= era;
  if (written && cell.in_flight) {
    tell("cp.async", " while the copy by thread " + std::to_string(cell.writer) + at(write_pc) + " is in flight",
         write_pc);
  }
  if (access == Access::kRead && (region.is_shared ? !written : cell.written_at == 0)) {
    tell("uninitialised", " before anything was written there", 0);
  }
  const bool both_atomic = access == Access::kAtomic && cell.atomic;
  if (written && !both_atomic && !ordered(lane, cell.writer, cell.written_at)) {
    tell("race", " is not ordered after the write by " + who(cell, cell.written_at, cell.writer) + at(write_pc),
         write_pc);
  }
  if (access == Access::kRead) return remember_read(lane, cell, era, pc);
  if (cell.read_at >= era && !reads_ordered(lane, cell)) {
    tell("race", " is not ordered after the read by " + who(cell, cell.read_at, cell.reader) + at(read_pc), read_pc);
  }
  cell.written_at = now;
  cell.writer = static_cast<uint16_t>(lane.number);
  cell.write_pc = static_cast<uint32_t>(pc - library_start());
  cell.atomic = access == Access::kAtomic;
  cell.in_flight = access == Access::kCopy;
  cell.read_at = 0;
}

}  // namespace

std::string at(uintptr_t pc) {
  char text[40];
  std::snprintf(text, sizeof text, " {@%zx}", static_cast<size_t>(pc - library_start()));
  return text;
}

void report(const char* kind, const Lane* lane, const std::string& text, uintptr_t pc, uintptr_t other_pc) {
  if (reports.size() >= kMaxReports || !reported.emplace(kind, pc, other_pc).second) return;
  std::string who;
  if (lane != nullptr) {
    const uint3 block = block_index();
    who = "block (" + std::to_string(block.x) + ", " + std::to_string(block.y) + ", " + std::to_string(block.z) +
          ") thread " + std::to_string(lane->number) + ": ";
  }
  reports.push_back({kind, who + text});
}

void check_launch(bool instrumented, void* memory, size_t bytes) {
  checking = instrumented;
  launch_start = block_start = ++now;
  const auto begin = reinterpret_cast<uintptr_t>(memory);
  shared = {begin, begin + bytes, "shared memory", true, std::vector<Cell>(instrumented ? bytes : 0)};
}

void check_block() { block_start = last_barrier = ++now; }

void check_barrier() { last_barrier = ++now; }

void check_warp_barrier(const Lane& lane, unsigned mask) {
  ++now;
  uint32_t joined[kWarp] = {};
  for (unsigned rest = mask; rest != 0; rest &= rest - 1) {
    const Lane& other = lane_of_warp(lane, __builtin_ctz(rest));
    for (int i = 0; i < kWarp; ++i) joined[i] = std::max(joined[i], mask >> i & 1 ? now : other.known[i]);
  }
  for (unsigned rest = mask; rest != 0; rest &= rest - 1) {
    std::copy_n(joined, kWarp, lane_of_warp(lane, __builtin_ctz(rest)).known);
  }
}

void check_copy_landed(const Lane& lane, const Copy& copy) {
  if (!checking) return;
  Cell* const cells = &shared.cells[reinterpret_cast<uintptr_t>(copy.shared) - shared.begin];
  for (int i = 0; i < 16; ++i) {
    if (cells[i].writer != lane.number) continue;  // overwritten meanwhile, and reported
    cells[i].in_flight = false;
    cells[i].written_at = now;
  }
}

void check_and_count(const Lane& lane, const void* pointer, int bytes, Access access, Kind global_kind,
                     Kind shared_kind, uintptr_t pc) {
  const bool takes_local = global_kind != Kind::kNone && shared_kind != Kind::kNone;
  if (!checking || (takes_local && is_local(lane, pointer))) return;
  const auto address = reinterpret_cast<uintptr_t>(pointer);
  const auto what = [&] {
    return (access == Access::kRead ? "read of " : "write of ") + std::to_string(bytes) + " bytes ";
  };
  Region* const region = find(address);
  if (region == nullptr || address + bytes > region->end) {
    const std::string where = region == nullptr ? nearest(address) : "across the end of " + region->name;
    report("out of bounds", &lane, what() + where + at(pc), pc);
    stop();
  }
  const Kind kind = region->is_shared ? shared_kind : global_kind;
  if (kind == Kind::kNone) {
    report("address space", &lane,
           what() + "at " + byte_of(*region, address) + at(pc) + " by an instruction for " +
               (region->is_shared ? "global" : "shared") + " memory",
           pc);
    stop();
  }
  const bool one_instruction = bytes <= 16 && (bytes & (bytes - 1)) == 0;
  if (one_instruction && address % bytes != 0) {
    report("misaligned", &lane, what() + "at " + byte_of(*region, address) + at(pc), pc);
  }
  Cell* const cells = &region->cells[address - region->begin];
  for (int i = 0; i < bytes; ++i) check_byte(lane, *region, cells[i], address + i, access, pc);
  count_access(lane, pointer, bytes, kind, pc);
}

// ---- what Python calls ----

#define GRANK_EXPORT extern "C" __attribute__((visibility("default")))

GRANK_EXPORT void emulation_forget() {
  buffers.clear();
  last_found = nullptr;
  reports.clear();
  reported.clear();
}

// Memory that kernels may access, until emulation_forget().
GRANK_EXPORT void emulation_buffer(const void* memory, size_t bytes, const char* name, bool initialised) {
  const auto begin = reinterpret_cast<uintptr_t>(memory);
  Cell cell{};
  cell.written_at = initialised ? kBeforeAll : 0;
  buffers.push_back(
      std::make_unique<Region>(Region{begin, begin + bytes, name, false, std::vector<Cell>(bytes, cell)}));
}

GRANK_EXPORT size_t emulation_num_reports() { return reports.size(); }
GRANK_EXPORT const char* emulation_report_kind(size_t i) { return reports[i].kind.c_str(); }
GRANK_EXPORT const char* emulation_report_text(size_t i) { return reports[i].text.c_str(); }

// ---- what the instrumented kernel calls ----

namespace {

void plain_access(const void* address, int bytes, Access access, void* pc) {
  if (current == nullptr) return;  // the host
  maybe_preempt();
  const bool reads = access == Access::kRead;
  check_and_count(*current, address, bytes, access, reads ? Kind::kGlobalLoad : Kind::kGlobalStore,
                  reads ? Kind::kSharedLoad : Kind::kSharedStore, reinterpret_cast<uintptr_t>(pc));
}

}  // namespace

extern "C" {

void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
void __tsan_read_range(void* address, size_t bytes) {
  plain_access(address, static_cast<int>(bytes), Access::kRead, __builtin_return_address(0));
}
void __tsan_write_range(void* address, size_t bytes) {
  plain_access(address, static_cast<int>(bytes), Access::kWrite, __builtin_return_address(0));
}

#define GRANK_HOOKS(bytes)                                                                                             \
  void __tsan_read##bytes(void* address) { plain_access(address, bytes, Access::kRead, __builtin_return_address(0)); } \
  void __tsan_write##bytes(void* address) {                                                                            \
    plain_access(address, bytes, Access::kWrite, __builtin_return_address(0));                                         \
  }                                                                                                                    \
  void __tsan_unaligned_read##bytes(void* address) {                                                                   \
    plain_access(address, bytes, Access::kRead, __builtin_return_address(0));                                          \
  }                                                                                                                    \
  void __tsan_unaligned_write##bytes(void* address) {                                                                  \
    plain_access(address, bytes, Access::kWrite, __builtin_return_address(0));                                         \
  }
GRANK_HOOKS(1)
GRANK_HOOKS(2)
GRANK_HOOKS(4)
GRANK_HOOKS(8)
GRANK_HOOKS(16)

}  // extern "C"

}  // namespace grank::emulation
