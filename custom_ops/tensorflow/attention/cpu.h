// The CPU's kernels with the face that kernel.h and ffi.h know a device by.
#ifndef STF_CUSTOM_OPS_TENSORFLOW_ATTENTION_CPU_H_
#define STF_CUSTOM_OPS_TENSORFLOW_ATTENTION_CPU_H_

#include <string>

#include "custom_ops/attention/cpu/attention.h"
#include "custom_ops/tensorflow/attention/workers.h"

namespace stf {

// On the threads of a pool: see Workers.
template <typename Pool>
class Cpu {
 public:
  Cpu(Pool* pool, int threads) : workers_(pool, threads) {}

  // What is wrong with a problem, or nothing: with the first length that does not fit.
  static std::string Wrong(const stf_problem& problem) {
    for (int64_t i = 0; problem.lengths && i < problem.batch; i++) {
      if (problem.lengths[i] < 0 || problem.lengths[i] > problem.positions)
        return "lengths must be from 0 to " + std::to_string(problem.positions) + ". Received: lengths[" + std::to_string(i) +
               "]=" + std::to_string(problem.lengths[i]);
    }
    return "";
  }

  // The kernels see to their memory themselves.
  static size_t Workspace(const stf_problem&, bool) { return 0; }

  int Forward(const stf_problem& problem, const stf_tensor inputs[3], const stf_tensor& output, float* log_sum_exp, void*) const {
    return stf_attention_cpu_forward(&problem, &inputs[0], &inputs[1], &inputs[2], &output, log_sum_exp, workers_.get());
  }

  int Backward(const stf_problem& problem, const stf_tensor inputs[3], const stf_tensor& output, const float* log_sum_exp,
               const stf_tensor& output_grad, const float* log_sum_exp_grad, const stf_tensor grads[3], void*) const {
    return stf_attention_cpu_backward(&problem, &inputs[0], &inputs[1], &inputs[2], &output, log_sum_exp, &output_grad, log_sum_exp_grad,
                                      &grads[0], &grads[1], &grads[2], workers_.get());
  }

  // What Forward and Backward returned that was not 0: whether memory was short, and words.
  static bool OutOfMemory(int) { return true; }
  static std::string Error(int) { return "StfAttention: no memory for the CPU kernels' scratch"; }

 private:
  Workers<Pool> workers_;
};

}  // namespace stf

#endif  // STF_CUSTOM_OPS_TENSORFLOW_ATTENTION_CPU_H_
