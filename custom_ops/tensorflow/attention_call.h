// What the attention op's kernels share on every device: reading the inputs as the problem that kernels take, with every check that needs
// no look at device memory.
#ifndef STF_CUSTOM_OPS_TENSORFLOW_ATTENTION_CALL_H_
#define STF_CUSTOM_OPS_TENSORFLOW_ATTENTION_CALL_H_

#include <utility>
#include <vector>

#include "custom_ops/attention/problem.h"
#include "custom_ops/tensorflow/attention_program.h"
#include "custom_ops/tensorflow/packed_tensors.h"
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

// The problem that the shapes of query, key, value and lengths describe. It points into the program; its lengths are left null.
inline absl::Status Describe(const Program& program, int32_t dtype, const std::vector<tensorflow::TensorShape>& shapes,
                             stf_problem* problem) {
  using tensorflow::errors::InvalidArgument;
  const tensorflow::TensorShape &query = shapes[0], &value = shapes[2], &lengths = shapes[3];
  const char* names[] = {"query", "key", "value"};
  for (int i = 0; i < 3; i++) {
    if (shapes[i].dims() != 4)
      return InvalidArgument(names[i], " must be [batch, position, head, depth]. Received: ", names[i], "=", shapes[i].DebugString());
  }
  TF_RETURN_IF_ERROR(CheckShape("key", shapes[1], query));
  tensorflow::TensorShape value_shape = query;
  value_shape.set_dim(3, value.dim_size(3));
  TF_RETURN_IF_ERROR(CheckShape("value", value, value_shape));
  const int64_t batch = query.dim_size(0), positions = query.dim_size(1), heads = query.dim_size(2);
  if (lengths.dims() != 1 || (lengths.dim_size(0) != 0 && lengths.dim_size(0) != batch))
    return InvalidArgument("lengths must be [batch] = [", batch, "] or empty. Received: lengths=", lengths.DebugString());
  TF_RETURN_IF_ERROR(program.CheckPositions(positions));
  if (heads > 0 && program.begin.size() < 2)
    return InvalidArgument("program_begin must describe a head's components. Received: none for ", heads, " heads");
  *problem = {batch,
              positions,
              heads,
              query.dim_size(3),
              value.dim_size(3),
              dtype,
              program.scale,
              static_cast<int32_t>(program.begin.size()) - 1,
              program.begin.data(),
              program.components.data(),
              reinterpret_cast<const uint8_t*>(program.layouts.data()),
              nullptr};
  return absl::OkStatus();
}

// The gradient op's further inputs, behind those four.
inline absl::Status CheckGradient(const std::vector<tensorflow::TensorShape>& shapes, const stf_problem& problem) {
  const tensorflow::TensorShape statistic({problem.batch, problem.heads, problem.positions});
  const char* names[] = {"output", "log_sum_exp", "output_grad", "log_sum_exp_grad"};
  for (size_t i = 4; i < shapes.size(); i++) TF_RETURN_IF_ERROR(CheckShape(names[i - 4], shapes[i], i % 2 ? statistic : shapes[2]));
  return absl::OkStatus();
}

// The packed ops take query, key and value side by side in the last axis of one tensor.
struct Packing {
  int64_t heads = 0, key_depth = 0;

  absl::Status Init(tensorflow::OpKernelConstruction* context) {
    TF_RETURN_IF_ERROR(context->GetAttr("num_heads", &heads));
    return context->GetAttr("key_depth", &key_depth);
  }

  // The shapes of query, key and value in place of that of the packed tensor, which comes first in `shapes`.
  absl::Status Unpack(std::vector<tensorflow::TensorShape>* shapes) const {
    using tensorflow::errors::InvalidArgument;
    const tensorflow::TensorShape packed = (*shapes)[0];
    if (packed.dims() != 3)
      return InvalidArgument("query_key_value must be [batch, position, width]. Received: query_key_value=", packed.DebugString());
    const int64_t values = packed.dim_size(2) - 2 * heads * key_depth;
    if (values < heads || values % heads != 0)
      return InvalidArgument("query_key_value must have a width of num_heads * (2 key_depth + value_depth) with num_heads=", heads,
                             " and key_depth=", key_depth, ". Received: query_key_value=", packed.DebugString());
    const tensorflow::TensorShape query({packed.dim_size(0), packed.dim_size(1), heads, key_depth});
    tensorflow::TensorShape value = query;
    value.set_dim(3, values / heads);
    (*shapes)[0] = query;
    shapes->insert(shapes->begin() + 1, {query, value});
    return absl::OkStatus();
  }
};

