// What the CPU kernels need of whoever calls them: threads, and a look at lengths.
#ifndef STF_CUSTOM_OPS_TENSORFLOW_ATTENTION_WORKERS_H_
#define STF_CUSTOM_OPS_TENSORFLOW_ATTENTION_WORKERS_H_

#include <algorithm>
#include <atomic>
#include <memory>
#include <string>
#include <thread>

#include "custom_ops/attention/cpu/attention.h"

namespace stf {

// A pool of threads, anything with Schedule(function), as the kernels' stf_parallel. The calling thread works too, and runs whatever the
// pool has not begun, so that a pool that is busy (or whose thread this is) delays nothing.
template <typename Pool>
class Workers {
 public:
  Workers(Pool* pool, int threads) : pool_(pool), parallel_{this, &Workers::Run, std::max(1, threads)} {}
  const stf_parallel* get() const { return &parallel_; }

 private:
  struct Job {
    Job(int32_t workers, void (*body)(void*, int32_t), void* argument) : workers(workers), body(body), argument(argument) {}
    const int32_t workers;
    void (*const body)(void*, int32_t);
    void* const argument;
    std::atomic<int32_t> next{0}, ended{0};

    // Takes one body that nobody has; false where all are taken.
    bool RunOne() {
      const int32_t worker = next.fetch_add(1);
      if (worker >= workers) return false;
      body(argument, worker);
      ended.fetch_add(1, std::memory_order_release);
      return true;
    }
  };

  static void Run(void* context, int32_t workers, void (*body)(void*, int32_t), void* argument) {
    auto job = std::make_shared<Job>(workers, body, argument);
    for (int32_t i = 1; i < workers; i++) {
      static_cast<Workers*>(context)->pool_->Schedule([job] { job->RunOne(); });
    }
    while (job->RunOne()) {
    }
    while (job->ended.load(std::memory_order_acquire) < workers) std::this_thread::yield();
  }

  Pool* pool_;
  stf_parallel parallel_;
};

// What is wrong with the first length that does not fit, or nothing. For lengths in host memory.
inline std::string WrongLength(const stf_problem& problem) {
  for (int64_t i = 0; problem.lengths && i < problem.batch; i++) {
    if (problem.lengths[i] < 0 || problem.lengths[i] > problem.positions)
      return "lengths must be from 0 to " + std::to_string(problem.positions) + ". Received: lengths[" + std::to_string(i) +
             "]=" + std::to_string(problem.lengths[i]);
  }
  return "";
}

}  // namespace stf

#endif  // STF_CUSTOM_OPS_TENSORFLOW_ATTENTION_WORKERS_H_
