// The stack op and its gradient: schema, shape functions and kernels. There are only those of the GPU, so that the op itself is there where
// they are; everywhere else a loop of TensorFlow's runs the blocks (stf/layers/residual_loop.py).
#include <cuda_runtime_api.h>

#define EIGEN_USE_GPU
#include "custom_ops/tensorflow/layouts_on_device.h"
#include "custom_ops/tensorflow/residual_stack_attributes.h"
#include "tensorflow/core/framework/op.h"
#include "tensorflow/core/framework/shape_inference.h"

namespace stf {
namespace {

using tensorflow::OpKernelConstruction;
using tensorflow::OpKernelContext;
using tensorflow::Tensor;
using tensorflow::TensorShape;
using tensorflow::shape_inference::InferenceContext;

absl::Status ForwardShapes(InferenceContext* c) {
  tensorflow::shape_inference::ShapeHandle input;
  if (!c->WithRank(c->input(0), 3, &input).ok())
    return tensorflow::errors::InvalidArgument("input must be [batch, position, width]. Received: input=", c->DebugString(c->input(0)));
  c->set_output(0, input);
  for (const int i : {1, 2}) c->set_output(i, c->Matrix(c->UnknownDim(), c->UnknownDim()));
  return absl::OkStatus();
}

absl::Status GradientShapes(InferenceContext* c) {
  for (int i = 0; i < 1 + kStackWeights; i++) c->set_output(i, c->input(2 + i));
  return absl::OkStatus();
}

REGISTER_OP("StfResidualStack")
    .Input("input: T")
    .Input("projection_kernel: T")
    .Input("projection_bias: float")
    .Input("attention_output_kernel: T")
    .Input("attention_output_bias: float")
    .Input("hidden_kernel: T")
    .Input("hidden_bias: float")
    .Input("output_kernel: T")
    .Input("output_bias: float")
    .Input("seed: int32")
    .Output("output: T")
    .Output("kept: T")
    .Output("statistics: float")
    .Attr("T: {bfloat16, half}")
    .Attr("keep: int")
    .Attr("num_heads: int >= 1")
    .Attr("key_depth: int >= 1")
    .Attr("epsilon: float")
    .Attr("drop_below: int")
    .Attr("drop_scale: float")
    .Attr("components: list(int)")
    .Attr("program_begin: list(int)")
    .Attr("layouts: string")
    .Attr("scale: float")
    .Attr("first_program: list(int)")
    .SetShapeFn(ForwardShapes)
    .Doc(R"doc(
Residual blocks one after another (Child et al. 2019, Eqs. 11-14).

input: [batch, position, width].
projection_kernel: [block, width, num_heads (2 key_depth + value_depth)]: queries of all heads, then keys, then values.
projection_bias: [block, num_heads (2 key_depth + value_depth)].
attention_output_kernel: [block, num_heads value_depth, width].
attention_output_bias: [block, width].
hidden_kernel: [block, width, hidden].
hidden_bias: [block, hidden].
output_kernel: [block, hidden, width].
output_bias: [block, width].
seed: [2], of dropout.
output: [batch, position, width].
kept: what the gradient needs and does not compute again, one row for a block or two.
statistics: the same, in float32.
keep: what that is (stf_keep): 0 every second block's input, 1 each block's and attention's output and log-sum-exp, 2 everything.
epsilon: added to the variances of normalizations.
drop_below: dropout's rate times 2^32.
drop_scale: factor of what is not dropped.
components: records of six integers of all patterns' components, as StfAttention takes them.
program_begin: of all patterns' programs, one pattern after another.
layouts: bits of all patterns' block layouts.
scale: factor of the scores.
first_program: of each pattern, and the number of programs: block k runs pattern k mod (size - 1).
)doc");

REGISTER_OP("StfResidualStackGrad")
    .Input("kept: T")
    .Input("statistics: float")
    .Input("output_grad: T")
    .Input("projection_kernel: T")
    .Input("projection_bias: float")
    .Input("attention_output_kernel: T")
    .Input("attention_output_bias: float")
    .Input("hidden_kernel: T")
    .Input("hidden_bias: float")
    .Input("output_kernel: T")
    .Input("output_bias: float")
    .Input("seed: int32")
    .Output("input_grad: T")
    .Output("projection_kernel_grad: T")
    .Output("projection_bias_grad: float")
    .Output("attention_output_kernel_grad: T")
    .Output("attention_output_bias_grad: float")
    .Output("hidden_kernel_grad: T")
    .Output("hidden_bias_grad: float")
    .Output("output_kernel_grad: T")
    .Output("output_bias_grad: float")
    .Attr("T: {bfloat16, half}")
    .Attr("keep: int")
    .Attr("num_heads: int >= 1")
    .Attr("key_depth: int >= 1")
    .Attr("epsilon: float")
    .Attr("drop_below: int")
    .Attr("drop_scale: float")
    .Attr("components: list(int)")
    .Attr("program_begin: list(int)")
    .Attr("layouts: string")
    .Attr("scale: float")
    .Attr("first_program: list(int)")
    .SetShapeFn(GradientShapes)
    .Doc(R"doc(
Gradients of StfResidualStack. Deterministic.

kept: of StfResidualStack.
statistics: of StfResidualStack.
output_grad: gradient with respect to output.
input_grad: gradient with respect to input.
)doc");

absl::Status Done(const char* error) { return error ? tensorflow::errors::Internal("StfResidualStack: ", error) : absl::OkStatus(); }

// Inputs of both ops: `before` tensors of which the last has the stream's shape, the weights, the seed.
template <typename T, int before>
class StackBase : public tensorflow::OpKernel {
 public:
  explicit StackBase(OpKernelConstruction* context) : OpKernel(context) { OP_REQUIRES_OK(context, attributes_.Init(context)); }

 protected:
  absl::Status Read(OpKernelContext* context, StackOptions* options, const uint8_t** layouts, const int32_t** seed,
                    stf_stack_weights* weights) {
    std::vector<TensorShape> shapes;
    void* data[kStackWeights];
    for (int i = 0; i < kStackWeights; i++) {
      shapes.push_back(context->input(before + i).shape());
      data[i] = context->input(before + i).data();
    }
    *weights = StackWeights(data);
    TF_RETURN_IF_ERROR(attributes_.Describe(context->input(before - 1).shape(), shapes, kDtype<T>, options));
    const Tensor& words = context->input(before + kStackWeights);
    TF_RETURN_IF_ERROR(CheckShape("seed", words.shape(), {2}));
    *seed = words.template vec<int32_t>().data();
    return layouts_.Get(context, attributes_.program.layouts, layouts);
  }

  static absl::Status Workspace(OpKernelContext* context, size_t bytes, Tensor* workspace) {
    return context->allocate_temp(tensorflow::DT_INT8, TensorShape({static_cast<int64_t>(bytes)}), workspace);
  }

  static cudaStream_t Stream(OpKernelContext* context) { return context->eigen_gpu_device().stream(); }

 private:
  StackAttributes attributes_;
  LayoutsOnDevice layouts_;
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
    Tensor *output, *kept, *statistics, workspace;
    OP_REQUIRES_OK(context, context->allocate_output(0, context->input(0).shape(), &output));
    OP_REQUIRES_OK(context,
                   context->allocate_output(1, TensorShape({stf_stack_kept_rows(stack.get()), stf_stack_kept(stack.get())}), &kept));
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
