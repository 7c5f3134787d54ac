// The attention op and its gradient on the CPU: checks, allocation, launch.
#include "custom_ops/attention/cpu/attention.h"
#include "custom_ops/tensorflow/attention_call.h"
#include "custom_ops/tensorflow/workers.h"
#include "tensorflow/core/lib/core/threadpool.h"

namespace stf {
namespace {

using tensorflow::OpKernelConstruction;
using tensorflow::OpKernelContext;
using tensorflow::Tensor;
using tensorflow::TensorShape;

absl::Status Launched(int error) {
  if (error == 0) return absl::OkStatus();
  return tensorflow::errors::ResourceExhausted("StfAttention: no memory for the CPU kernels' scratch");
}

template <typename T>
class AttentionCpu : public AttentionBase<T> {
 public:
  using AttentionBase<T>::AttentionBase;

  void Compute(OpKernelContext* context) override {
    stf_problem problem;
    OP_REQUIRES_OK(context, this->Read(context, &problem));
    const std::string wrong = WrongLength(problem);
    OP_REQUIRES(context, wrong.empty(), tensorflow::errors::InvalidArgument(wrong));
    Tensor *output, *log_sum_exp;
    OP_REQUIRES_OK(context, context->allocate_output(0, context->input(2).shape(), &output));
    OP_REQUIRES_OK(context, context->allocate_output(1, TensorShape({problem.batch, problem.heads, problem.positions}), &log_sum_exp));
    const stf_tensor query = Strided(context->input(0)), key = Strided(context->input(1)), value = Strided(context->input(2));
    const stf_tensor out = Strided(*output);
    const auto* threads = context->device()->tensorflow_cpu_worker_threads();
    const Workers workers(threads->workers, threads->num_threads);
    OP_REQUIRES_OK(context, Launched(stf_attention_cpu_forward(&problem, &query, &key, &value, &out, log_sum_exp->flat<float>().data(),
                                                               workers.get())));
  }
};

template <typename T>
class AttentionGradCpu : public AttentionBase<T> {
 public:
  using AttentionBase<T>::AttentionBase;

  void Compute(OpKernelContext* context) override {
    stf_problem problem;
    OP_REQUIRES_OK(context, this->Read(context, &problem));
    const std::string wrong = WrongLength(problem);
    OP_REQUIRES(context, wrong.empty(), tensorflow::errors::InvalidArgument(wrong));
    const Tensor &output = context->input(4), &log_sum_exp = context->input(5);
    const Tensor &output_grad = context->input(6), &log_sum_exp_grad = context->input(7);
    Tensor* grads[3];
    stf_tensor inputs[3], outputs[3];
    for (int i = 0; i < 3; i++) {
      OP_REQUIRES_OK(context, context->allocate_output(i, context->input(i).shape(), &grads[i]));
      inputs[i] = Strided(context->input(i));
      outputs[i] = Strided(*grads[i]);
    }
    const stf_tensor out = Strided(output), out_grad = Strided(output_grad);
    const auto* threads = context->device()->tensorflow_cpu_worker_threads();
    const Workers workers(threads->workers, threads->num_threads);
    OP_REQUIRES_OK(context, Launched(stf_attention_cpu_backward(
                                &problem, &inputs[0], &inputs[1], &inputs[2], &out, log_sum_exp.flat<float>().data(), &out_grad,
                                log_sum_exp_grad.flat<float>().data(), &outputs[0], &outputs[1], &outputs[2], workers.get())));
  }
};

#define STF_REGISTER(T)                                                                                                 \
  REGISTER_KERNEL_BUILDER(Name("StfAttention").Device(tensorflow::DEVICE_CPU).TypeConstraint<T>("T"), AttentionCpu<T>); \
  REGISTER_KERNEL_BUILDER(Name("StfAttentionGrad").Device(tensorflow::DEVICE_CPU).TypeConstraint<T>("T"), AttentionGradCpu<T>)

STF_REGISTER(float);
STF_REGISTER(tensorflow::bfloat16);
STF_REGISTER(Eigen::half);
#undef STF_REGISTER

}  // namespace
}  // namespace stf
