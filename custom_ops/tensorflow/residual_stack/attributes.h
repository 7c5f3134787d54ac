// Attributes and shapes of the stack op, checked.
#ifndef STF_CUSTOM_OPS_TENSORFLOW_RESIDUAL_STACK_ATTRIBUTES_H_
#define STF_CUSTOM_OPS_TENSORFLOW_RESIDUAL_STACK_ATTRIBUTES_H_

#include <cmath>
#include <vector>

#include "absl/strings/str_join.h"
#include "custom_ops/tensorflow/attention/gpu.h"
#include "custom_ops/tensorflow/attention/kernel.h"
#include "custom_ops/tensorflow/residual_stack/stack.h"

namespace stf {

struct StackAttributes {
  Program program;
  std::vector<int64_t> first_program, part;
  int64_t keep, heads, key_depth, drop_below;
  float epsilon, drop_scale;

  absl::Status Init(tensorflow::OpKernelConstruction* context) {
    using tensorflow::errors::InvalidArgument;
    TF_RETURN_IF_ERROR(program.Init(context));
    TF_RETURN_IF_ERROR(context->GetAttr("first_program", &first_program));
    TF_RETURN_IF_ERROR(context->GetAttr("keep", &keep));
    TF_RETURN_IF_ERROR(context->GetAttr("num_heads", &heads));
    TF_RETURN_IF_ERROR(context->GetAttr("key_depth", &key_depth));
    TF_RETURN_IF_ERROR(context->GetAttr("drop_below", &drop_below));
    TF_RETURN_IF_ERROR(context->GetAttr("epsilon", &epsilon));
    TF_RETURN_IF_ERROR(context->GetAttr("drop_scale", &drop_scale));
    TF_RETURN_IF_ERROR(context->GetAttr("part", &part));
    if (part.empty()) part.assign(4, 0);
    if (part.size() != 4 || part[0] < 0 || part[0] >> 31 || (part[0] && (part[1] < 0 || part[2] < 1 || part[3] < 0)))
      return InvalidArgument(
          "part must be four numbers, length, first, run and step: a length from 0 to 2^31 - 1, a first of 0 or more, a run of 1 or more, "
          "a step of 0 or more, "
          "or none. Received: part=[",
          absl::StrJoin(part, ", "), "]");
    if (keep < STF_KEEP_STREAM || keep > STF_KEEP_ALL) return InvalidArgument("keep must be from 0 to 2. Received: keep=", keep);
    if (drop_below < 0 || drop_below >= int64_t{1} << 32)
      return InvalidArgument("drop_below must be from 0 to 2^32 - 1. Received: drop_below=", drop_below);
    if (!std::isfinite(drop_scale)) return InvalidArgument("drop_scale must be finite. Received: drop_scale=", drop_scale);
    if (!(epsilon > 0)) return InvalidArgument("epsilon must be above 0. Received: epsilon=", epsilon);
    const int64_t programs = static_cast<int64_t>(program.begin.size()) - 1;
    if (first_program.size() < 2 || first_program.front() != 0 || first_program.back() != programs)
      return InvalidArgument("first_program must run from 0 to the number of programs, ", programs, ". Received: ", first_program.size(),
                             " numbers");
    for (size_t i = 0; i + 1 < first_program.size(); i++) {
      if (first_program[i + 1] <= first_program[i] || first_program[i + 1] > programs)
        return InvalidArgument("first_program must rise. Received: ", first_program[i], " and ", first_program[i + 1], " behind it");
    }
    return absl::OkStatus();
  }

  // What the shapes of the input (or of a gradient like it), of the weights and of layout_bits ([0] where there is none) describe.
  absl::Status Describe(const tensorflow::TensorShape& input, const std::vector<tensorflow::TensorShape>& weights,
                        const tensorflow::TensorShape& layout_bits, int32_t dtype, StackOptions* options) const {
    using tensorflow::TensorShape;
    using tensorflow::errors::InvalidArgument;
    if (input.dims() != 3) return InvalidArgument("input must be [batch, position, width]. Received: input=", input.DebugString());
    for (const int i : {0, 2, 4, 6}) {
      if (weights[i].dims() != 3)
        return InvalidArgument(kStackWeightNames[i], " must be [block, in, out]. Received: ", kStackWeightNames[i], "=",
                               weights[i].DebugString());
    }
    const int64_t blocks = weights[0].dim_size(0), width = input.dim_size(2), hidden = weights[4].dim_size(2),
                  values = weights[2].dim_size(1), units = 2 * heads * key_depth + values;
    const TensorShape wanted[kStackWeights] = {{blocks, width, units},  {blocks, units},  {blocks, values, width}, {blocks, width},
                                               {blocks, width, hidden}, {blocks, hidden}, {blocks, hidden, width}, {blocks, width}};
    for (int i = 0; i < kStackWeights; i++) TF_RETURN_IF_ERROR(CheckShape(kStackWeightNames[i], weights[i], wanted[i]));
    if (blocks < 1) return InvalidArgument("projection_kernel must have a block. Received: projection_kernel=", weights[0].DebugString());
    const std::pair<const char*, int64_t> widths[] = {
        {"input's width", width}, {"hidden_kernel's units", hidden}, {"projection_kernel's units", units}, {"values' width", values}};
    for (const auto& [name, size] : widths) {
      if (size < 8 || size % 8) return InvalidArgument(name, " must be a multiple of 8. Received: ", size);
    }
    if (width > 2048) return InvalidArgument("input's width must be 2,048 or less. Received: ", width);
    if (values % heads)
      return InvalidArgument("attention_output_kernel must have a value_depth for each of num_heads=", heads,
                             ". Received: attention_output_kernel=", weights[2].DebugString());
    if (layout_bits.dims() != 1) return InvalidArgument("layout_bits must be [bytes]. Received: layout_bits=", layout_bits.DebugString());
    TF_RETURN_IF_ERROR(program.CheckLayouts(layout_bits.dim_size(0), input.dim_size(1)));
    *options = {blocks,
                input.dim_size(0),
                input.dim_size(1),
                width,
                hidden,
                heads,
                key_depth,
                values / heads,
                dtype,
                static_cast<int32_t>(keep),
                epsilon,
                program.scale,
                drop_below,
                drop_scale,
                {part[0], part[1], part[2], part[3]},
                program.components.data(),
                program.begin.data(),
                first_program.data(),
                static_cast<int64_t>(first_program.size()) - 1};
    const std::string wrong = Gpu::Wrong(Stack(*options, nullptr, nullptr).problem());
    return wrong.empty() ? absl::OkStatus() : InvalidArgument(wrong);
  }

  // Of the gradient op.
  static absl::Status CheckGradient(const Stack& stack, const tensorflow::TensorShape& kept, const tensorflow::TensorShape& statistics) {
    const int64_t rows = stf_stack_kept_rows(stack.get());
    TF_RETURN_IF_ERROR(CheckShape("kept", kept, {rows, stf_stack_kept(stack.get())}));
    return CheckShape("statistics", statistics, {rows, stf_stack_kept_statistics(stack.get())});
  }
};

}  // namespace stf

#endif  // STF_CUSTOM_OPS_TENSORFLOW_RESIDUAL_STACK_ATTRIBUTES_H_
