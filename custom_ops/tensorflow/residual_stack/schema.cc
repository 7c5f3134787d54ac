// Schema and shape functions of the stack op and its gradient. Kernels: kernel_gpu.cc.
#include "custom_ops/tensorflow/residual_stack/stack.h"
#include "tensorflow/core/framework/op.h"
#include "tensorflow/core/framework/shape_inference.h"
#include "tensorflow/core/platform/errors.h"

namespace stf {
namespace {

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

}  // namespace

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
    .Input("layout_bits: num_layouts * uint8")
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
    .Attr("scale: float")
    .Attr("first_program: list(int)")
    .Attr("num_layouts: int >= 0 = 0")
    .Attr("part: list(int) = []")
    .Attr("format: int = 1")
    .Attr("layouts: string = ''")
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
layout_bits: bits of all patterns' block layouts; none where the patterns have none.
output: [batch, position, width].
kept: what the gradient needs and does not compute again, one row for a block or two.
statistics: the same, in float32.
keep: what that is (stf_keep): 0 every second block's input, 1 each block's and attention's output and log-sum-exp, 2 everything.
epsilon: added to the variances of normalizations.
drop_below: dropout's rate times 2^32.
drop_scale: factor of what is not dropped.
components: records of six integers of all patterns' components, as StfAttention takes them.
program_begin: of all patterns' programs, one pattern after another.
scale: factor of the scores.
first_program: of each pattern, and the number of programs: block k runs pattern k mod (size - 1).
part: length, first, run and step, where the positions are a part of sequences of that length: position t is theirs
  `first + t / run * step + t % run`. Dropout's masks are those of the whole sequences.
format: as StfAttention's.
layouts: the block layouts of format 1, which are not read any more.
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
    .Input("layout_bits: num_layouts * uint8")
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
    .Attr("scale: float")
    .Attr("first_program: list(int)")
    .Attr("num_layouts: int >= 0 = 0")
    .Attr("part: list(int) = []")
    .Attr("format: int = 1")
    .Attr("layouts: string = ''")
    .SetShapeFn(GradientShapes)
    .Doc(R"doc(
Gradients of StfResidualStack. Deterministic.

kept: of StfResidualStack.
statistics: of StfResidualStack.
output_grad: gradient with respect to output.
input_grad: gradient with respect to input.
)doc");

}  // namespace stf
