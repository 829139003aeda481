// What emulated kernels call: every CUDA thread is a fiber, and what threads do together is a rendez-vous of fibers.
// emulated_primitives.h dresses these functions in CUDA's names.
//
// A launch runs its blocks one after another, all fibers on the calling thread. Random scheduling, preemption and early
// copies follow from Config::seed alone, so that every run can be repeated.
#pragma once

#include <cstddef>
#include <cstdint>

struct uint3 {
  unsigned x, y, z;
};

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace grank::emulation {

// ---- where a thread is ----
// References: in (c ? a : b)[block_index().x] GCC 12 makes a temporary only if c holds.
const uint3& thread_index();
const uint3& block_index();
const dim3& block_size();
const dim3& grid_size();
unsigned char* dynamic_shared();

// ---- what threads do together ----
enum class Op { kShuffle, kShuffleXor, kBallot, kAny, kAll, kSyncWarp, kLdmatrix, kLdmatrixTrans, kMmaF16, kMmaBf16 };

void sync_threads();
void sync_warp(unsigned mask);
uint64_t shuffle(Op op, unsigned mask, uint64_t value, int argument);  // the source lane, or what to xor with
unsigned vote(Op op, unsigned mask, bool predicate);
void ldmatrix_x4(Op op, uint32_t* registers, const void* row);
void mma_m16n8k16(Op op, float* d, const uint32_t* a, const uint32_t* b);

// ---- memory ----
// The bytes land when they are waited for or, by the seed, at once; nobody may touch them before the wait.
void cp_async_16(void* shared, const void* global, bool valid);
void cp_async_commit();
void cp_async_wait(int pending);
void load(void* to, const void* from, int bytes);   // one vector access
void store(void* to, const void* from, int bytes);  // one vector access
void atomic(const void* address, int bytes);        // says that the caller now reads and writes there, atomically
void copy_unseen(void* to, const void* from, int bytes);

// ---- approximate functions, off by their documented error where Config::rounding is not kSequential ----
float exp2_approx(float x);
float log2_approx(float x);
float rcp_approx(float x);

// Runs body(context) once a thread. Instrumented: the kernel's plain accesses reach the checker too.
void run(dim3 grid, dim3 block, size_t shared_bytes, bool instrumented, void (*body)(const void*), const void* context);

}  // namespace grank::emulation
