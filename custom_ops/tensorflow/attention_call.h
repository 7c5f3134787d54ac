// What the attention op's kernels share on every device: reading the inputs as the problem that kernels take, with every check that needs
// no look at device memory.
#ifndef STF_CUSTOM_OPS_TENSORFLOW_ATTENTION_CALL_H_
#define STF_CUSTOM_OPS_TENSORFLOW_ATTENTION_CALL_H_

#include "custom_ops/attention/problem.h"
#include "custom_ops/tensorflow/attention_program.h"
#include "tensorflow/core/framework/op_kernel.h"
#include "tensorflow/core/platform/errors.h"

namespace stf {

template <typename T>
inline constexpr int32_t kDtype = STF_FLOAT32;
template <>
inline constexpr int32_t kDtype<tensorflow::bfloat16> = STF_BFLOAT16;
template <>
inline constexpr int32_t kDtype<Eigen::half> = STF_FLOAT16;

inline absl::Status CheckShape(const char* name, const tensorflow::Tensor& tensor, const tensorflow::TensorShape& wanted) {
  if (tensor.shape() == wanted) return absl::OkStatus();
  return tensorflow::errors::InvalidArgument(name, " must have shape ", wanted.DebugString(), ". Received: ", name, "=",
                                             tensor.shape().DebugString());
}

inline stf_tensor Strided(const tensorflow::Tensor& tensor) {
  const int64_t positions = tensor.dim_size(1), heads = tensor.dim_size(2), depth = tensor.dim_size(3);
  return {const_cast<char*>(tensor.tensor_data().data()), positions * heads * depth, heads * depth, depth};
}

template <typename T>
class AttentionBase : public tensorflow::OpKernel {
 public:
  explicit AttentionBase(tensorflow::OpKernelConstruction* context) : OpKernel(context) { OP_REQUIRES_OK(context, program_.Init(context)); }

 protected:
  // The problem that the first four inputs describe. It points into them (`lengths` is not looked at) and into this kernel.
  absl::Status Read(tensorflow::OpKernelContext* context, stf_problem* problem) const {
    using tensorflow::errors::InvalidArgument;
    const tensorflow::Tensor &query = context->input(0), &key = context->input(1), &value = context->input(2), &lengths = context->input(3);
    const char* names[] = {"query", "key", "value"};
    for (int i = 0; i < 3; i++) {
      if (context->input(i).dims() != 4)
        return InvalidArgument(names[i], " must be [batch, position, head, depth]. Received: ", names[i], "=",
                               context->input(i).shape().DebugString());
    }
    TF_RETURN_IF_ERROR(CheckShape("key", key, query.shape()));
    tensorflow::TensorShape value_shape = query.shape();
    value_shape.set_dim(3, value.dim_size(3));
    TF_RETURN_IF_ERROR(CheckShape("value", value, value_shape));
    const int64_t batch = query.dim_size(0), positions = query.dim_size(1), heads = query.dim_size(2);
    if (lengths.dims() != 1 || (lengths.dim_size(0) != 0 && lengths.dim_size(0) != batch))
      return InvalidArgument("lengths must be [batch] = [", batch, "] or empty. Received: lengths=", lengths.shape().DebugString());
    const bool ragged = lengths.dim_size(0) != 0;
    TF_RETURN_IF_ERROR(program_.CheckPositions(positions));
    if (heads > 0 && program_.begin.size() < 2)
      return InvalidArgument("program_begin must describe a head's components. Received: none for ", heads, " heads");
    *problem = {batch,
                positions,
                heads,
                query.dim_size(3),
                value.dim_size(3),
                kDtype<T>,
                program_.scale,
                static_cast<int32_t>(program_.begin.size()) - 1,
                program_.begin.data(),
                program_.components.data(),
                reinterpret_cast<const uint8_t*>(program_.layouts.data()),
                ragged ? lengths.template vec<int32_t>().data() : nullptr};
    return absl::OkStatus();
  }

  // The gradient op's further inputs.
  absl::Status CheckGradient(tensorflow::OpKernelContext* context, const stf_problem& problem) const {
    const tensorflow::TensorShape statistic({problem.batch, problem.heads, problem.positions});
    const char* names[] = {"output", "log_sum_exp", "output_grad", "log_sum_exp_grad"};
    for (int i = 0; i < 4; i++) {
      TF_RETURN_IF_ERROR(CheckShape(names[i], context->input(4 + i), i % 2 ? statistic : context->input(2).shape()));
    }
    return absl::OkStatus();
  }

  const std::string& layouts() const { return program_.layouts; }

 private:
  Program program_;
};

}  // namespace stf

#endif  // STF_CUSTOM_OPS_TENSORFLOW_ATTENTION_CALL_H_
