// The decode op under XLA on the GPU: lowered to a typed custom call that writes the caches in place, whose handler is in ffi_gpu.cc.
#include <cmath>

#include "custom_ops/tensorflow/attention/kernel.h"
#include "custom_ops/tensorflow/custom_call_attributes.h"
#include "custom_ops/tensorflow/residual_stack/stack.h"
#include "custom_ops/tensorflow/residual_stack_decode/decode.h"
#include "tensorflow/compiler/tf2xla/xla_op_kernel.h"
#include "xla/hlo/builder/xla_builder.h"
#include "xla/layout_util.h"
#include "xla/shape_util.h"

namespace stf {
namespace {

using tensorflow::TensorShape;
using tensorflow::errors::InvalidArgument;

// Operands: as the op's inputs. Results: as its outputs, then the workspace.
class DecodeXla : public tensorflow::XlaOpKernel {
 public:
  explicit DecodeXla(tensorflow::OpKernelConstruction* context) : XlaOpKernel(context) { OP_REQUIRES_OK(context, Init(context)); }

  void Compile(tensorflow::XlaOpKernelContext* context) override {
    std::vector<xla::XlaOp> operands;
    std::vector<xla::Shape> shapes;
    for (int i = 0; i < context->num_inputs(); i++) {
      operands.push_back(context->Input(i));
      const auto shape = context->InputXlaShape(i);
      OP_REQUIRES_OK(context, shape.status());
      shapes.push_back(*shape);
      xla::LayoutUtil::SetToDefaultLayout(&shapes.back());
    }
    stf_decode decode;
    std::vector<stf_cache_part> parts;
    OP_REQUIRES_OK(context, Describe(context, &decode, &parts));

    std::vector<xla::Shape> results = {shapes[kDecodeInput]};
    results.insert(results.end(), shapes.begin() + kDecodeCaches, shapes.end());
    std::vector<std::pair<xla::ShapeIndex, std::pair<int64_t, xla::ShapeIndex>>> in_place;
    for (int64_t i = 1; i < static_cast<int64_t>(results.size()); i++)
      in_place.push_back({xla::ShapeIndex({i}), {kDecodeCaches - 1 + i, xla::ShapeIndex({})}});
    const auto workspace = static_cast<int64_t>(stf_stack_cuda_decode_workspace(&decode));
    results.push_back(xla::ShapeUtil::MakeShape(xla::U8, {workspace}));
    xla::LayoutUtil::SetToDefaultLayout(&results.back());
    const std::string written = CustomCallAttributes()
                                    .Add("num_heads", heads_)
                                    .Add("key_depth", key_depth_)
                                    .Add("epsilon", epsilon_)
                                    .Add("scale", scale_)
                                    .Add("first_program", first_program_)
                                    .Add("first_part", first_part_)
                                    .Add("part_reads", part_reads_)
                                    .text();
    const xla::XlaOp call =
        xla::CustomCallWithLayout(context->builder(), kDecodeCall, operands, xla::ShapeUtil::MakeTupleShape(results), shapes, written,
                                  /*has_side_effect=*/false, in_place, nullptr, xla::CustomCallSchedule::SCHEDULE_NONE,
                                  xla::CustomCallApiVersion::API_VERSION_TYPED_FFI);
    for (int i = 0; i < context->num_outputs(); i++) context->SetOutput(i, xla::GetTupleElement(call, i));
  }

 private:
  absl::Status Init(tensorflow::OpKernelConstruction* context) {
    int64_t format;
    TF_RETURN_IF_ERROR(context->GetAttr("format", &format));
    if (format != 1) return InvalidArgument("format must be 1. Received: format=", format);
    TF_RETURN_IF_ERROR(context->GetAttr("num_heads", &heads_));
    TF_RETURN_IF_ERROR(context->GetAttr("key_depth", &key_depth_));
    TF_RETURN_IF_ERROR(context->GetAttr("epsilon", &epsilon_));
    TF_RETURN_IF_ERROR(context->GetAttr("scale", &scale_));
    TF_RETURN_IF_ERROR(context->GetAttr("first_program", &first_program_));
    TF_RETURN_IF_ERROR(context->GetAttr("first_part", &first_part_));
    TF_RETURN_IF_ERROR(context->GetAttr("part_reads", &part_reads_));
    int64_t parts;
    tensorflow::DataType dtype, cache_dtype;
    TF_RETURN_IF_ERROR(context->GetAttr("num_parts", &parts));
    TF_RETURN_IF_ERROR(context->GetAttr("T", &dtype));
    TF_RETURN_IF_ERROR(context->GetAttr("C", &cache_dtype));
    if (parts != static_cast<int64_t>(part_reads_.size()))
      return InvalidArgument("keys and values must have a tensor for each of the ", part_reads_.size(), " parts. Received: ", parts);
    if (cache_dtype != dtype && cache_dtype != tensorflow::DT_FLOAT)
      return InvalidArgument("keys must be of the input's dtype, ", tensorflow::DataTypeString(dtype),
                             ", or float. Received: ", tensorflow::DataTypeString(cache_dtype));
    if (!(epsilon_ > 0)) return InvalidArgument("epsilon must be above 0. Received: epsilon=", epsilon_);
    if (!std::isfinite(scale_)) return InvalidArgument("scale must be finite. Received: scale=", scale_);
    if (first_program_.size() < 2 || first_program_.size() > STF_DECODE_PATTERNS + 1)
      return InvalidArgument("first_program must be of 1 to ", STF_DECODE_PATTERNS, " patterns. Received: ", first_program_.size() - 1);
    TF_RETURN_IF_ERROR(Rises("first_program", first_program_, static_cast<int64_t>(first_part_.size()) - 1, STF_DECODE_PROGRAMS, 1));
    return Rises("first_part", first_part_, part_reads_.size(), STF_DECODE_PARTS, 0);
  }