// What the CUDA kernels take.
inline absl::Status CheckForGpu(const stf_problem& problem) {
  using tensorflow::errors::InvalidArgument;
  constexpr int64_t kMostDepth = 256, kMostPositions = int64_t{1} << 30;
  const std::pair<const char*, int64_t> depths[] = {{"query", problem.key_depth}, {"value", problem.value_depth}};
  for (const auto& [name, depth] : depths) {
    if (depth < 1 || depth > kMostDepth)
      return InvalidArgument(name, " must have a depth from 1 to ", kMostDepth, " on the GPU. Received: ", name, " of depth ", depth);
  }
  const std::pair<const char*, int64_t> sizes[] = {{"batch", problem.batch}, {"positions", problem.positions}, {"heads", problem.heads}};
  for (const auto& [name, size] : sizes) {
    if (size >= kMostPositions)
      return InvalidArgument("query must have fewer than ", kMostPositions, " ", name, " on the GPU. Received: ", size);
  }
  return absl::OkStatus();
}

inline stf_tensor Strided(const tensorflow::Tensor& tensor) {
  const int64_t positions = tensor.dim_size(1), heads = tensor.dim_size(2), depth = tensor.dim_size(3);
  return {const_cast<char*>(tensor.tensor_data().data()), positions * heads * depth, heads * depth, depth};
}

// Inputs: query, key and value, or packed all three in one; lengths; for the gradient what CheckGradient names.
template <typename T, bool kPacked>
class AttentionBase : public tensorflow::OpKernel {
 public:
  explicit AttentionBase(tensorflow::OpKernelConstruction* context) : OpKernel(context) {
    OP_REQUIRES_OK(context, program_.Init(context));
    if (kPacked) OP_REQUIRES_OK(context, packing_.Init(context));
  }

 protected:
  static constexpr int kLengths = kPacked ? 1 : 3, kOutput = kLengths + 1;  // places of inputs

  // The problem that the inputs describe, all of them checked. It points into them (`lengths` is not looked at) and into this kernel.
  absl::Status Read(tensorflow::OpKernelContext* context, stf_problem* problem) const {
    std::vector<tensorflow::TensorShape> shapes;
    for (int i = 0; i < context->num_inputs(); i++) shapes.push_back(context->input(i).shape());
    if (kPacked) TF_RETURN_IF_ERROR(packing_.Unpack(&shapes));
    TF_RETURN_IF_ERROR(Describe(program_, kDtype<T>, shapes, problem));
    const tensorflow::Tensor& lengths = context->input(kLengths);
    if (lengths.dim_size(0) != 0) problem->lengths = lengths.template vec<int32_t>().data();
    return shapes.size() > 4 ? CheckGradient(shapes, *problem) : absl::OkStatus();
  }

  // Query, key and value.
  void Inputs(tensorflow::OpKernelContext* context, const stf_problem& problem, stf_tensor tensors[3]) const {
    if (kPacked) return Unpack(problem, const_cast<char*>(context->input(0).tensor_data().data()), sizeof(T), tensors);
    for (int i = 0; i < 3; i++) tensors[i] = Strided(context->input(i));
  }

  // Their gradients, allocated as the inputs are.
  absl::Status Gradients(tensorflow::OpKernelContext* context, const stf_problem& problem, stf_tensor tensors[3]) const {
    for (int i = 0; i < (kPacked ? 1 : 3); i++) {
      tensorflow::Tensor* grad;
      TF_RETURN_IF_ERROR(context->allocate_output(i, context->input(i).shape(), &grad));
      if (kPacked) {
        Unpack(problem, const_cast<char*>(grad->tensor_data().data()), sizeof(T), tensors);
      } else {
        tensors[i] = Strided(*grad);
      }
    }
    return absl::OkStatus();
  }

  // Output [batch, position, head, depth] and log-sum-exp.
  absl::Status Outputs(tensorflow::OpKernelContext* context, const stf_problem& problem, stf_tensor* output, float** log_sum_exp) const {
    tensorflow::Tensor *out, *statistic;
    TF_RETURN_IF_ERROR(
        context->allocate_output(0, tensorflow::TensorShape({problem.batch, problem.positions, problem.heads, problem.value_depth}), &out));
    TF_RETURN_IF_ERROR(context->allocate_output(1, tensorflow::TensorShape({problem.batch, problem.heads, problem.positions}), &statistic));
    *output = Strided(*out);
    *log_sum_exp = statistic->flat<float>().data();
    return absl::OkStatus();
  }

  // The gradient of the log-sum-exp: null where nothing is differentiated through it.
  const float* StatisticGrad(tensorflow::OpKernelContext* context) const {
    return kPacked ? nullptr : context->input(kOutput + 3).template flat<float>().data();
  }

  const std::string& layouts() const { return program_.layouts; }

 private:
  Program program_;
  Packing packing_;
};

}  // namespace stf

#endif  // STF_CUSTOM_OPS_TENSORFLOW_ATTENTION_CALL_H_
