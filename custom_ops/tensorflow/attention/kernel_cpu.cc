// The attention op and its gradient on the CPU: checks, allocation, launch.
#include "custom_ops/attention/cpu/attention.h"
#include "custom_ops/tensorflow/attention/kernel.h"
#include "custom_ops/tensorflow/attention/workers.h"
#include "tensorflow/core/lib/core/threadpool.h"

namespace stf {
namespace {

using tensorflow::OpKernelContext;

absl::Status Launched(int error) {
  if (error == 0) return absl::OkStatus();
  return tensorflow::errors::ResourceExhausted("StfAttention: no memory for the CPU kernels' scratch");
}

template <typename T, bool kPacked>
class AttentionCpu : public AttentionBase<T, kPacked> {
 public:
  using AttentionBase<T, kPacked>::AttentionBase;

  void Compute(OpKernelContext* context) override {
    stf_problem problem;
    OP_REQUIRES_OK(context, this->Read(context, &problem));
    const std::string wrong = WrongLength(problem);
    OP_REQUIRES(context, wrong.empty(), tensorflow::errors::InvalidArgument(wrong));
    stf_tensor inputs[3], output;
    float* log_sum_exp;
    this->Inputs(context, problem, inputs);
    OP_REQUIRES_OK(context, this->Outputs(context, problem, &output, &log_sum_exp));
    const auto* threads = context->device()->tensorflow_cpu_worker_threads();
    const Workers workers(threads->workers, threads->num_threads);
    OP_REQUIRES_OK(context,
                   Launched(stf_attention_cpu_forward(&problem, &inputs[0], &inputs[1], &inputs[2], &output, log_sum_exp, workers.get())));
  }
};

template <typename T, bool kPacked>
class AttentionGradCpu : public AttentionBase<T, kPacked> {
 public:
  using AttentionBase<T, kPacked>::AttentionBase;

  void Compute(OpKernelContext* context) override {
    stf_problem problem;
    OP_REQUIRES_OK(context, this->Read(context, &problem));
    const std::string wrong = WrongLength(problem);
    OP_REQUIRES(context, wrong.empty(), tensorflow::errors::InvalidArgument(wrong));
    stf_tensor inputs[3], grads[3];
    this->Inputs(context, problem, inputs);
    OP_REQUIRES_OK(context, this->Gradients(context, problem, grads));
    const stf_tensor output = this->Output(context), output_grad = this->OutputGrad(context);
    const auto* threads = context->device()->tensorflow_cpu_worker_threads();
    const Workers workers(threads->workers, threads->num_threads);
    OP_REQUIRES_OK(context, Launched(stf_attention_cpu_backward(&problem, &inputs[0], &inputs[1], &inputs[2], &output,
                                                                this->LogSumExp(context), &output_grad, this->LogSumExpGrad(context),
                                                                &grads[0], &grads[1], &grads[2], workers.get())));
  }
};

#define STF_REGISTER_KERNEL(name, T, ...) \
  REGISTER_KERNEL_BUILDER(Name(name).Device(tensorflow::DEVICE_CPU).TypeConstraint<T>("T"), __VA_ARGS__)
#define STF_REGISTER(T)                                                   \
  STF_REGISTER_KERNEL("StfAttention", T, AttentionCpu<T, false>);         \
  STF_REGISTER_KERNEL("StfAttentionGrad", T, AttentionGradCpu<T, false>); \
  STF_REGISTER_KERNEL("StfPackedAttention", T, AttentionCpu<T, true>);    \
  STF_REGISTER_KERNEL("StfPackedAttentionGrad", T, AttentionGradCpu<T, true>)

STF_REGISTER(float);
STF_REGISTER(tensorflow::bfloat16);
STF_REGISTER(Eigen::half);
#undef STF_REGISTER
#undef STF_REGISTER_KERNEL

}  // namespace
}  // namespace stf
