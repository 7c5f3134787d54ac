// Schema and shape functions of the attention op and its gradient. What devices do with them stands in attention_kernels.cc.
#include "tensorflow/core/framework/common_shape_fns.h"
#include "tensorflow/core/framework/op.h"
#include "tensorflow/core/framework/shape_inference.h"

namespace stf {
namespace {

using tensorflow::shape_inference::DimensionHandle;
using tensorflow::shape_inference::InferenceContext;
using tensorflow::shape_inference::ShapeHandle;

struct Shapes {
  ShapeHandle query, key, value, output, log_sum_exp;
};

// The first four inputs' shapes, each with what the others know of it.
absl::Status InferShapes(InferenceContext* c, Shapes* shapes) {
  ShapeHandle query, key, value, lengths;
  TF_RETURN_IF_ERROR(c->WithRank(c->input(0), 4, &query));
  TF_RETURN_IF_ERROR(c->WithRank(c->input(1), 4, &key));
  TF_RETURN_IF_ERROR(c->WithRank(c->input(2), 4, &value));
  TF_RETURN_IF_ERROR(c->WithRank(c->input(3), 1, &lengths));
  TF_RETURN_IF_ERROR(c->Merge(query, key, &query));
  DimensionHandle common[3];
  for (int i = 0; i < 3; i++) TF_RETURN_IF_ERROR(c->Merge(c->Dim(query, i), c->Dim(value, i), &common[i]));
  const DimensionHandle key_depth = c->Dim(query, 3), value_depth = c->Dim(value, 3);
  shapes->query = c->MakeShape({common[0], common[1], common[2], key_depth});
  shapes->key = shapes->query;
  shapes->value = c->MakeShape({common[0], common[1], common[2], value_depth});
  shapes->output = shapes->value;
  shapes->log_sum_exp = c->MakeShape({common[0], common[2], common[1]});
  return absl::OkStatus();
}

absl::Status ForwardShapes(InferenceContext* c) {
  Shapes shapes;
  TF_RETURN_IF_ERROR(InferShapes(c, &shapes));
  c->set_output(0, shapes.output);
  c->set_output(1, shapes.log_sum_exp);
  return absl::OkStatus();
}

absl::Status GradientShapes(InferenceContext* c) {
  Shapes shapes;
  ShapeHandle merged;
  TF_RETURN_IF_ERROR(InferShapes(c, &shapes));
  TF_RETURN_IF_ERROR(c->Merge(shapes.output, c->input(4), &merged));
  TF_RETURN_IF_ERROR(c->Merge(shapes.log_sum_exp, c->input(5), &merged));
  TF_RETURN_IF_ERROR(c->Merge(shapes.output, c->input(6), &merged));
  TF_RETURN_IF_ERROR(c->Merge(shapes.log_sum_exp, c->input(7), &merged));
  c->set_output(0, shapes.query);
  c->set_output(1, shapes.key);
  c->set_output(2, shapes.value);
  return absl::OkStatus();
}

}  // namespace

REGISTER_OP("StfAttention")
    .Input("query: T")
    .Input("key: T")
    .Input("value: T")
    .Input("lengths: int32")
    .Output("output: T")
    .Output("log_sum_exp: float")
    .Attr("T: {float, bfloat16, half}")
    .Attr("components: list(int)")
    .Attr("program_begin: list(int)")
    .Attr("layouts: string")
    .Attr("scale: float")
    .SetShapeFn(ForwardShapes)
    .Doc(R"doc(
Scaled dot-product attention over the pairs of a sparse causal pattern.

query: [batch, position, head, key_depth].
key: as query.
value: [batch, position, head, value_depth].
lengths: [batch] positions in use of each sequence, or [0]: all are.
output: [batch, position, head, value_depth]; 0 where a query attends to nothing.
log_sum_exp: [batch, head, position], natural logarithm; -infinity where a query attends to nothing.
components: records of six integers: kind, a, b, c, d, exclude (see stf_component).
program_begin: head h runs records program_begin[p] ... program_begin[p + 1] - 1, p = h mod (size - 1).
layouts: bits of the block layouts, least significant first.
scale: factor of the scores.
)doc");

REGISTER_OP("StfAttentionGrad")
    .Input("query: T")
    .Input("key: T")
    .Input("value: T")
    .Input("lengths: int32")
    .Input("output: T")
    .Input("log_sum_exp: float")
    .Input("output_grad: T")
    .Input("log_sum_exp_grad: float")
    .Output("query_grad: T")
    .Output("key_grad: T")
    .Output("value_grad: T")
    .Attr("T: {float, bfloat16, half}")
    .Attr("components: list(int)")
    .Attr("program_begin: list(int)")
    .Attr("layouts: string")
    .Attr("scale: float")
    .SetShapeFn(GradientShapes)
    .Doc(R"doc(
Gradients of StfAttention. Deterministic.

output: of StfAttention.
log_sum_exp: of StfAttention.
output_grad: gradient with respect to output.
log_sum_exp_grad: gradient with respect to log_sum_exp.
query_grad: gradient with respect to query.
key_grad: gradient with respect to key.
value_grad: gradient with respect to value.
)doc");

}  // namespace stf
