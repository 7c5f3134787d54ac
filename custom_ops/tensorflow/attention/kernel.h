// What the attention op's kernels share on every device: reading the inputs as the problem that kernels take, with every check that needs
// no look at device memory.
#ifndef STF_CUSTOM_OPS_TENSORFLOW_ATTENTION_KERNEL_H_
#define STF_CUSTOM_OPS_TENSORFLOW_ATTENTION_KERNEL_H_

#include <string>
#include <vector>

#include "custom_ops/attention/problem.h"
#include "custom_ops/tensorflow/attention/attributes.h"
#include "custom_ops/tensorflow/attention/packed.h"
#include "tensorflow/core/framework/op_kernel.h"
#include "tensorflow/core/platform/errors.h"

namespace stf {

template <typename T>
inline constexpr int32_t kDtype = STF_FLOAT32;
template <>
inline constexpr int32_t kDtype<tensorflow::bfloat16> = STF_BFLOAT16;
template <>
inline constexpr int32_t kDtype<Eigen::half> = STF_FLOAT16;

inline absl::Status CheckShape(const char* name, const tensorflow::TensorShape& shape, const tensorflow::TensorShape& wanted) {
  if (shape == wanted) return absl::OkStatus();
  return tensorflow::errors::InvalidArgument(name, " must have shape ", wanted.DebugString(), ". Received: ", name, "=",
                                             shape.DebugString());
}

// The packed ops take query, key and value side by side in the last axis of one tensor.
struct Packing {
  int64_t heads = 0, key_depth = 0;  // 0: not packed

  absl::Status Init(tensorflow::OpKernelConstruction* context) {
    TF_RETURN_IF_ERROR(context->GetAttr("num_heads", &heads));
    return context->GetAttr("key_depth", &key_depth);
  }

  // The shapes of query and of value in a packed tensor of shape `packed`.
  absl::Status Unpack(const tensorflow::TensorShape& packed, tensorflow::TensorShape* query, tensorflow::TensorShape* value) const {
    using tensorflow::errors::InvalidArgument;
    if (packed.dims() != 3)
      return InvalidArgument("query_key_value must be [batch, position, width]. Received: query_key_value=", packed.DebugString());
    const int64_t values = packed.dim_size(2) - 2 * heads * key_depth;
    if (values < heads || values % heads != 0)
      return InvalidArgument("query_key_value must have a width of num_heads * (2 key_depth + value_depth) with num_heads=", heads,
                             " and key_depth=", key_depth, ". Received: query_key_value=", packed.DebugString());
    *query = tensorflow::TensorShape({packed.dim_size(0), packed.dim_size(1), heads, key_depth});
    *value = *query;
    value->set_dim(3, values / heads);
    return absl::OkStatus();
  }
};

// What a node of the op, or of its gradient, says of all its calls: the attributes, and which inputs there are.
class AttentionNode {
 public:
  static constexpr int kNone = -1;

  absl::Status Init(tensorflow::OpKernelConstruction* context, bool packed, bool gradient) {
    TF_RETURN_IF_ERROR(program_.Init(context));
    if (packed) TF_RETURN_IF_ERROR(packing_.Init(context));
    int next = packed ? 1 : 3;
    TF_RETURN_IF_ERROR(FindOptional(context, "num_lengths", &next, &lengths_));
    TF_RETURN_IF_ERROR(FindOptional(context, "num_layouts", &next, &layout_bits_));
    if (gradient) {
      output_ = next;
      next += 3;
    }
    if (packed) return absl::OkStatus();
    if (gradient) TF_RETURN_IF_ERROR(FindOptional(context, "num_log_sum_exp_grads", &next, &log_sum_exp_grad_));
    TF_RETURN_IF_ERROR(FindOptional(context, "num_documents", &next, &documents_));
    return gradient ? absl::OkStatus() : FindOptional(context, "num_sinks", &next, &sinks_);
  }

  const Program& program() const { return program_; }
  const Packing& packing() const { return packing_; }

  // Places among the inputs; kNone where there is none. Query, key and value come first, or one that is packed.
  int lengths() const { return lengths_; }
  int layout_bits() const { return layout_bits_; }
  int output() const { return output_; }
  int log_sum_exp() const { return output_ + 1; }
  int output_grad() const { return output_ + 2; }
  int log_sum_exp_grad() const { return log_sum_exp_grad_; }
  int documents() const { return documents_; }
  int sinks() const { return sinks_; }

