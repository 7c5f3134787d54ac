// Host time of the CUDA kernels' entry points: many calls in a row, timed together.
#include <chrono>

#include "custom_ops/attention/cuda/attention.h"

namespace {

template <typename Call>
double Seconds(int calls, Call call) {
  const auto begin = std::chrono::steady_clock::now();
  for (int i = 0; i < calls; i++) {
    if (call() != 0) return -1;
  }
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
}

}  // namespace

extern "C" double stf_forward_seconds(int calls, decltype(stf_attention_cuda_forward)* forward, const stf_problem* problem,
                                      const stf_tensor* query, const stf_tensor* key, const stf_tensor* value, const stf_tensor* output,
                                      float* log_sum_exp, void* workspace, void* stream) {
  return Seconds(calls, [&] { return forward(problem, query, key, value, output, log_sum_exp, workspace, stream); });
}

extern "C" double stf_backward_seconds(int calls, decltype(stf_attention_cuda_backward)* backward, const stf_problem* problem,
                                       const stf_tensor* query, const stf_tensor* key, const stf_tensor* value, const stf_tensor* output,
                                       const float* log_sum_exp, const stf_tensor* output_grad, const float* log_sum_exp_grad,
                                       const stf_tensor* query_grad, const stf_tensor* key_grad, const stf_tensor* value_grad,
                                       void* workspace, void* stream) {
  return Seconds(calls, [&] {
    return backward(problem, query, key, value, output, log_sum_exp, output_grad, log_sum_exp_grad, query_grad, key_grad, value_grad,
                    workspace, stream);
  });
}
