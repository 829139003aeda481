// Launches, blocks, and the fibers of a block: who runs next, and who waits for whom.
#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <map>
#include <numeric>
#include <utility>

#include "fiber.h"
#include "runtime.h"

namespace grank::emulation {

Config config{};
Counters counters{};
Lane* current = nullptr;

namespace {

constexpr size_t kPage = 64 << 10;  // the largest page of any aarch64 kernel
constexpr unsigned kMaxThreads = 1024, kMaxGridYZ = 65535;
constexpr size_t kMaxSharedBytes = 163 << 10;  // what a block may have on sm_80

// Lanes of a warp that have come to the same operation with the same mask.
struct Meeting {
  Op op;
  unsigned mask, arrived;
};

struct Warp {
  unsigned ready;  // lanes that can run
  std::vector<Meeting> meetings;
};

std::vector<Lane> lanes;
std::vector<Warp> warps;
unsigned at_barrier;  // threads that wait at __syncthreads
dim3 grid_dim, block_dim;
uint3 block;
unsigned char* shared_memory;
void* launcher;  // stack pointer of whoever called run()
void (*kernel)(const void*);
const void* kernel_context;
bool stopped;
uint64_t random_state;

char* stack_of(unsigned thread) {
  static char* const stacks = [] {
    void* memory = mmap(nullptr, kMaxThreads * kStackBytes, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) std::abort();
    for (unsigned i = 0; i < kMaxThreads; ++i) {  // a stack that grows too far must fault, not run into its neighbour
      if (mprotect(static_cast<char*>(memory) + i * kStackBytes, kPage, PROT_NONE) != 0) std::abort();
    }
    return static_cast<char*>(memory);
  }();
  return stacks + thread * kStackBytes;
}

unsigned bit(const Lane& lane) { return 1u << (lane.number % kWarp); }
Warp& warp_of(const Lane& lane) { return warps[lane.number / kWarp]; }

void switch_to(Lane& next) {
  if (&next == current) return;
  void** const save = &std::exchange(current, &next)->stack_pointer;
  grank_emulation_switch(save, next.stack_pointer);
}

Lane* lane_in(size_t warp, unsigned lanes_of_it) { return &lanes[warp * kWarp + __builtin_ctz(lanes_of_it)]; }

// Who runs next: in order, first within the warp; or by chance, mostly within the warp. Null: nobody can.
Lane* next_lane() {
  const size_t own = current->number / kWarp;
  const bool stay = config.seed == 0 || random_bits() % 4 != 0;
  const size_t first = stay ? own : random_bits() % warps.size();
  for (size_t i = 0; i < warps.size(); ++i) {
    const size_t warp = (first + i) % warps.size();
    unsigned ready = warps[warp].ready;
    if (ready == 0) continue;
    if (config.seed != 0) {
      for (int skip = random_bits() % __builtin_popcount(ready); skip > 0; --skip) ready &= ready - 1;
    } else if (i == 0) {
      const unsigned behind = ready & ~(bit(*current) | (bit(*current) - 1));
      if (behind != 0) ready = behind;
    }
    return lane_in(warp, ready);
  }
  return nullptr;
}

[[noreturn]] void report_deadlock() {
  std::map<std::string, std::vector<int>> waiting;
  for (const Lane& lane : lanes) {
    const std::string state = lane.exited ? "have exited" : std::string("wait at ") + lane.waits_at + at(lane.waits_pc);
    waiting[state].push_back(lane.number);
  }
  std::string text = "threads cannot meet: ";
  for (const auto& [state, threads] : waiting) {
    if (&state != &waiting.begin()->first) text += "; ";
    text += std::to_string(threads.size()) + " (" + std::to_string(threads.front()) + " to " +
            std::to_string(threads.back()) + ") " + state;
  }
  report("divergence", current, text);
  stop();
}

void wait_at(const char* what, uintptr_t pc) {
  current->waits_at = what;
  current->waits_pc = pc;
  warp_of(*current).ready &= ~bit(*current);
  Lane* const next = next_lane();
  if (next == nullptr) report_deadlock();
  switch_to(*next);
}

void meet(const Operands& operands) {
  Lane& lane = *current;
  Warp& warp = warp_of(lane);
  if ((operands.mask & bit(lane)) == 0) {
    report("divergence", &lane,
           std::string(name_of(operands.op)) + " by a lane that its mask does not name" + at(operands.pc));
    stop();
  }
  lane.operands = &operands;
  Meeting* meeting = nullptr;
  for (Meeting& other : warp.meetings) {
    if (other.op == operands.op && other.mask == operands.mask) meeting = &other;
  }
  if (meeting == nullptr) {
    warp.meetings.push_back({operands.op, operands.mask, 0});
    meeting = &warp.meetings.back();
  }
  meeting->arrived |= bit(lane);
  if (meeting->arrived != operands.mask) return wait_at(name_of(operands.op), operands.pc);
  *meeting = warp.meetings.back();
  warp.meetings.pop_back();
  execute(lane, operands.mask);
  warp.ready |= operands.mask;
}

void thread_main() {
  kernel(kernel_context);
  Lane& lane = *current;
  if (!lane.copies.empty()) report("cp.async", &lane, "exits and has not waited for its copies");
  lane.exited = true;
  warp_of(lane).ready &= ~bit(lane);
  if (Lane* const next = next_lane()) switch_to(*next);
  for (const Lane& other : lanes) {
    if (!other.exited) report_deadlock();
  }
  grank_emulation_switch(&lane.stack_pointer, launcher);
  std::abort();  // nobody switches back
}

void run_block() {
  at_barrier = 0;
  for (Warp& warp : warps) warp = {};
  for (Lane& lane : lanes) {
    const unsigned number = lane.number, x = block_dim.x, y = block_dim.y;
    lane.index = {number % x, number / x % y, number / x / y};
    lane.exited = false;
    lane.waits_at = nullptr;
    lane.copies.clear();
    lane.copy_group = 0;
    std::fill_n(lane.known, kWarp, 0);
    // Tops at different offsets, or all stacks would compete for the same sets of the cache.
    lane.stack_pointer = new_stack(lane.stack + kStackBytes - number % 64 * 1088, thread_main);
    warp_of(lane).ready |= bit(lane);
  }
  ++counters.blocks;
  check_block();
  current = &lanes[0];
  if (config.seed != 0) current = next_lane();
  grank_emulation_switch(&launcher, current->stack_pointer);
  current = nullptr;
  count_block();
}

bool can_launch(size_t threads, size_t shared_bytes) {
  std::string why;
  if (grid_dim.x == 0 || grid_dim.y == 0 || grid_dim.z == 0) why = "the grid is empty";
  if (grid_dim.y > kMaxGridYZ || grid_dim.z > kMaxGridYZ) why = "more than 65535 blocks along y or z";
  if (threads == 0 || threads > kMaxThreads) why = std::to_string(threads) + " threads in a block, 1 to 1024 can be";
  if (shared_bytes > kMaxSharedBytes) {
    why = std::to_string(shared_bytes) + " bytes of shared memory, sm_80 has " + std::to_string(kMaxSharedBytes);
  }
  if (!why.empty()) report("launch", nullptr, why);
  return why.empty();
}

}  // namespace

uint32_t random_bits() {
  random_state ^= random_state << 13;
  random_state ^= random_state >> 7;
  random_state ^= random_state << 17;
  return static_cast<uint32_t>(random_state >> 20);
}

Lane& lane_of_warp(const Lane& lane, int number_in_warp) { return lanes[lane.number / kWarp * kWarp + number_in_warp]; }

void maybe_preempt() {
  if (config.preempt > 0 && (random_bits() & 0xffff) < config.preempt * 65536) switch_to(*next_lane());
}

void stop() {
  stopped = true;
  grank_emulation_switch(&current->stack_pointer, launcher);
  std::abort();  // nobody switches back
}

const char* name_of(Op op) {
  constexpr const char* kNames[] = {"__shfl_sync", "__shfl_xor_sync", "__ballot_sync",  "__any_sync", "__all_sync",
                                    "__syncwarp",  "ldmatrix",        "ldmatrix.trans", "mma.f16",    "mma.bf16"};
  return kNames[static_cast<int>(op)];
}

const uint3& thread_index() { return current->index; }
const uint3& block_index() { return block; }
const dim3& block_size() { return block_dim; }
const dim3& grid_size() { return grid_dim; }
unsigned char* dynamic_shared() { return shared_memory; }

void sync_threads() {
  if (++at_barrier < lanes.size()) {
    return wait_at("__syncthreads", reinterpret_cast<uintptr_t>(__builtin_return_address(0)));
  }
  at_barrier = 0;
  ++counters.barriers;
  check_barrier();
  for (Lane& lane : lanes) warp_of(lane).ready |= bit(lane);
}

void sync_warp(unsigned mask) {
  meet(
      {Op::kSyncWarp, mask, reinterpret_cast<uintptr_t>(__builtin_return_address(0)), 0, 0, nullptr, nullptr, nullptr});
}

uint64_t shuffle(Op op, unsigned mask, uint64_t value, int argument) {
  uint64_t out = 0;
  meet({op, mask, reinterpret_cast<uintptr_t>(__builtin_return_address(0)), value, argument, &out, nullptr, nullptr});
  return out;
}

unsigned vote(Op op, unsigned mask, bool predicate) {
  unsigned out = 0;
  meet({op, mask, reinterpret_cast<uintptr_t>(__builtin_return_address(0)), predicate, 0, &out, nullptr, nullptr});
  return out;
}

void ldmatrix_x4(Op op, uint32_t* registers, const void* row) {
  meet({op, ~0u, reinterpret_cast<uintptr_t>(__builtin_return_address(0)), 0, 0, registers, row, nullptr});
}

void mma_m16n8k16(Op op, float* d, const uint32_t* a, const uint32_t* b) {
  meet({op, ~0u, reinterpret_cast<uintptr_t>(__builtin_return_address(0)), 0, 0, d, a, b});
}

void run(dim3 grid, dim3 block_shape, size_t shared_bytes, bool instrumented, void (*body)(const void*),
         const void* context) {
  if (stopped) return;
  grid_dim = grid;
  block_dim = block_shape;
  kernel = body;
  kernel_context = context;
  random_state = config.seed * 0x9e3779b97f4a7c15u + 1;
  const size_t threads = size_t{block_shape.x} * block_shape.y * block_shape.z;
  if (!can_launch(threads, shared_bytes)) {
    stopped = true;
    return;
  }
  lanes = std::vector<Lane>(threads);
  for (unsigned i = 0; i < threads; ++i) {
    lanes[i].number = i;
    lanes[i].stack = stack_of(i);
  }
  warps = std::vector<Warp>((threads + kWarp - 1) / kWarp);
  std::vector<unsigned char> memory(shared_bytes + 128);
  shared_memory = memory.data() + (-reinterpret_cast<uintptr_t>(memory.data()) & 127);
  check_launch(instrumented, shared_memory, shared_bytes);

  std::vector<size_t> order(size_t{grid.x} * grid.y * grid.z);
  std::iota(order.begin(), order.end(), size_t{0});
  for (size_t i = 0; i < order.size() && !stopped; ++i) {
    if (config.seed != 0) std::swap(order[i], order[i + random_bits() % (order.size() - i)]);
    block = {static_cast<unsigned>(order[i] % grid.x), static_cast<unsigned>(order[i] / grid.x % grid.y),
             static_cast<unsigned>(order[i] / grid.x / grid.y)};
    std::memset(shared_memory, 0xff, shared_bytes);  // NaN, or -1
    run_block();
  }
}

// ---- what Python calls ----

extern "C" __attribute__((visibility("default"))) void emulation_reset(const Config* settings) {
  config = *settings;
  counters = {};
  stopped = false;
}

extern "C" __attribute__((visibility("default"))) const Counters* emulation_counters() { return &counters; }

}  // namespace grank::emulation
