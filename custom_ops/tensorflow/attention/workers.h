// Threads, for the CPU kernels.
#ifndef STF_CUSTOM_OPS_TENSORFLOW_ATTENTION_WORKERS_H_
#define STF_CUSTOM_OPS_TENSORFLOW_ATTENTION_WORKERS_H_

#include <algorithm>
#include <atomic>
#include <memory>
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

}  // namespace stf

#endif  // STF_CUSTOM_OPS_TENSORFLOW_ATTENTION_WORKERS_H_