  // The problem that inputs of these shapes describe, every shape checked. It points into this node; what lies in the inputs'
  // memory is left null.
  absl::Status Describe(const std::vector<tensorflow::TensorShape>& inputs, int32_t dtype, stf_problem* problem) const {
    using tensorflow::TensorShape;
    using tensorflow::errors::InvalidArgument;
    TensorShape query, value;
    int64_t key_heads = packing_.heads;
    if (packing_.heads) {
      TF_RETURN_IF_ERROR(packing_.Unpack(inputs[0], &query, &value));
    } else {
      const char* names[] = {"query", "key", "value"};
      for (int i = 0; i < 3; i++) {
        if (inputs[i].dims() != 4)
          return InvalidArgument(names[i], " must be [batch, position, head, depth]. Received: ", names[i], "=", inputs[i].DebugString());
      }
      query = value = inputs[0];
      value.set_dim(3, inputs[2].dim_size(3));
      key_heads = inputs[1].dim_size(2);
      const int64_t heads = query.dim_size(2);
      if (key_heads != heads && (key_heads == 0 || heads == 0 || heads % key_heads != 0))
        return InvalidArgument("key must have a number of heads that divides the query's, ", heads,
                               ". Received: key=", inputs[1].DebugString());
      TensorShape key = query, of_values = value;
      key.set_dim(2, key_heads);
      of_values.set_dim(2, key_heads);
      TF_RETURN_IF_ERROR(CheckShape("key", inputs[1], key));
      TF_RETURN_IF_ERROR(CheckShape("value", inputs[2], of_values));
    }
    const int64_t batch = query.dim_size(0), positions = query.dim_size(1), heads = query.dim_size(2);
    if (lengths_ != kNone && inputs[lengths_] != TensorShape({0})) TF_RETURN_IF_ERROR(CheckShape("lengths", inputs[lengths_], {batch}));
    if (layout_bits_ != kNone && inputs[layout_bits_].dims() != 1)
      return InvalidArgument("layout_bits must be [bytes]. Received: layout_bits=", inputs[layout_bits_].DebugString());
    TF_RETURN_IF_ERROR(program_.CheckLayouts(layout_bits_ == kNone ? 0 : inputs[layout_bits_].dim_size(0), positions));
    if (heads > 0 && program_.begin.size() < 2)
      return InvalidArgument("program_begin must describe a head's components. Received: none for ", heads, " heads");
    const TensorShape statistic({batch, heads, positions});
    if (output_ != kNone) {
      TF_RETURN_IF_ERROR(CheckShape("output", inputs[output()], value));
      TF_RETURN_IF_ERROR(CheckShape("log_sum_exp", inputs[log_sum_exp()], statistic));
      TF_RETURN_IF_ERROR(CheckShape("output_grad", inputs[output_grad()], value));
    }
    if (log_sum_exp_grad_ != kNone) TF_RETURN_IF_ERROR(CheckShape("log_sum_exp_grad", inputs[log_sum_exp_grad_], statistic));
    if (documents_ != kNone) TF_RETURN_IF_ERROR(CheckShape("documents", inputs[documents_], {batch, positions, 2}));
    if (sinks_ != kNone) TF_RETURN_IF_ERROR(CheckShape("sinks", inputs[sinks_], {heads}));
    *problem = {batch,
                positions,
                heads,
                query.dim_size(3),
                value.dim_size(3),
                dtype,
                program_.scale,
                static_cast<int32_t>(program_.begin.size()) - 1,
                program_.begin.data(),
                program_.components.data(),
                nullptr,
                nullptr,
                nullptr,
                nullptr,
                key_heads};
    return absl::OkStatus();
  }

 private:
  // `place` of a list input of one or none, which attribute `count` says, and the `next` input behind it.
  static absl::Status FindOptional(tensorflow::OpKernelConstruction* context, const char* count, int* next, int* place) {
    int64_t given;
    TF_RETURN_IF_ERROR(context->GetAttr(count, &given));
    if (given > 1) return tensorflow::errors::InvalidArgument(count, " must be 0 or 1. Received: ", count, "=", given);
    if (given == 1) *place = (*next)++;
    return absl::OkStatus();
  }

  Program program_;
  Packing packing_;
  int lengths_ = kNone, layout_bits_ = kNone, output_ = kNone, log_sum_exp_grad_ = kNone, documents_ = kNone, sinks_ = kNone;
};

inline stf_tensor Strided(const tensorflow::Tensor& tensor) {
  const int64_t positions = tensor.dim_size(1), heads = tensor.dim_size(2), depth = tensor.dim_size(3);
  return {const_cast<char*>(tensor.tensor_data().data()), positions * heads * depth, heads * depth, depth};
}

// The op and its gradient. On::Device(context) is the device that a call runs on, as cpu.h and gpu.h have it.
template <typename T, bool kPacked, bool kGradient, typename On>
class Attention : public tensorflow::OpKernel {
 public:
  explicit Attention(tensorflow::OpKernelConstruction* context) : OpKernel(context) {
    OP_REQUIRES_OK(context, node_.Init(context, kPacked, kGradient));
  }

