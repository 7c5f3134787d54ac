// The attention op and its gradient on the CPU: checks, allocation, launch.
#include <algorithm>
#include <atomic>
#include <memory>
#include <thread>

#include "custom_ops/attention/cpu/attention.h"
#include "custom_ops/tensorflow/attention_call.h"
#include "tensorflow/core/lib/core/threadpool.h"

namespace stf {
namespace {

using tensorflow::OpKernelConstruction;
using tensorflow::OpKernelContext;
using tensorflow::Tensor;
using tensorflow::TensorShape;

// TensorFlow's own worker threads as the kernels' stf_parallel. The calling thread works too, and runs whatever the
// pool has not begun, so that a pool that is busy (or whose thread this is) delays nothing.
class Workers {
 public:
  explicit Workers(OpKernelContext* context) {
    const auto* pool = context->device()->tensorflow_cpu_worker_threads();
    pool_ = pool->workers;
    parallel_ = {this, &Workers::Run, std::max(1, pool->num_threads)};
  }
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

  tensorflow::thread::ThreadPool* pool_;
  stf_parallel parallel_;
};

// Lengths lie in host memory: each is looked at.
absl::Status CheckLengths(const stf_problem& problem) {
  for (int64_t i = 0; problem.lengths && i < problem.batch; i++) {
    if (problem.lengths[i] < 0 || problem.lengths[i] > problem.positions)
      return tensorflow::errors::InvalidArgument("lengths must be from 0 to ", problem.positions, ". Received: lengths[", i,
                                                 "]=", problem.lengths[i]);
  }
  return absl::OkStatus();
}

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
    OP_REQUIRES_OK(context, CheckLengths(problem));
    Tensor *output, *log_sum_exp;
    OP_REQUIRES_OK(context, context->allocate_output(0, context->input(2).shape(), &output));
    OP_REQUIRES_OK(context, context->allocate_output(1, TensorShape({problem.batch, problem.heads, problem.positions}), &log_sum_exp));
    const stf_tensor query = Strided(context->input(0)), key = Strided(context->input(1)), value = Strided(context->input(2));
    const stf_tensor out = Strided(*output);
    const Workers workers(context);
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
    OP_REQUIRES_OK(context, CheckLengths(problem));
    const Tensor &output = context->input(4), &log_sum_exp = context->input(5);
    const Tensor &output_grad = context->input(6), &log_sum_exp_grad = context->input(7);
    OP_REQUIRES_OK(context, this->CheckGradient(context, problem));
    Tensor* grads[3];
    stf_tensor inputs[3], outputs[3];
    for (int i = 0; i < 3; i++) {
      OP_REQUIRES_OK(context, context->allocate_output(i, context->input(i).shape(), &grads[i]));
      inputs[i] = Strided(context->input(i));
      outputs[i] = Strided(*grads[i]);
    }
    const stf_tensor out = Strided(output), out_grad = Strided(output_grad);
    const Workers workers(context);
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
