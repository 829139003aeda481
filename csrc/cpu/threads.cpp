#include "threads.h"

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

#if defined(__SSE__)
#include <xmmintrin.h>
#endif

namespace grank {
namespace {

// Default rounding, subnormals kept, on every thread: scores must not depend on the thread, nor on the caller's
// torch.set_flush_denormal.
class DefaultFloatMode {
#if defined(__SSE__)
 public:
  DefaultFloatMode() : saved_(_mm_getcsr()) { _mm_setcsr(0x1f80); }
  ~DefaultFloatMode() { _mm_setcsr(saved_); }

 private:
  unsigned saved_;
#else
 public:
  DefaultFloatMode() {}
  ~DefaultFloatMode() {}
#endif
};

struct Interrupt {
  InterruptCheck check = nullptr;
  void* context = nullptr;
  std::chrono::steady_clock::time_point last{};
};
thread_local Interrupt interrupt;

// Helpers have no check; the caller's exception ends their loop.
void check_interrupt() {
  if (interrupt.check == nullptr) return;
  const auto now = std::chrono::steady_clock::now();
  if (now - interrupt.last < std::chrono::milliseconds(50)) return;
  interrupt.last = now;
  interrupt.check(interrupt.context);
}

struct Job {
  ParallelBody body;
  void* context;
  int64_t steps;
  int helpers_wanted;            // guarded by the pool's mutex
  int helpers_inside = 0;        // guarded by the pool's mutex
  std::atomic<int64_t> next{0};  // the next step
  std::atomic<bool> failed{false};
  std::exception_ptr failure{};  // the first one

  void work(int worker) {
    const DefaultFloatMode mode;
    try {
      for (int64_t step; (step = next.fetch_add(1, std::memory_order_relaxed)) < steps;) {
        body(context, step, worker);
        check_interrupt();
      }
    } catch (...) {
      if (!failed.exchange(true)) failure = std::current_exception();
      next = steps;
    }
  }
};

class Pool {
 public:
  void run(Job& job) {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      grow(job.helpers_wanted);
      jobs_.push_back(&job);
    }
    wake_.notify_all();
    job.work(0);
    std::unique_lock<std::mutex> lock(mutex_);
    jobs_.erase(std::find(jobs_.begin(), jobs_.end(), &job));
    done_.wait(lock, [&] { return job.helpers_inside == 0; });
  }

  std::mutex& mutex() { return mutex_; }

 private:
  void grow(int helpers) {
    try {
      for (; helpers_ < helpers; ++helpers_) std::thread([this] { help(); }).detach();
    } catch (const std::system_error&) {
      // No more threads available: the caller and the existing helpers run all steps.
    }
  }

  void help() {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      Job* job = nullptr;
      wake_.wait(lock, [&] { return (job = find_work()) != nullptr; });
      const int worker = job->helpers_wanted--;  // unique per helper of a job; the caller is worker 0
      ++job->helpers_inside;
      lock.unlock();
      job->work(worker);
      lock.lock();
      if (--job->helpers_inside == 0) done_.notify_all();
    }
  }

  Job* find_work() {
    for (Job* job : jobs_) {
      if (job->helpers_wanted > 0 && job->next.load(std::memory_order_relaxed) < job->steps) return job;
    }
    return nullptr;
  }

  std::mutex mutex_;
  std::condition_variable wake_, done_;
  std::vector<Job*> jobs_;
  int helpers_ = 0;
};

Pool* pool;  // never deleted: its threads are detached

// fork() copies only the calling thread, so the child starts with a new pool.
void make_pool() { pool = new Pool; }
void before_fork() { pool->mutex().lock(); }
void after_fork_in_parent() { pool->mutex().unlock(); }

void run_with_helpers(Job& job) {
  static const bool ready = [] {
    make_pool();
    pthread_atfork(before_fork, after_fork_in_parent, make_pool);
    return true;
  }();
  (void)ready;
  pool->run(job);
}

}  // namespace

InterruptScope::InterruptScope(InterruptCheck check, void* context) {
  interrupt = {check, context, std::chrono::steady_clock::now()};
}
InterruptScope::~InterruptScope() { interrupt = {}; }

void parallel_for(int threads, int64_t steps, ParallelBody body, void* context) {
  Job job{body, context, steps, static_cast<int>(std::min<int64_t>(threads, steps)) - 1};
  job.helpers_wanted > 0 ? run_with_helpers(job) : job.work(0);
  if (job.failure) std::rethrow_exception(job.failure);
}

}  // namespace grank
