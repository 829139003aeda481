// What the parts of the emulator know of each other.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "emulator.h"

namespace grank::emulation {

constexpr int kWarp = 32;
constexpr size_t kStackBytes = 256 << 10;

enum class Rounding : int { kSequential = 0, kGroupsOf8 = 1, kGroupsOf16 = 2 };

struct Config {
  uint64_t seed;   // 0: threads in order, copies land at their wait; else both at random
  double preempt;  // probability of a switch at a memory access
  Rounding rounding;
};

// Traffic of one kind. A request is one access of a warp. Transactions are sectors of 32 bytes in global memory and
// wavefronts in shared memory; ideal is how many the same bytes need at least.
struct Traffic {
  uint64_t requests, bytes, transactions, ideal;
};

enum class Kind : int {
  kGlobalLoad,
  kGlobalStore,  // and atomics
  kSharedLoad,
  kSharedStore,  // and atomics
  kCopySource,   // cp.async, the side of global memory
  kCopyTarget,   // cp.async, the side of shared memory
  kLdmatrix,
  kNone
};

struct Counters {
  Traffic traffic[static_cast<int>(Kind::kNone)];
  uint64_t mma, barriers, atomics, blocks;
};

struct Copy {
  void* shared;
  const void* global;
  bool valid;
  unsigned group;
};

// What a lane brings to a warp's rendez-vous; it stays on the lane's stack.
struct Operands {
  Op op;
  unsigned mask;
  uintptr_t pc;
  uint64_t value;
  int argument;
  void* out;
  const void *a, *b;
};

// One CUDA thread.
struct Lane {
  uint3 index;
  int number;  // in its block
  void* stack_pointer;
  char* stack;  // its lowest byte
  bool exited;
  const char* waits_at;  // null: it can run
  uintptr_t waits_pc;
  const Operands* operands;
  std::vector<Copy> copies;  // not waited for yet
  unsigned copy_group;       // number of the group that is open
  uint32_t known[kWarp];     // what lane i of this warp did before this time comes before what this lane does now
};

// ---- scheduler.cpp ----
extern Config config;
extern Counters counters;
extern Lane* current;  // null outside of a launch

uint32_t random_bits();
Lane& lane_of_warp(const Lane& lane, int number_in_warp);
void maybe_preempt();
[[noreturn]] void stop();  // ends the launch; later launches do nothing until reset()
const char* name_of(Op op);

// ---- warp.cpp ----
// The warp of `lane` has met: does the operation for all lanes in the mask.
void execute(const Lane& lane, unsigned mask);

// ---- checker.cpp ----
enum class Access { kRead, kWrite, kAtomic, kCopy };

// Keeps one report for every kind and place (`pc`, and the other access it conflicts with). Without a lane it is about
// the launch. "{@1f3c}" in a text is a place in the code, for whoever knows the symbols; at() writes it.
void report(const char* kind, const Lane* lane, const std::string& text, uintptr_t pc = 0, uintptr_t other_pc = 0);
std::string at(uintptr_t pc);

void check_launch(bool instrumented, void* shared, size_t shared_bytes);
void check_block();    // from here on a new block runs
void check_barrier();  // all threads of the block have met
void check_warp_barrier(const Lane& lane, unsigned mask);
void check_copy_landed(const Lane& lane, const Copy& copy);
// An access that counts as `global` or `shared`, after the memory it goes to; as kNone where it must not go there. Does
// not return where it must not be made. Does nothing for kernels that are not instrumented.
void check_and_count(const Lane& lane, const void* address, int bytes, Access access, Kind global, Kind shared,
                     uintptr_t pc);

// ---- traffic.cpp ----
void count_access(const Lane& lane, const void* address, int bytes, Kind kind, uintptr_t pc);
void count_block();  // the block has ended

}  // namespace grank::emulation