  void Compute(tensorflow::OpKernelContext* context) override {
    const auto device = On::Device(context);
    stf_problem problem;
    OP_REQUIRES_OK(context, Read(context, &problem));
    const std::string wrong = device.Wrong(problem);
    OP_REQUIRES(context, wrong.empty(), tensorflow::errors::InvalidArgument(wrong));
    const auto bytes = static_cast<int64_t>(device.Workspace(problem, kGradient));
    tensorflow::Tensor workspace;
    OP_REQUIRES_OK(context, context->allocate_temp(tensorflow::DT_INT8, tensorflow::TensorShape({bytes}), &workspace));
    stf_tensor inputs[3];
    if (kPacked) {
      Unpack(problem, const_cast<char*>(context->input(0).tensor_data().data()), sizeof(T), inputs);
    } else {
      for (int i = 0; i < 3; i++) inputs[i] = Strided(context->input(i));
    }
    int error;
    if constexpr (kGradient) {
      stf_tensor grads[3];
      OP_REQUIRES_OK(context, AllocateGradients(context, problem, grads));
      error = device.Backward(problem, inputs, Strided(context->input(node_.output())), Data<float>(context, node_.log_sum_exp()),
                              Strided(context->input(node_.output_grad())), Data<float>(context, node_.log_sum_exp_grad()), grads,
                              workspace.data());
    } else {
      tensorflow::Tensor *output, *log_sum_exp;
      OP_REQUIRES_OK(context, context->allocate_output(0, {problem.batch, problem.positions, problem.heads, problem.value_depth}, &output));
      OP_REQUIRES_OK(context, context->allocate_output(1, {problem.batch, problem.heads, problem.positions}, &log_sum_exp));
      error = device.Forward(problem, inputs, Strided(*output), log_sum_exp->template flat<float>().data(), workspace.data());
    }
    OP_REQUIRES(context, error == 0,
                device.OutOfMemory(error) ? tensorflow::errors::ResourceExhausted(device.Error(error))
                                          : tensorflow::errors::Internal(device.Error(error)));
  }

 private:
  // The problem that the inputs describe, all of them checked. It points into them (their numbers are not looked at) and into this kernel.
  absl::Status Read(tensorflow::OpKernelContext* context, stf_problem* problem) const {
    std::vector<tensorflow::TensorShape> shapes;
    for (int i = 0; i < context->num_inputs(); i++) shapes.push_back(context->input(i).shape());
    TF_RETURN_IF_ERROR(node_.Describe(shapes, kDtype<T>, problem));
    problem->lengths = Data<int32_t>(context, node_.lengths());
    problem->layouts = Data<uint8_t>(context, node_.layout_bits());
    problem->documents = Data<int32_t>(context, node_.documents());
    problem->sinks = Data<float>(context, node_.sinks());
    return absl::OkStatus();
  }

  // Gradients of query, key and value, as these are: side by side in one where they are packed.
  static absl::Status AllocateGradients(tensorflow::OpKernelContext* context, const stf_problem& problem, stf_tensor grads[3]) {
    for (int i = 0; i < (kPacked ? 1 : 3); i++) {
      tensorflow::Tensor* grad;
      TF_RETURN_IF_ERROR(context->allocate_output(i, context->input(i).shape(), &grad));
      if (kPacked) {
        Unpack(problem, const_cast<char*>(grad->tensor_data().data()), sizeof(T), grads);
      } else {
        grads[i] = Strided(*grad);
      }
    }
    return absl::OkStatus();
  }

  // An input's elements, or null where there is no such input or none in it.
  template <typename Element>
  static const Element* Data(tensorflow::OpKernelContext* context, int input) {
    if (input == AttentionNode::kNone || context->input(input).NumElements() == 0) return nullptr;
    return context->input(input).template flat<Element>().data();
  }

  AttentionNode node_;
};

#define STF_REGISTER_KERNEL(name, device, T, ...) \
  REGISTER_KERNEL_BUILDER(Name(name).Device(device).TypeConstraint<T>("T"), Attention<T, __VA_ARGS__>)
#define STF_REGISTER_DTYPE(device, On, T)                                \
  STF_REGISTER_KERNEL("StfAttention", device, T, false, false, On);      \
  STF_REGISTER_KERNEL("StfAttentionGrad", device, T, false, true, On);   \
  STF_REGISTER_KERNEL("StfPackedAttention", device, T, true, false, On); \
  STF_REGISTER_KERNEL("StfPackedAttentionGrad", device, T, true, true, On)
#define STF_REGISTER_ATTENTION(device, On)              \
  STF_REGISTER_DTYPE(device, On, float);                \
  STF_REGISTER_DTYPE(device, On, tensorflow::bfloat16); \
  STF_REGISTER_DTYPE(device, On, Eigen::half)

}  // namespace stf

#endif  // STF_CUSTOM_OPS_TENSORFLOW_ATTENTION_KERNEL_H_
