// A small pool of threads that several callers may use at once and that survives fork().
#pragma once

#include <cstdint>

namespace grank {

// Called by parallel_for between two steps of the calling thread, at most every 50 ms; it may throw to end the loop.
using InterruptCheck = void (*)(void* context);

// Sets the check of this thread while it lives.
class InterruptScope {
 public:
  InterruptScope(InterruptCheck check, void* context);
  ~InterruptScope();
  InterruptScope(const InterruptScope&) = delete;
  InterruptScope& operator=(const InterruptScope&) = delete;
};

// One step of a parallel loop: `worker` in [0, threads) names the scratch memory it may use.
using ParallelBody = void (*)(void* context, int64_t step, int worker);

// Runs body(context, step, worker) once for every step in [0, steps), on the caller and at most threads - 1 helpers.
// Steps are handed out in ascending order. Returns when all are done. Where one throws, those that are not begun are
// left out, and its exception is the caller's.
void parallel_for(int threads, int64_t steps, ParallelBody body, void* context);

template <typename F>
void parallel_for(int threads, int64_t steps, F&& body) {
  parallel_for(threads, steps, [](void* f, int64_t step, int worker) { (*static_cast<F*>(f))(step, worker); }, &body);
}

}  // namespace grank