  // Whether a list runs from 0 to `end`, `most` at most, in steps of `least` or more.
  static absl::Status Rises(const char* name, const std::vector<int32_t>& list, int64_t end, int64_t most, int32_t least) {
    bool right = !list.empty() && list.front() == 0 && list.back() == end && end <= most;
    for (size_t i = 1; i < list.size(); i++) right = right && list[i] - list[i - 1] >= least;
    if (right) return absl::OkStatus();
    return InvalidArgument(name, " must rise from 0 to ", end, ", which may be ", most, " at most. Received: ", list.size(), " numbers to ",
                           list.empty() ? -1 : list.back());
  }

  // The call that shapes and attributes describe, every shape checked.
  absl::Status Describe(tensorflow::XlaOpKernelContext* context, stf_decode* decode, std::vector<stf_cache_part>* parts) const {
    const TensorShape input = context->InputShape(kDecodeInput);
    if (input.dims() != 2) return InvalidArgument("input must be [batch, width]. Received: input=", input.DebugString());
    std::vector<TensorShape> weights;
    for (int i = 0; i < kStackWeights; i++) {
      weights.push_back(context->InputShape(kDecodeWeights + i));
      if (i % 2 == 0 && weights[i].dims() != 3)
        return InvalidArgument(kStackWeightNames[i], " must be [block, in, out]. Received: ", weights[i].DebugString());
    }
    const int64_t blocks = weights[0].dim_size(0), batch = input.dim_size(0), width = input.dim_size(1), hidden = weights[4].dim_size(2),
                  values = weights[2].dim_size(1), units = 2 * heads_ * key_depth_ + values, count = part_reads_.size(),
                  period = first_program_.size() - 1;
    const TensorShape wanted[kStackWeights] = {{blocks, width, units},  {blocks, units},  {blocks, values, width}, {blocks, width},
                                               {blocks, width, hidden}, {blocks, hidden}, {blocks, hidden, width}, {blocks, width}};
    for (int i = 0; i < kStackWeights; i++) TF_RETURN_IF_ERROR(CheckShape(kStackWeightNames[i], weights[i], wanted[i]));
    if (blocks < 1) return InvalidArgument("projection_kernel must have a block. Received: projection_kernel=", weights[0].DebugString());
    if (values % heads_)
      return InvalidArgument("attention_output_kernel must have a value_depth for each of num_heads=", heads_,
                             ". Received: attention_output_kernel=", weights[2].DebugString());
    const std::pair<const char*, int64_t> sizes[] = {
        {"input's width", width}, {"hidden_kernel's units", hidden}, {"key_depth", key_depth_}, {"value_depth", values / heads_}};
    for (const auto& [name, size] : sizes) {
      if (size < 8 || size % 8) return InvalidArgument(name, " must be a multiple of 8. Received: ", size);
    }
    if (std::max(key_depth_, values / heads_) > 256)
      return InvalidArgument("key_depth and value_depth must be 256 or less. Received: ", key_depth_, " and ", values / heads_);
    int64_t reads = 0;
    for (int64_t pattern = 0; pattern < period; pattern++) {
      const int64_t layers = (blocks - pattern + period - 1) / period, programs = first_program_[pattern + 1] - first_program_[pattern];
      for (int64_t program = 0; program < programs; program++) {
        const int begin = first_part_[first_program_[pattern] + program], end = first_part_[first_program_[pattern] + program + 1];
        for (int t = begin; t < end; t++) {
          const int64_t heads = (heads_ - program + programs - 1) / programs,
                        all = context->InputShape(kDecodeCaches + t).dims() == 4 ? context->InputShape(kDecodeCaches + t).dim_size(0) : 0;
          if (layers && all % layers) return InvalidArgument("keys must have slots for ", layers, " layers. Received: ", all, " slots");
          TF_RETURN_IF_ERROR(CheckShape("keys", context->InputShape(kDecodeCaches + t), {all, batch, heads, key_depth_}));
          TF_RETURN_IF_ERROR(CheckShape("values", context->InputShape(kDecodeCaches + count + t), {all, batch, heads, values / heads_}));
          if (part_reads_[t] < 0) return InvalidArgument("part_reads must be 0 or more. Received: ", part_reads_[t]);
          reads += part_reads_[t];
          parts->push_back({nullptr, nullptr, layers ? all / layers : 0, part_reads_[t]});
        }
      }
    }
    TF_RETURN_IF_ERROR(CheckShape("reads", context->InputShape(kDecodeReads), {reads}));
    TF_RETURN_IF_ERROR(CheckShape("writes", context->InputShape(kDecodeWrites), {count}));
    // Dtypes do not change the workspace.
    *decode = {blocks,
               batch,
               width,
               hidden,
               heads_,
               key_depth_,
               values / heads_,
               STF_FLOAT32,
               STF_FLOAT32,
               epsilon_,
               scale_,
               static_cast<int32_t>(period),
               first_program_.data(),
               first_part_.data(),
               parts->data(),
               nullptr,
               nullptr};
    return absl::OkStatus();
  }

  int64_t heads_, key_depth_;
  float epsilon_, scale_;
  std::vector<int32_t> first_program_, first_part_;
  std::vector<int64_t> part_reads_;
};

REGISTER_KERNEL_BUILDER(Name("StfResidualStackDecode").Device("XLA_GPU_JIT"), DecodeXla);

}  // namespace
}  // namespace stf
