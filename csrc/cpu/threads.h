// A thread pool for concurrent callers, safe to use after fork().
#pragma once

#include <cstdint>

namespace grank {

// Called by parallel_for on the calling thread between two steps, at most every 50 ms; may throw to end the loop.
using InterruptCheck = void (*)(void* context);

// Installs the calling thread's check for the lifetime of the object.
class InterruptScope {
 public:
  InterruptScope(InterruptCheck check, void* context);
  ~InterruptScope();
  InterruptScope(const InterruptScope&) = delete;
  InterruptScope& operator=(const InterruptScope&) = delete;
};

// One step of a parallel loop. `worker` in [0, threads): index for per-thread scratch memory.
using ParallelBody = void (*)(void* context, int64_t step, int worker);

// Runs body(context, step, worker) once per step in [0, steps), on the caller and at most threads - 1 helpers; steps
// start in ascending order. Blocks until all are done. The first exception cancels the steps not yet started and is
// rethrown.
void parallel_for(int threads, int64_t steps, ParallelBody body, void* context);

template <typename F>
void parallel_for(int threads, int64_t steps, F&& body) {
  parallel_for(threads, steps, [](void* f, int64_t step, int worker) { (*static_cast<F*>(f))(step, worker); }, &body);
}

}  // namespace grank
