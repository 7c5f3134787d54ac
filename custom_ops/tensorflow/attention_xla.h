// The op and its gradient under XLA (jit_compile=True): lowered to typed custom calls, whose handlers are in attention_ffi_*.cc.
// Registered in attention_xla_*.cc.
//
// REGISTER_XLA_OP is read once, at the first use of XLA, so that a library loaded later is not seen; kernels registered for XLA's own
// devices are seen whenever they come.
#ifndef STF_CUSTOM_OPS_TENSORFLOW_ATTENTION_XLA_H_
#define STF_CUSTOM_OPS_TENSORFLOW_ATTENTION_XLA_H_

#include <string>
#include <vector>

#include "custom_ops/tensorflow/attention_call.h"
#include "custom_ops/tensorflow/attention_calls.h"
#include "custom_ops/tensorflow/call_attributes.h"
#include "tensorflow/compiler/tf2xla/xla_op_kernel.h"
#include "xla/hlo/builder/xla_builder.h"
#include "xla/layout_util.h"
#include "xla/shape_util.h"

namespace stf {

inline std::string Written(const Program& program, const Packing& packing) {
  CallAttributes attributes;
  if (packing.heads) attributes.Add("num_heads", packing.heads).Add("key_depth", packing.key_depth);
  return attributes.Add(program).text();
}

// Device::Check(problem) says what the device's kernels do not take, and Device::Workspace(problem, gradient) the bytes of memory that a
// call needs beside its arguments and results.
template <bool kGradient, bool kPacked, typename Device>
class AttentionXla : public tensorflow::XlaOpKernel {
 public:
  explicit AttentionXla(tensorflow::OpKernelConstruction* context) : XlaOpKernel(context) {
    OP_REQUIRES_OK(context, program_.Init(context));
    if (kPacked) OP_REQUIRES_OK(context, packing_.Init(context));
  }

  void Compile(tensorflow::XlaOpKernelContext* context) override {
    std::vector<tensorflow::TensorShape> shapes;
    std::vector<xla::XlaOp> operands;
    std::vector<xla::Shape> operand_shapes;
    for (int i = 0; i < context->num_inputs(); i++) {
      shapes.push_back(context->InputShape(i));
      operands.push_back(context->Input(i));
      const auto shape = context->InputXlaShape(i);
      OP_REQUIRES_OK(context, shape.status());
      operand_shapes.push_back(*shape);
    }
    if (kPacked) OP_REQUIRES_OK(context, packing_.Unpack(&shapes));
    stf_problem problem;
    OP_REQUIRES_OK(context, Describe(program_, STF_FLOAT32, shapes, &problem));
    const xla::PrimitiveType type = operand_shapes[0].element_type();
    problem.dtype = type == xla::F32 ? STF_FLOAT32 : type == xla::BF16 ? STF_BFLOAT16 : STF_FLOAT16;
    if (kGradient) OP_REQUIRES_OK(context, CheckGradient(shapes, problem));
    OP_REQUIRES_OK(context, Device::Check(problem));

    const absl::Span<const uint8_t> layouts(reinterpret_cast<const uint8_t*>(program_.layouts.data()), program_.layouts.size());
    constexpr int kLayouts = kPacked ? 2 : 4;  // behind the lengths
    operands.insert(operands.begin() + kLayouts, xla::ConstantR1<uint8_t>(context->builder(), layouts));
    operand_shapes.insert(operand_shapes.begin() + kLayouts, xla::ShapeUtil::MakeShape(xla::U8, {static_cast<int64_t>(layouts.size())}));

    std::vector<xla::Shape> results;
    if (kGradient) {
      results.assign(operand_shapes.begin(), operand_shapes.begin() + (kPacked ? 1 : 3));
    } else {
      results = {xla::ShapeUtil::MakeShape(type, {problem.batch, problem.positions, problem.heads, problem.value_depth}),
                 xla::ShapeUtil::MakeShape(xla::F32, {problem.batch, problem.heads, problem.positions})};
    }
    results.push_back(xla::ShapeUtil::MakeShape(xla::U8, {Device::Workspace(problem, kGradient)}));
    for (xla::Shape& shape : operand_shapes) xla::LayoutUtil::SetToDefaultLayout(&shape);
    for (xla::Shape& shape : results) xla::LayoutUtil::SetToDefaultLayout(&shape);
    const char* target = kPacked ? (kGradient ? kPackedGradientCall : kPackedForwardCall) : (kGradient ? kGradientCall : kForwardCall);
    const xla::XlaOp call = xla::CustomCallWithLayout(
        context->builder(), target, operands, xla::ShapeUtil::MakeTupleShape(results), operand_shapes, Written(program_, packing_),
        /*has_side_effect=*/false, {}, nullptr, xla::CustomCallSchedule::SCHEDULE_NONE, xla::CustomCallApiVersion::API_VERSION_TYPED_FFI);
    for (int i = 0; i < context->num_outputs(); i++) context->SetOutput(i, xla::GetTupleElement(call, i));
  }

 private:
  Program program_;
  Packing packing_;
};

#define STF_REGISTER_XLA_KERNEL(name, device, ...) \
  REGISTER_KERNEL_BUILDER(                         \
      Name(name).Device(device).TypeConstraint("T", {tensorflow::DT_FLOAT, tensorflow::DT_BFLOAT16, tensorflow::DT_HALF}), __VA_ARGS__)
#define STF_REGISTER_XLA(device, Device)                                                    \
  STF_REGISTER_XLA_KERNEL("StfAttention", device, AttentionXla<false, false, Device>);      \
  STF_REGISTER_XLA_KERNEL("StfAttentionGrad", device, AttentionXla<true, false, Device>);   \
  STF_REGISTER_XLA_KERNEL("StfPackedAttention", device, AttentionXla<false, true, Device>); \
  STF_REGISTER_XLA_KERNEL("StfPackedAttentionGrad", device, AttentionXla<true, true, Device>)

}  // namespace stf

#endif  // STF_CUSTOM_OPS_TENSORFLOW_ATTENTION_XLA_H_
