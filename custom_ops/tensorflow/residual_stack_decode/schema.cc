// Schema and shape function of the decode op. It has a lowering to XLA on the GPU alone (xla_gpu.cc), where caches can be written in place.
#include "custom_ops/tensorflow/residual_stack_decode/decode.h"
#include "tensorflow/core/framework/op.h"
#include "tensorflow/core/framework/shape_inference.h"

namespace stf {
namespace {

absl::Status Shapes(tensorflow::shape_inference::InferenceContext* c) {
  c->set_output(0, c->input(kDecodeInput));
  for (int i = 1; i < c->num_outputs(); i++) c->set_output(i, c->input(kDecodeCaches - 1 + i));
  return absl::OkStatus();
}

}  // namespace

REGISTER_OP("StfResidualStackDecode")
    .Input("input: T")
    .Input("projection_kernel: T")
    .Input("projection_bias: float")
    .Input("attention_output_kernel: T")
    .Input("attention_output_bias: float")
    .Input("hidden_kernel: T")
    .Input("hidden_bias: float")
    .Input("output_kernel: T")
    .Input("output_bias: float")
    .Input("reads: int32")
    .Input("writes: int32")
    .Input("keys: num_parts * C")
    .Input("values: num_parts * C")
    .Output("output: T")
    .Output("new_keys: num_parts * C")
    .Output("new_values: num_parts * C")
    .Attr("T: {float, bfloat16, half}")
    .Attr("C: {float, bfloat16, half}")
    .Attr("num_parts: int >= 0")
    .Attr("num_heads: int >= 1")
    .Attr("key_depth: int >= 1")
    .Attr("epsilon: float")
    .Attr("scale: float")
    .Attr("first_program: list(int)")
    .Attr("first_part: list(int)")
    .Attr("part_reads: list(int)")
    .Attr("format: int = 1")
    .SetShapeFn(Shapes)
    .Doc(R"doc(
One position of every sequence through residual blocks (Child et al. 2019, Eqs. 11-14), beside caches of the positions
before it. A cache has parts: each holds keys and values of the heads of one program of one pattern, for all blocks
that run it.

input: [batch, width].
projection_kernel: this and the other weights are StfResidualStack's.
reads: for all parts, one behind another, the slots that the position attends to; -1 is none.
writes: [part] the slot that the position's key and value go to; -1 is none.
keys: of each part [layer * slot, batch, head of the program, key_depth].
values: the same with value_depth.
output: [batch, width].
new_keys: `keys` with the position's.
new_values: `values` with the position's.
epsilon: added to the variances of normalizations.
scale: factor of the scores.
first_program: of each pattern, and the number of programs: block k runs pattern k mod (size - 1), and has the layer
  k div (size - 1) of its parts. Head h runs the pattern's program h mod the number that it has.
first_part: of each program, and the number of parts.
part_reads: how many of `reads` are each part's.
format: 1, of the attributes and their meaning.
)doc");

}  // namespace stf
