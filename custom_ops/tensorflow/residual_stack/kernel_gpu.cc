// The stack op and its gradient on the GPU, which alone has kernels: everywhere else a loop of TensorFlow's runs the blocks
// (stf/layers/residual_loop.py).
#include <cuda_runtime_api.h>

#define EIGEN_USE_GPU
#include "custom_ops/tensorflow/residual_stack/attributes.h"

namespace stf {
namespace {

using tensorflow::OpKernelConstruction;
using tensorflow::OpKernelContext;
using tensorflow::Tensor;
using tensorflow::TensorShape;

absl::Status Done(const char* error) { return error ? tensorflow::errors::Internal("StfResidualStack: ", error) : absl::OkStatus(); }

// Inputs of both ops: `before` tensors of which the last has the stream's shape, the weights, the seed, layout_bits or none.
template <typename T, int before>
class StackBase : public tensorflow::OpKernel {
 public:
  explicit StackBase(OpKernelConstruction* context) : OpKernel(context) { OP_REQUIRES_OK(context, attributes_.Init(context)); }

 protected:
  absl::Status Read(OpKernelContext* context, StackOptions* options, const uint8_t** layouts, const int32_t** seed,
                    stf_stack_weights* weights) const {
    std::vector<TensorShape> shapes;
    void* data[kStackWeights];
    for (int i = 0; i < kStackWeights; i++) {
      shapes.push_back(context->input(before + i).shape());
      data[i] = context->input(before + i).data();
    }
    *weights = StackWeights(data);
    const int bits = before + kStackWeights + 1;
    const bool given = context->num_inputs() > bits;
    *layouts = given ? static_cast<const uint8_t*>(context->input(bits).data()) : nullptr;
    TF_RETURN_IF_ERROR(attributes_.Describe(context->input(before - 1).shape(), shapes,
                                            given ? context->input(bits).shape() : TensorShape({0}), kDtype<T>, options));
    const Tensor& words = context->input(before + kStackWeights);
    TF_RETURN_IF_ERROR(CheckShape("seed", words.shape(), {2}));
    *seed = words.template vec<int32_t>().data();
    return absl::OkStatus();
  }

  static absl::Status Workspace(OpKernelContext* context, size_t bytes, Tensor* workspace) {
    return context->allocate_temp(tensorflow::DT_INT8, TensorShape({static_cast<int64_t>(bytes)}), workspace);
  }

  static cudaStream_t Stream(OpKernelContext* context) { return context->eigen_gpu_device().stream(); }

 private:
  StackAttributes attributes_;
};

template <typename T>
class StackForward : public StackBase<T, 1> {
 public:
  using StackBase<T, 1>::StackBase;

  void Compute(OpKernelContext* context) override {
    StackOptions options;
    const uint8_t* layouts;
    const int32_t* seed;
    stf_stack_weights weights;
    OP_REQUIRES_OK(context, this->Read(context, &options, &layouts, &seed, &weights));
    const Stack stack(options, layouts, seed);
    Tensor *output, *kept, *statistics, workspace, input;
    OP_REQUIRES_OK(context, context->allocate_output(0, context->input(0).shape(), &output));
    const TensorShape kept_shape({stf_stack_kept_rows(stack.get()), stf_stack_kept(stack.get())});
    if (options.keep == STF_KEEP_STREAM && kept_shape.dim_size(0) == 1) {  // the input, and nothing else
      OP_REQUIRES(context, input.CopyFrom(context->input(0), kept_shape), tensorflow::errors::Internal("StfResidualStack: kept"));
      context->set_output(1, input);
      kept = &input;
    } else {
      OP_REQUIRES_OK(context, context->allocate_output(1, kept_shape, &kept));
    }
    OP_REQUIRES_OK(context, context->allocate_output(
                                2, TensorShape({stf_stack_kept_rows(stack.get()), stf_stack_kept_statistics(stack.get())}), &statistics));
    OP_REQUIRES_OK(context, this->Workspace(context, stf_stack_cuda_forward_workspace(stack.get()), &workspace));
    OP_REQUIRES_OK(context, Done(stf_stack_cuda_forward(stack.get(), &weights, context->input(0).data(), output->data(), kept->data(),
                                                        statistics->flat<float>().data(), workspace.data(), this->Stream(context))));
  }
};

template <typename T>
class StackGradient : public StackBase<T, 3> {
 public:
  using StackBase<T, 3>::StackBase;

  void Compute(OpKernelContext* context) override {
    StackOptions options;
    const uint8_t* layouts;
    const int32_t* seed;
    stf_stack_weights weights;
    OP_REQUIRES_OK(context, this->Read(context, &options, &layouts, &seed, &weights));
    const Stack stack(options, layouts, seed);
    const Tensor &kept = context->input(0), &statistics = context->input(1), &output_grad = context->input(2);
    OP_REQUIRES_OK(context, StackAttributes::CheckGradient(stack, kept.shape(), statistics.shape()));
    Tensor *grads[1 + kStackWeights], workspace;
    void* data[1 + kStackWeights];
    for (int i = 0; i < 1 + kStackWeights; i++) {
      OP_REQUIRES_OK(context, context->allocate_output(i, context->input(2 + i).shape(), &grads[i]));
      data[i] = grads[i]->data();
    }
    OP_REQUIRES_OK(context, this->Workspace(context, stf_stack_cuda_backward_workspace(stack.get()), &workspace));
    const stf_stack_weights weight_grads = StackWeights(data + 1);
    OP_REQUIRES_OK(context,
                   Done(stf_stack_cuda_backward(stack.get(), &weights, kept.data(), statistics.template flat<float>().data(),
                                                output_grad.data(), data[0], &weight_grads, workspace.data(), this->Stream(context))));
  }
};

#define STF_REGISTER(T)                                                                                                     \
  REGISTER_KERNEL_BUILDER(Name("StfResidualStack").Device(tensorflow::DEVICE_GPU).TypeConstraint<T>("T"), StackForward<T>); \
  REGISTER_KERNEL_BUILDER(Name("StfResidualStackGrad").Device(tensorflow::DEVICE_GPU).TypeConstraint<T>("T"), StackGradient<T>)

STF_REGISTER(tensorflow::bfloat16);
STF_REGISTER(Eigen::half);
#undef STF_REGISTER

}  // namespace
}  // namespace stf
