// The attention op and its gradient on the GPU: checks, allocation, launch on the op's stream. Compiled where the CUDA kernels are.
#include <cuda_runtime_api.h>

#define EIGEN_USE_GPU
#include "custom_ops/attention/cuda/attention.h"
#include "custom_ops/tensorflow/attention_call.h"
#include "tensorflow/core/platform/mutex.h"

namespace stf {
namespace {

using tensorflow::OpKernelConstruction;
using tensorflow::OpKernelContext;
using tensorflow::Tensor;
using tensorflow::TensorShape;

absl::Status Launched(int error) {
  if (error == cudaSuccess) return absl::OkStatus();
  return tensorflow::errors::Internal("StfAttention: CUDA refused a launch: ", stf_attention_cuda_error(error));
}

// Reads and checks, for the GPU. Lengths lie in device memory, where nothing looks at them before the kernels do: those cut them to
// 0 ... positions.
template <typename T>
class AttentionGpuBase : public AttentionBase<T> {
 public:
  using AttentionBase<T>::AttentionBase;

 protected:
  absl::Status Prepare(OpKernelContext* context, stf_problem* problem) {
    TF_RETURN_IF_ERROR(this->Read(context, problem));
    TF_RETURN_IF_ERROR(CheckForGpu(*problem));
    return CopyLayouts(context, problem);
  }

  cudaStream_t Stream(OpKernelContext* context) const { return context->eigen_gpu_device().stream(); }

  absl::Status Workspace(OpKernelContext* context, size_t bytes, Tensor* workspace) const {
    return context->allocate_temp(tensorflow::DT_INT8, TensorShape({static_cast<int64_t>(bytes)}), workspace);
  }

 private:
  // Block layouts go to the device once for each kernel.
  absl::Status CopyLayouts(OpKernelContext* context, stf_problem* problem) {
    problem->layouts = nullptr;
    const std::string& bits = this->layouts();
    if (bits.empty()) return absl::OkStatus();
    tensorflow::mutex_lock lock(mutex_);
    if (!copied_) {
      TF_RETURN_IF_ERROR(context->allocate_temp(tensorflow::DT_UINT8, TensorShape({static_cast<int64_t>(bits.size())}), &layouts_));
      TF_RETURN_IF_ERROR(
          Launched(cudaMemcpyAsync(layouts_.flat<uint8_t>().data(), bits.data(), bits.size(), cudaMemcpyHostToDevice, Stream(context))));
      copied_ = true;
    }
    problem->layouts = layouts_.flat<uint8_t>().data();
    return absl::OkStatus();
  }

  tensorflow::mutex mutex_;
  Tensor layouts_ TF_GUARDED_BY(mutex_);
  bool copied_ TF_GUARDED_BY(mutex_) = false;
};

template <typename T>
class AttentionGpu : public AttentionGpuBase<T> {
 public:
  using AttentionGpuBase<T>::AttentionGpuBase;

  void Compute(OpKernelContext* context) override {
    stf_problem problem;
    OP_REQUIRES_OK(context, this->Prepare(context, &problem));
    Tensor *output, *log_sum_exp, workspace;
    OP_REQUIRES_OK(context, context->allocate_output(0, context->input(2).shape(), &output));
    OP_REQUIRES_OK(context, context->allocate_output(1, TensorShape({problem.batch, problem.heads, problem.positions}), &log_sum_exp));
    OP_REQUIRES_OK(context, this->Workspace(context, stf_attention_cuda_forward_workspace(&problem), &workspace));
    const stf_tensor query = Strided(context->input(0)), key = Strided(context->input(1)), value = Strided(context->input(2));
    const stf_tensor out = Strided(*output);
    OP_REQUIRES_OK(context, Launched(stf_attention_cuda_forward(&problem, &query, &key, &value, &out, log_sum_exp->flat<float>().data(),
                                                                workspace.data(), this->Stream(context))));
  }
};

template <typename T>
class AttentionGradGpu : public AttentionGpuBase<T> {
 public:
  using AttentionGpuBase<T>::AttentionGpuBase;

  void Compute(OpKernelContext* context) override {
    stf_problem problem;
    OP_REQUIRES_OK(context, this->Prepare(context, &problem));
    Tensor *grads[3], workspace;
    stf_tensor inputs[3], outputs[3];
    for (int i = 0; i < 3; i++) {
      OP_REQUIRES_OK(context, context->allocate_output(i, context->input(i).shape(), &grads[i]));
      inputs[i] = Strided(context->input(i));
      outputs[i] = Strided(*grads[i]);
    }
    OP_REQUIRES_OK(context, this->Workspace(context, stf_attention_cuda_backward_workspace(&problem), &workspace));
    const stf_tensor out = Strided(context->input(4)), out_grad = Strided(context->input(6));
    OP_REQUIRES_OK(context, Launched(stf_attention_cuda_backward(&problem, &inputs[0], &inputs[1], &inputs[2], &out,
                                                                 context->input(5).template flat<float>().data(), &out_grad,
                                                                 context->input(7).template flat<float>().data(), &outputs[0], &outputs[1],
                                                                 &outputs[2], workspace.data(), this->Stream(context))));
  }
};

#define STF_REGISTER(T)                                                                                                 \
  REGISTER_KERNEL_BUILDER(Name("StfAttention").Device(tensorflow::DEVICE_GPU).TypeConstraint<T>("T"), AttentionGpu<T>); \
  REGISTER_KERNEL_BUILDER(Name("StfAttentionGrad").Device(tensorflow::DEVICE_GPU).TypeConstraint<T>("T"), AttentionGradGpu<T>)

STF_REGISTER(float);
STF_REGISTER(tensorflow::bfloat16);
STF_REGISTER(Eigen::half);
#undef STF_REGISTER

}  // namespace
}  // namespace stf
