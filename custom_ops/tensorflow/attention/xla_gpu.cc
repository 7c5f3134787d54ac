// The op under XLA on the GPU.
#include "custom_ops/attention/cuda/attention.h"
#include "custom_ops/tensorflow/attention/xla.h"

namespace stf {
namespace {

struct Gpu {
  static absl::Status Check(const stf_problem& problem) { return CheckForGpu(problem); }
  static int64_t Workspace(const stf_problem& problem, bool gradient) {
    return gradient ? stf_attention_cuda_backward_workspace(&problem) : stf_attention_cuda_forward_workspace(&problem);
  }
};

STF_REGISTER_XLA("XLA_GPU_JIT", Gpu);

}  // namespace
}  // namespace stf
