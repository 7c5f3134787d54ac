// Schema and shape functions of the attention op and its gradient, for every device. Kernels: kernel_cpu.cc, kernel_gpu.cc.
#include "tensorflow/core/framework/common_shape_fns.h"
#include "tensorflow/core/framework/op.h"
#include "tensorflow/core/framework/shape_inference.h"
#include "tensorflow/core/platform/errors.h"

namespace stf {
namespace {

using tensorflow::errors::InvalidArgument;
using tensorflow::shape_inference::DimensionHandle;
using tensorflow::shape_inference::InferenceContext;
using tensorflow::shape_inference::ShapeHandle;

struct Shapes {
  ShapeHandle query, key, value, output, log_sum_exp;
};

absl::Status WithRank(InferenceContext* c, const char* name, ShapeHandle input, const char* axes, int rank, ShapeHandle* shape) {
  if (c->WithRank(input, rank, shape).ok()) return absl::OkStatus();
  return InvalidArgument(name, " must be ", axes, ". Received: ", name, "=", c->DebugString(input));
}

// An input that a call may lack, a list of one or none. Where there is none, `shape` stays as it is.
absl::Status Optional(InferenceContext* c, const char* name, ShapeHandle* shape) {
  std::vector<ShapeHandle> given;
  TF_RETURN_IF_ERROR(c->input(name, &given));
  if (given.size() > 1) return InvalidArgument(name, " must be one tensor or none. Received: ", given.size(), " tensors");
  if (!given.empty()) *shape = given[0];
  return absl::OkStatus();
}

ShapeHandle Named(InferenceContext* c, const char* name) {
  std::vector<ShapeHandle> given;
  return c->input(name, &given).ok() && given.size() == 1 ? given[0] : c->UnknownShape();
}

// What is known of a shape from `shape` and from what it must equal.
absl::Status Agree(InferenceContext* c, const char* name, ShapeHandle shape, ShapeHandle wanted, ShapeHandle* agreed) {
  if (c->Merge(wanted, shape, agreed).ok()) return absl::OkStatus();
  return InvalidArgument(name, " must have shape ", c->DebugString(wanted), ". Received: ", name, "=", c->DebugString(shape));
}

// `shape` with another last axis.
ShapeHandle WithDepth(InferenceContext* c, ShapeHandle shape, DimensionHandle depth) {
  return c->MakeShape({c->Dim(shape, 0), c->Dim(shape, 1), c->Dim(shape, 2), depth});
}

// What lengths say of the batch; and a look at layout_bits, of which nothing follows.
absl::Status InferBatch(InferenceContext* c, DimensionHandle* batch) {
  ShapeHandle lengths = c->Vector(*batch), bits = c->Vector(c->UnknownDim());
  TF_RETURN_IF_ERROR(Optional(c, "lengths", &lengths));
  TF_RETURN_IF_ERROR(Optional(c, "layout_bits", &bits));
  TF_RETURN_IF_ERROR(WithRank(c, "layout_bits", bits, "[bytes]", 1, &bits));
  TF_RETURN_IF_ERROR(WithRank(c, "lengths", lengths, "[batch]", 1, &lengths));
  const DimensionHandle count = c->Dim(lengths, 0);
  if (c->ValueKnown(count) && c->Value(count) == 0) return absl::OkStatus();  // format 1: all positions are in use
  TF_RETURN_IF_ERROR(Agree(c, "lengths", lengths, c->Vector(*batch), &lengths));
  if (c->ValueKnown(count)) *batch = c->Dim(lengths, 0);
  return absl::OkStatus();
}

// That heads of key and value, where they are known, are as many and divide the query's.
absl::Status CheckKeyHeads(InferenceContext* c, DimensionHandle heads, DimensionHandle key_heads) {
  if (!c->ValueKnown(heads) || !c->ValueKnown(key_heads)) return absl::OkStatus();
  const int64_t of_query = c->Value(heads), of_key = c->Value(key_heads);
  if (of_key == of_query || (of_key > 0 && of_query > 0 && of_query % of_key == 0)) return absl::OkStatus();
  return InvalidArgument("key must have a number of heads that divides the query's, ", of_query, ". Received: ", of_key, " heads");
}

// That `documents`, if given, are [batch, position, 2], and sinks, which the op itself takes, [head].
absl::Status CheckDocumentsAndSinks(InferenceContext* c, ShapeHandle query, bool sinks) {
  ShapeHandle documents = c->MakeShape({c->Dim(query, 0), c->Dim(query, 1), 2}), wanted = documents;
  TF_RETURN_IF_ERROR(Optional(c, "documents", &documents));
  TF_RETURN_IF_ERROR(Agree(c, "documents", documents, wanted, &documents));
  if (!sinks) return absl::OkStatus();
  ShapeHandle of_heads = c->Vector(c->Dim(query, 2));
  wanted = of_heads;
  TF_RETURN_IF_ERROR(Optional(c, "sinks", &of_heads));
  return Agree(c, "sinks", of_heads, wanted, &of_heads);
}

// What query, key, value, lengths and layout_bits say of the shapes, each with what the others know of it.
absl::Status InferShapes(InferenceContext* c, Shapes* shapes) {
  constexpr char kAxes[] = "[batch, position, head, depth]";
  ShapeHandle query, key, value;
  TF_RETURN_IF_ERROR(WithRank(c, "query", c->input(0), kAxes, 4, &query));
  TF_RETURN_IF_ERROR(WithRank(c, "key", c->input(1), kAxes, 4, &key));
  TF_RETURN_IF_ERROR(WithRank(c, "value", c->input(2), kAxes, 4, &value));
  TF_RETURN_IF_ERROR(CheckKeyHeads(c, c->Dim(query, 2), c->Dim(key, 2)));
  const ShapeHandle of_key = c->MakeShape({c->Dim(query, 0), c->Dim(query, 1), c->Dim(key, 2), c->Dim(query, 3)});
  TF_RETURN_IF_ERROR(Agree(c, "key", key, of_key, &key));
  TF_RETURN_IF_ERROR(Agree(c, "value", value, WithDepth(c, key, c->Dim(value, 3)), &value));
  DimensionHandle batch = c->Dim(value, 0);
  TF_RETURN_IF_ERROR(InferBatch(c, &batch));
  const DimensionHandle positions = c->Dim(value, 1), heads = c->Dim(query, 2), key_depth = c->Dim(key, 3), depth = c->Dim(value, 3);
  shapes->query = c->MakeShape({batch, positions, heads, key_depth});
  shapes->key = c->MakeShape({batch, positions, c->Dim(key, 2), key_depth});
  shapes->value = c->MakeShape({batch, positions, c->Dim(value, 2), depth});
  shapes->output = c->MakeShape({batch, positions, heads, depth});
  shapes->log_sum_exp = c->MakeShape({batch, heads, positions});
  return absl::OkStatus();
}

absl::Status ForwardShapes(InferenceContext* c) {
  Shapes shapes;
  TF_RETURN_IF_ERROR(InferShapes(c, &shapes));
  TF_RETURN_IF_ERROR(CheckDocumentsAndSinks(c, shapes.query, true));
  c->set_output(0, shapes.output);
  c->set_output(1, shapes.log_sum_exp);
  return absl::OkStatus();
}

absl::Status GradientShapes(InferenceContext* c) {
  Shapes shapes;
  TF_RETURN_IF_ERROR(InferShapes(c, &shapes));
  TF_RETURN_IF_ERROR(CheckDocumentsAndSinks(c, shapes.query, false));
  ShapeHandle output = shapes.output, statistic = shapes.log_sum_exp;
  TF_RETURN_IF_ERROR(Agree(c, "output", Named(c, "output"), output, &output));
  TF_RETURN_IF_ERROR(Agree(c, "log_sum_exp", Named(c, "log_sum_exp"), statistic, &statistic));
  TF_RETURN_IF_ERROR(Agree(c, "output_grad", Named(c, "output_grad"), output, &output));
  ShapeHandle statistic_grad = statistic;
  TF_RETURN_IF_ERROR(Optional(c, "log_sum_exp_grad", &statistic_grad));
  TF_RETURN_IF_ERROR(Agree(c, "log_sum_exp_grad", statistic_grad, statistic, &statistic));
  c->set_output(0, shapes.query);
  c->set_output(1, shapes.key);
  c->set_output(2, shapes.value);
  return absl::OkStatus();
}

// The packed tensor's shape, [batch, position, width], and those of the output and of the log-sum-exp.
absl::Status InferPackedShapes(InferenceContext* c, ShapeHandle* packed, ShapeHandle* output, ShapeHandle* log_sum_exp) {
  TF_RETURN_IF_ERROR(WithRank(c, "query_key_value", c->input(0), "[batch, position, width]", 3, packed));
  int64_t heads, key_depth;
  TF_RETURN_IF_ERROR(c->GetAttr("num_heads", &heads));
  TF_RETURN_IF_ERROR(c->GetAttr("key_depth", &key_depth));
  DimensionHandle depth = c->UnknownDim();
  if (const DimensionHandle width = c->Dim(*packed, 2); c->ValueKnown(width)) {
    const int64_t values = c->Value(width) - 2 * heads * key_depth;
    if (values < heads || values % heads != 0)
      return InvalidArgument("query_key_value must have a width of num_heads * (2 key_depth + value_depth) with num_heads=", heads,
                             " and key_depth=", key_depth, ". Received: query_key_value=", c->DebugString(*packed));
    depth = c->MakeDim(values / heads);
  }
  DimensionHandle batch = c->Dim(*packed, 0);
  TF_RETURN_IF_ERROR(InferBatch(c, &batch));
  TF_RETURN_IF_ERROR(c->ReplaceDim(*packed, 0, batch, packed));
  *output = c->MakeShape({batch, c->Dim(*packed, 1), c->MakeDim(heads), depth});
  *log_sum_exp = c->MakeShape({batch, c->MakeDim(heads), c->Dim(*packed, 1)});
  return absl::OkStatus();
}

absl::Status PackedForwardShapes(InferenceContext* c) {
  ShapeHandle packed, output, log_sum_exp;
  TF_RETURN_IF_ERROR(InferPackedShapes(c, &packed, &output, &log_sum_exp));
  c->set_output(0, output);
  c->set_output(1, log_sum_exp);
  return absl::OkStatus();
}

absl::Status PackedGradientShapes(InferenceContext* c) {
  ShapeHandle packed, output, log_sum_exp;
  TF_RETURN_IF_ERROR(InferPackedShapes(c, &packed, &output, &log_sum_exp));
  TF_RETURN_IF_ERROR(Agree(c, "output", Named(c, "output"), output, &output));
  TF_RETURN_IF_ERROR(Agree(c, "log_sum_exp", Named(c, "log_sum_exp"), log_sum_exp, &log_sum_exp));
  TF_RETURN_IF_ERROR(Agree(c, "output_grad", Named(c, "output_grad"), output, &output));
  c->set_output(0, packed);
  return absl::OkStatus();
}

}  // namespace

REGISTER_OP("StfAttention")
    .Input("query: T")
    .Input("key: T")
    .Input("value: T")
    .Input("lengths: num_lengths * int32")
    .Input("layout_bits: num_layouts * uint8")
    .Input("documents: num_documents * int32")
    .Input("sinks: num_sinks * float")
    .Output("output: T")
    .Output("log_sum_exp: float")
    .Attr("T: {float, bfloat16, half}")
    .Attr("components: list(int)")
    .Attr("program_begin: list(int)")
    .Attr("scale: float")
    .Attr("num_lengths: int >= 0 = 1")
    .Attr("num_layouts: int >= 0 = 0")
    .Attr("num_documents: int >= 0 = 0")
    .Attr("num_sinks: int >= 0 = 0")
    .Attr("constant_log_sum_exp: bool = false")
    .Attr("format: int = 1")
    .Attr("layouts: string = ''")
    .SetShapeFn(ForwardShapes)
    .Doc(R"doc(
Scaled dot-product attention over the pairs of a sparse causal pattern.

query: [batch, position, head, key_depth].
key: [batch, position, key_head, key_depth]; the number of key heads divides that of heads. Each is that of as many heads, one after another.
value: [batch, position, key_head, value_depth].
lengths: [batch] positions in use of each sequence, or none: all are.
layout_bits: bits of the block layouts, least significant first; none where the pattern has none.
documents: [batch, position, 2]: of each position the first that it may attend to, and the one behind the last that may attend to it. Both never fall. None: a sequence is one document.
sinks: [head] a score in every softmax of a head that has no value, or none.
output: [batch, position, head, value_depth]; 0 where a query attends to nothing.
log_sum_exp: [batch, head, position], natural logarithm, the sink's score among the others; -infinity where there is none.
components: records of six integers: kind, a, b, c, d, exclude (see stf_component).
program_begin: from 0, never falling, to the number of records: head h runs records program_begin[p] ... program_begin[p + 1] - 1, p = h mod (size - 1).
scale: factor of the scores.
constant_log_sum_exp: whether nothing is differentiated through log_sum_exp.
format: of the attributes and inputs. 2: as here. 1: lengths are always there, [0] where all positions are in use.
layouts: the block layouts of format 1, which are not read any more.
)doc");

REGISTER_OP("StfAttentionGrad")
    .Input("query: T")
    .Input("key: T")
    .Input("value: T")
    .Input("lengths: num_lengths * int32")
    .Input("layout_bits: num_layouts * uint8")
    .Input("output: T")
    .Input("log_sum_exp: float")
    .Input("output_grad: T")
    .Input("log_sum_exp_grad: num_log_sum_exp_grads * float")
    .Input("documents: num_documents * int32")
    .Output("query_grad: T")
    .Output("key_grad: T")
    .Output("value_grad: T")
    .Attr("T: {float, bfloat16, half}")
    .Attr("components: list(int)")
    .Attr("program_begin: list(int)")
    .Attr("scale: float")
    .Attr("num_lengths: int >= 0 = 1")
    .Attr("num_layouts: int >= 0 = 0")
    .Attr("num_log_sum_exp_grads: int >= 0 = 1")
    .Attr("num_documents: int >= 0 = 0")
    .Attr("format: int = 1")
    .Attr("layouts: string = ''")
    .SetShapeFn(GradientShapes)
    .Doc(R"doc(
Gradients of StfAttention. Deterministic.

output: of StfAttention.
log_sum_exp: of StfAttention.
output_grad: gradient with respect to output.
log_sum_exp_grad: gradient with respect to log_sum_exp, or none: it is 0.
documents: of StfAttention. Its sinks are in log_sum_exp.
query_grad: gradient with respect to query.
key_grad: gradient with respect to key.
value_grad: gradient with respect to value.
)doc");

REGISTER_OP("StfPackedAttention")
    .Input("query_key_value: T")
    .Input("lengths: num_lengths * int32")
    .Input("layout_bits: num_layouts * uint8")
    .Output("output: T")
    .Output("log_sum_exp: float")
    .Attr("T: {float, bfloat16, half}")
    .Attr("num_heads: int >= 1")
    .Attr("key_depth: int >= 1")
    .Attr("components: list(int)")
    .Attr("program_begin: list(int)")
    .Attr("scale: float")
    .Attr("num_lengths: int >= 0 = 1")
    .Attr("num_layouts: int >= 0 = 0")
    .Attr("format: int = 1")
    .Attr("layouts: string = ''")
    .SetShapeFn(PackedForwardShapes)
    .Doc(R"doc(
StfAttention of what one matrix product gave, which needs not be taken apart.

query_key_value: [batch, position, num_heads * (2 key_depth + value_depth)]: queries of all heads, then keys, then values.
)doc");

REGISTER_OP("StfPackedAttentionGrad")
    .Input("query_key_value: T")
    .Input("lengths: num_lengths * int32")
    .Input("layout_bits: num_layouts * uint8")
    .Input("output: T")
    .Input("log_sum_exp: float")
    .Input("output_grad: T")
    .Output("query_key_value_grad: T")
    .Attr("T: {float, bfloat16, half}")
    .Attr("num_heads: int >= 1")
    .Attr("key_depth: int >= 1")
    .Attr("components: list(int)")
    .Attr("program_begin: list(int)")
    .Attr("scale: float")
    .Attr("num_lengths: int >= 0 = 1")
    .Attr("num_layouts: int >= 0 = 0")
    .Attr("format: int = 1")
    .Attr("layouts: string = ''")
    .SetShapeFn(PackedGradientShapes)
    .Doc(R"doc(
Gradient of StfPackedAttention. Deterministic.

output: of StfPackedAttention.
log_sum_exp: of StfPackedAttention.
output_grad: gradient with respect to output.
query_key_value_grad: gradient with respect to query_key_value.
)doc");

}  // namespace stf
