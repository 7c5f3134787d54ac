// The op and its gradient under XLA (jit_compile=True): lowered to typed custom calls, whose handlers are in attention_ffi_*.cc.
// Registered in attention_xla_*.cc.
//
// REGISTER_XLA_OP is read once, at the first use of XLA, so that a library loaded later is not seen; kernels registered for XLA's own
// devices are seen whenever they come.
#ifndef STF_CUSTOM_OPS_TENSORFLOW_ATTENTION_XLA_H_
#define STF_CUSTOM_OPS_TENSORFLOW_ATTENTION_XLA_H_

#include <string>
#include <vector>

#include "custom_ops/tensorflow/attention/kernel.h"
#include "custom_ops/tensorflow/attention/targets.h"
#include "custom_ops/tensorflow/custom_call_attributes.h"
#include "tensorflow/compiler/tf2xla/xla_op_kernel.h"
#include "xla/hlo/builder/xla_builder.h"
#include "xla/layout_util.h"
#include "xla/literal.h"
#include "xla/shape_util.h"

namespace stf {

inline std::string Written(const Program& program, const Packing& packing) {
  CustomCallAttributes attributes;
  if (packing.heads) attributes.Add("num_heads", packing.heads).Add("key_depth", packing.key_depth);
  return attributes.Add(program).text();
}

// Device is what cpu.h and gpu.h have.
template <bool kGradient, bool kPacked, typename Device>
class AttentionXla : public tensorflow::XlaOpKernel {
 public:
  explicit AttentionXla(tensorflow::OpKernelConstruction* context) : XlaOpKernel(context) {
    OP_REQUIRES_OK(context, node_.Init(context, kPacked, kGradient));
  }

  // The handlers (ffi.h) take every operand: what the node lacks goes to them with no element.
  void Compile(tensorflow::XlaOpKernelContext* context) override {
    std::vector<tensorflow::TensorShape> shapes;
    std::vector<xla::Shape> xla_shapes;
    for (int i = 0; i < context->num_inputs(); i++) {
      shapes.push_back(context->InputShape(i));
      const auto shape = context->InputXlaShape(i);
      OP_REQUIRES_OK(context, shape.status());
      xla_shapes.push_back(*shape);
    }
    stf_problem problem;  // with null for what lies in the inputs' memory
    const xla::PrimitiveType type = xla_shapes[0].element_type();
    const int32_t dtype = type == xla::F32 ? STF_FLOAT32 : type == xla::BF16 ? STF_BFLOAT16 : STF_FLOAT16;
    OP_REQUIRES_OK(context, node_.Describe(shapes, dtype, &problem));
    const std::string wrong = Device::Wrong(problem);
    OP_REQUIRES(context, wrong.empty(), tensorflow::errors::InvalidArgument(wrong));

    std::vector<xla::XlaOp> operands;
    std::vector<xla::Shape> operand_shapes;
    const auto add = [&](int input) {
      operands.push_back(context->Input(input));
      operand_shapes.push_back(xla_shapes[input]);
    };
    const auto add_optional = [&](int input, xla::PrimitiveType element) {
      if (input != AttentionNode::kNone) return add(input);
      operand_shapes.push_back(xla::ShapeUtil::MakeShape(element, {0}));
      operands.push_back(xla::ConstantLiteral(context->builder(), xla::Literal(operand_shapes.back())));
    };
    for (int i = 0; i < (kPacked ? 1 : 3); i++) add(i);
    add_optional(node_.lengths(), xla::S32);
    add_optional(node_.layout_bits(), xla::U8);
    if (kGradient) {
      for (const int input : {node_.output(), node_.log_sum_exp(), node_.output_grad()}) add(input);
      if (!kPacked) add_optional(node_.log_sum_exp_grad(), xla::F32);
    }
    if (!kPacked) add_optional(node_.documents(), xla::S32);
    if (!kPacked && !kGradient) add_optional(node_.sinks(), xla::F32);

    std::vector<xla::Shape> results;
    if (kGradient) {
      results.assign(operand_shapes.begin(), operand_shapes.begin() + (kPacked ? 1 : 3));
    } else {
      results = {xla::ShapeUtil::MakeShape(type, {problem.batch, problem.positions, problem.heads, problem.value_depth}),
                 xla::ShapeUtil::MakeShape(xla::F32, {problem.batch, problem.heads, problem.positions})};
    }
    results.push_back(xla::ShapeUtil::MakeShape(xla::U8, {static_cast<int64_t>(Device::Workspace(problem, kGradient))}));
    for (xla::Shape& shape : operand_shapes) xla::LayoutUtil::SetToDefaultLayout(&shape);
    for (xla::Shape& shape : results) xla::LayoutUtil::SetToDefaultLayout(&shape);
    const char* target = kPacked ? (kGradient ? kPackedGradientCall : kPackedForwardCall) : (kGradient ? kGradientCall : kForwardCall);
    const xla::XlaOp call = xla::CustomCallWithLayout(context->builder(), target, operands, xla::ShapeUtil::MakeTupleShape(results),
                                                      operand_shapes, Written(node_.program(), node_.packing()),
                                                      /*has_side_effect=*/false, {}, nullptr, xla::CustomCallSchedule::SCHEDULE_NONE,
                                                      xla::CustomCallApiVersion::API_VERSION_TYPED_FFI);
    for (int i = 0; i < context->num_outputs(); i++) context->SetOutput(i, xla::GetTupleElement(call, i));
  }

 private:
  AttentionNode node_;
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
