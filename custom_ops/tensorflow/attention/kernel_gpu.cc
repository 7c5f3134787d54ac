// The attention op and its gradient on the GPU: checks, allocation, launch on the op's stream. Compiled where the CUDA kernels are.
#include <cuda_runtime_api.h>

#define EIGEN_USE_GPU
#include "custom_ops/attention/cuda/attention.h"
#include "custom_ops/tensorflow/attention/kernel.h"

namespace stf {
namespace {

using tensorflow::OpKernelContext;
using tensorflow::Tensor;
using tensorflow::TensorShape;

absl::Status Launched(int error) {
  if (error == cudaSuccess) return absl::OkStatus();
  return tensorflow::errors::Internal("StfAttention: CUDA refused a launch: ", stf_attention_cuda_error(error));
}

// Reads and checks, for the GPU. Lengths lie in device memory, where nothing looks at them before the kernels do: those cut them to
// 0 ... positions.
template <typename T, bool kPacked>
class AttentionGpuBase : public AttentionBase<T, kPacked> {
 public:
  using AttentionBase<T, kPacked>::AttentionBase;

 protected:
  absl::Status Prepare(OpKernelContext* context, stf_problem* problem) const {
    TF_RETURN_IF_ERROR(this->Read(context, problem));
    return CheckForGpu(*problem);
  }

  cudaStream_t Stream(OpKernelContext* context) const { return context->eigen_gpu_device().stream(); }

  absl::Status Workspace(OpKernelContext* context, size_t bytes, Tensor* workspace) const {
    return context->allocate_temp(tensorflow::DT_INT8, TensorShape({static_cast<int64_t>(bytes)}), workspace);
  }
};

template <typename T, bool kPacked>
class AttentionGpu : public AttentionGpuBase<T, kPacked> {
 public:
  using AttentionGpuBase<T, kPacked>::AttentionGpuBase;

  void Compute(OpKernelContext* context) override {
    stf_problem problem;
    OP_REQUIRES_OK(context, this->Prepare(context, &problem));
    stf_tensor inputs[3], output;
    float* log_sum_exp;
    Tensor workspace;
    this->Inputs(context, problem, inputs);
    OP_REQUIRES_OK(context, this->Outputs(context, problem, &output, &log_sum_exp));
    OP_REQUIRES_OK(context, this->Workspace(context, stf_attention_cuda_forward_workspace(&problem), &workspace));
    OP_REQUIRES_OK(context, Launched(stf_attention_cuda_forward(&problem, &inputs[0], &inputs[1], &inputs[2], &output, log_sum_exp,
                                                                workspace.data(), this->Stream(context))));
  }
};

template <typename T, bool kPacked>
class AttentionGradGpu : public AttentionGpuBase<T, kPacked> {
 public:
  using AttentionGpuBase<T, kPacked>::AttentionGpuBase;

  void Compute(OpKernelContext* context) override {
    stf_problem problem;
    OP_REQUIRES_OK(context, this->Prepare(context, &problem));
    stf_tensor inputs[3], grads[3];
    Tensor workspace;
    this->Inputs(context, problem, inputs);
    OP_REQUIRES_OK(context, this->Gradients(context, problem, grads));
    OP_REQUIRES_OK(context, this->Workspace(context, stf_attention_cuda_backward_workspace(&problem), &workspace));
    const stf_tensor output = this->Output(context), output_grad = this->OutputGrad(context);
    OP_REQUIRES_OK(context, Launched(stf_attention_cuda_backward(
                                &problem, &inputs[0], &inputs[1], &inputs[2], &output, this->LogSumExp(context), &output_grad,
                                this->LogSumExpGrad(context), &grads[0], &grads[1], &grads[2], workspace.data(), this->Stream(context))));
  }
};

#define STF_REGISTER_KERNEL(name, T, ...) \
  REGISTER_KERNEL_BUILDER(Name(name).Device(tensorflow::DEVICE_GPU).TypeConstraint<T>("T"), __VA_ARGS__)
#define STF_REGISTER(T)                                                   \
  STF_REGISTER_KERNEL("StfAttention", T, AttentionGpu<T, false>);         \
  STF_REGISTER_KERNEL("StfAttentionGrad", T, AttentionGradGpu<T, false>); \
  STF_REGISTER_KERNEL("StfPackedAttention", T, AttentionGpu<T, true>);    \
  STF_REGISTER_KERNEL("StfPackedAttentionGrad", T, AttentionGradGpu<T, true>)

STF_REGISTER(float);
STF_REGISTER(tensorflow::bfloat16);
STF_REGISTER(Eigen::half);
#undef STF_REGISTER
#undef STF_REGISTER_KERNEL

}  // namespace
}  // namespace stf
