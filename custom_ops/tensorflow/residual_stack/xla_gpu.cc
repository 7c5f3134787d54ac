// The stack op and its gradient under XLA on the GPU: lowered to typed custom calls, whose handlers are in ffi_gpu.cc.
#include "custom_ops/tensorflow/custom_call_attributes.h"
#include "custom_ops/tensorflow/residual_stack/attributes.h"
#include "tensorflow/compiler/tf2xla/xla_op_kernel.h"
#include "xla/hlo/builder/xla_builder.h"
#include "xla/layout_util.h"
#include "xla/literal.h"
#include "xla/shape_util.h"

namespace stf {
namespace {

// Operands: as the op's inputs, with layout_bits of no byte where there are none. Results: as its outputs, then the workspace.
template <bool kGradient>
class StackXla : public tensorflow::XlaOpKernel {
 public:
  explicit StackXla(tensorflow::OpKernelConstruction* context) : XlaOpKernel(context) {
    OP_REQUIRES_OK(context, attributes_.Init(context));
  }

  void Compile(tensorflow::XlaOpKernelContext* context) override {
    constexpr int kStream = kGradient ? 2 : 0, kWeights = kStream + 1;  // places of inputs
    std::vector<xla::XlaOp> operands;
    std::vector<xla::Shape> operand_shapes;
    std::vector<tensorflow::TensorShape> weights;
    for (int i = 0; i < context->num_inputs(); i++) {
      operands.push_back(context->Input(i));
      const auto shape = context->InputXlaShape(i);
      OP_REQUIRES_OK(context, shape.status());
      operand_shapes.push_back(*shape);
      if (i >= kWeights && i < kWeights + kStackWeights) weights.push_back(context->InputShape(i));
    }
    tensorflow::TensorShape layout_bits({0});
    if (context->num_inputs() > kWeights + kStackWeights + 1) {
      layout_bits = context->InputShape(kWeights + kStackWeights + 1);
    } else {
      operand_shapes.push_back(xla::ShapeUtil::MakeShape(xla::U8, {0}));
      operands.push_back(xla::ConstantLiteral(context->builder(), xla::Literal(operand_shapes.back())));
    }
    OP_REQUIRES_OK(context, CheckShape("seed", context->InputShape(kWeights + kStackWeights), {2}));
    const xla::PrimitiveType type = operand_shapes[kStream].element_type();
    StackOptions options;
    OP_REQUIRES_OK(context, attributes_.Describe(context->InputShape(kStream), weights, layout_bits,
                                                 type == xla::BF16 ? STF_BFLOAT16 : STF_FLOAT16, &options));
    const Stack stack(options, nullptr, nullptr);
    if (kGradient) OP_REQUIRES_OK(context, StackAttributes::CheckGradient(stack, context->InputShape(0), context->InputShape(1)));

    std::vector<xla::Shape> results;
    size_t workspace;
    if (kGradient) {
      results.assign(operand_shapes.begin() + kStream, operand_shapes.begin() + kWeights + kStackWeights);
      workspace = stf_stack_cuda_backward_workspace(stack.get());
    } else {
      results = {operand_shapes[kStream], xla::ShapeUtil::MakeShape(type, {stf_stack_kept_rows(stack.get()), stf_stack_kept(stack.get())}),
                 xla::ShapeUtil::MakeShape(xla::F32, {stf_stack_kept_rows(stack.get()), stf_stack_kept_statistics(stack.get())})};
      workspace = stf_stack_cuda_forward_workspace(stack.get());
    }
    results.push_back(xla::ShapeUtil::MakeShape(xla::U8, {static_cast<int64_t>(workspace)}));
    for (xla::Shape& shape : operand_shapes) xla::LayoutUtil::SetToDefaultLayout(&shape);
    for (xla::Shape& shape : results) xla::LayoutUtil::SetToDefaultLayout(&shape);
    const std::string written = CustomCallAttributes()
                                    .Add(attributes_.program)
                                    .Add("first_program", attributes_.first_program)
                                    .Add("keep", attributes_.keep)
                                    .Add("num_heads", attributes_.heads)
                                    .Add("key_depth", attributes_.key_depth)
                                    .Add("epsilon", attributes_.epsilon)
                                    .Add("drop_below", attributes_.drop_below)
                                    .Add("drop_scale", attributes_.drop_scale)
                                    .Add("part", attributes_.part)
                                    .text();
    const xla::XlaOp call =
        xla::CustomCallWithLayout(context->builder(), kGradient ? kStackGradientCall : kStackForwardCall, operands,
                                  xla::ShapeUtil::MakeTupleShape(results), operand_shapes, written, /*has_side_effect=*/false, {}, nullptr,
                                  xla::CustomCallSchedule::SCHEDULE_NONE, xla::CustomCallApiVersion::API_VERSION_TYPED_FFI);
    for (int i = 0; i < context->num_outputs(); i++) context->SetOutput(i, xla::GetTupleElement(call, i));
  }

 private:
  StackAttributes attributes_;
};

#define STF_REGISTER(name, gradient)                                                                                            \
  REGISTER_KERNEL_BUILDER(Name(name).Device("XLA_GPU_JIT").TypeConstraint("T", {tensorflow::DT_BFLOAT16, tensorflow::DT_HALF}), \
                          StackXla<gradient>)

STF_REGISTER("StfResidualStack", false);
STF_REGISTER("StfResidualStackGrad", true);
#undef STF_REGISTER

}  // namespace
}  // namespace stf
