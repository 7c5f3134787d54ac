// The CUDA kernels with the face that kernel.h and ffi.h know a device by.
#ifndef STF_CUSTOM_OPS_TENSORFLOW_ATTENTION_GPU_H_
#define STF_CUSTOM_OPS_TENSORFLOW_ATTENTION_GPU_H_

#include <cuda_runtime_api.h>

#include <string>
#include <utility>

#include "custom_ops/attention/cuda/attention.h"

namespace stf {

class Gpu {
 public:
  explicit Gpu(cudaStream_t stream) : stream_(stream) {}

  // Lengths lie in device memory, where nothing looks at them before the kernels do: those cut them to 0 ... positions.
  static std::string Wrong(const stf_problem& problem) {
    constexpr int64_t kMostDepth = 256, kMostPositions = int64_t{1} << 30;
    const std::pair<const char*, int64_t> depths[] = {{"query", problem.key_depth}, {"value", problem.value_depth}};
    for (const auto& [name, depth] : depths) {
      if (depth < 1 || depth > kMostDepth)
        return std::string(name) + " must have a depth from 1 to " + std::to_string(kMostDepth) + " on the GPU. Received: " + name +
               " of depth " + std::to_string(depth);
    }
    const std::pair<const char*, int64_t> sizes[] = {{"batch", problem.batch}, {"positions", problem.positions}, {"heads", problem.heads}};
    for (const auto& [name, size] : sizes) {
      if (size >= kMostPositions)
        return "query must have fewer than " + std::to_string(kMostPositions) + " " + name +
               " on the GPU. Received: " + std::to_string(size);
    }
    return "";
  }

  // Bytes of device memory that a call needs.
  static size_t Workspace(const stf_problem& problem, bool backward) {
    return backward ? stf_attention_cuda_backward_workspace(&problem) : stf_attention_cuda_forward_workspace(&problem);
  }

  int Forward(const stf_problem& problem, const stf_tensor inputs[3], const stf_tensor& output, float* log_sum_exp, void* workspace) const {
    return stf_attention_cuda_forward(&problem, &inputs[0], &inputs[1], &inputs[2], &output, log_sum_exp, workspace, stream_);
  }

  int Backward(const stf_problem& problem, const stf_tensor inputs[3], const stf_tensor& output, const float* log_sum_exp,
               const stf_tensor& output_grad, const float* log_sum_exp_grad, const stf_tensor grads[3], void* workspace) const {
    return stf_attention_cuda_backward(&problem, &inputs[0], &inputs[1], &inputs[2], &output, log_sum_exp, &output_grad, log_sum_exp_grad,
                                       &grads[0], &grads[1], &grads[2], workspace, stream_);
  }

  static bool OutOfMemory(int error) { return error == cudaErrorMemoryAllocation; }
  static std::string Error(int error) { return std::string("StfAttention: CUDA refused a launch: ") + stf_attention_cuda_error(error); }

 private:
  cudaStream_t stream_;
};

}  // namespace stf

#endif  // STF_CUSTOM_OPS_TENSORFLOW_ATTENTION_GPU_H_
