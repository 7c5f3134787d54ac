// The program of a stack: which products, attention calls and row-wise passes make its blocks, and where each writes.
#include "custom_ops/residual_stack/cuda/residual_stack.h"

#include <algorithm>
#include <utility>

#include "custom_ops/attention/cuda/attention.h"
#include "custom_ops/residual_stack/cuda/activations.h"
#include "custom_ops/residual_stack/cuda/matmul.h"
#include "custom_ops/residual_stack/cuda/rowwise.h"

namespace {

using namespace stf::cuda;  // NOLINT: this file is the library's face

// A block's weights.
stf_stack_weights OfBlock(const stf_stack& stack, const stf_stack_weights& w, int64_t block) {
  const Sizes s(stack);
  auto kernel = [block](void* data, int64_t elements) { return static_cast<char*>(data) + block * elements * kElement; };
  return {kernel(w.projection_kernel, s.width * s.units),        w.projection_bias + block * s.units,
          kernel(w.attention_output_kernel, s.values * s.width), w.attention_output_bias + block * s.width,
          kernel(w.hidden_kernel, s.width * s.hidden),           w.hidden_bias + block * s.hidden,
          kernel(w.output_kernel, s.hidden * s.width),           w.output_bias + block * s.width};
}

// A row-major [batch, position, ...] tensor as attention takes it: rows of `columns`, of which `depth` a head begin at `from`.
stf_tensor Heads(const stf_problem& p, char* data, int64_t columns, int64_t from, int64_t depth) {
  return {data + from * kElement, p.positions * columns, columns, depth};
}

size_t AttentionWorkspace(const stf_stack& stack, bool gradient) {
  size_t most = 0;
  for (int i = 0; i < stack.period; i++) {
    const stf_problem* p = &stack.attention[i];
    most = std::max(most, gradient ? stf_attention_cuda_backward_workspace(p) : stf_attention_cuda_forward_workspace(p));
  }
  return most;
}

// A pass over the stack. After the first failure nothing is launched any more.
class Pass {
 public:
  Pass(const stf_stack& stack, const stf_stack_weights& weights, Arena* arena, bool gradient, void* stream)
      : stack_(stack),
        weights_(weights),
        sizes_(stack),
        stream_(static_cast<cudaStream_t>(stream)),
        matmul_(stack.attention[0].dtype, arena->Take(kMatmulWorkspace), stream_),
        attention_workspace_(arena->Take(AttentionWorkspace(stack, gradient))),
        branch_(arena->Take(sizes_.rows * std::max(sizes_.width, gradient ? sizes_.values : 0) * kElement)),
        projection_bias_(arena->Take(stack.blocks * sizes_.units * kElement)),
        hidden_bias_(arena->Take(stack.blocks * sizes_.hidden * kElement)) {
    for (int64_t i = 0; i < kSegment; i++) shared_[i] = i < (gradient ? Segment(stack) : 1) ? Shared(stack, arena) : shared_[0];
  }

  const char* error() const { return matmul_.error() ? matmul_.error() : error_; }

 protected:
  void Check(int error) {
    if (error && !error_) error_ = stf_attention_cuda_error(error);
  }
  bool Failed() const { return error() != nullptr; }

  Rows RowsOf(int64_t width) const { return {stack_.attention[0].dtype, sizes_.rows, width, stream_}; }
  Dropout DropoutOf(int64_t block, int32_t addition) const {
    return {stack_.seed, stack_.drop_below,        stack_.drop_scale, static_cast<int32_t>(block),
            addition,    Problem(block).positions, stack_.part};
  }
  const stf_problem& Problem(int64_t block) const { return stack_.attention[block % stack_.period]; }
  stf_stack_weights Weights(int64_t block) const { return OfBlock(stack_, weights_, block); }

  // For ForwardToActivated.
  void RoundBiases() {
    const int32_t dtype = stack_.attention[0].dtype;
    Check(Round(dtype, weights_.projection_bias, projection_bias_, stack_.blocks * sizes_.units, stream_));
    Check(Round(dtype, weights_.hidden_bias, hidden_bias_, stack_.blocks * sizes_.hidden, stream_));
  }

  // Query, key and value in rows of units.
  void Unpack(int64_t block, char* units, stf_tensor tensors[3]) const {
    const stf_problem& p = Problem(block);
    const int64_t keys = p.heads * p.key_depth;
    tensors[0] = Heads(p, units, sizes_.units, 0, p.key_depth);
    tensors[1] = Heads(p, units, sizes_.units, keys, p.key_depth);
    tensors[2] = Heads(p, units, sizes_.units, 2 * keys, p.value_depth);
  }
  stf_tensor Values(int64_t block, char* heads) const {
    const stf_problem& p = Problem(block);
    return Heads(p, heads, sizes_.values, 0, p.value_depth);
  }

  // input + the branch, to output; normalized, where `normalized` is not null.
  void Add(const void* input, const float* bias, int64_t block, int32_t addition, void* output, void* normalized, float* inv_std) {
    if (Failed()) return;
    Check(AddAndNormalize(RowsOf(sizes_.width), input, branch_, bias, DropoutOf(block, addition), stack_.epsilon, output, normalized,
                          inv_std));
  }
  void Normalize(const void* input, void* normalized, float* inv_std) {
    if (Failed()) return;
    Check(AddAndNormalize(RowsOf(sizes_.width), input, nullptr, nullptr, {}, stack_.epsilon, nullptr, normalized, inv_std));
  }

  // From a block's normalized input to its hidden layer after f. `middle`, unless null, gets the stream
  // after attention, and may be `input`.
  void ForwardToActivated(int64_t block, const Activations& a, const void* input, void* middle, bool with_attention) {
    const Sizes& s = sizes_;
    const stf_stack_weights w = Weights(block);
    matmul_.Forward(a.normalized, w.projection_kernel, projection_bias_ + block * s.units * kElement, a.units, s.rows, s.width, s.units);
    if (with_attention && !Failed()) {
      stf_tensor inputs[3];
      Unpack(block, a.units, inputs);
      const stf_tensor heads = Values(block, a.heads);
      Check(stf_attention_cuda_forward(&Problem(block), &inputs[0], &inputs[1], &inputs[2], &heads, a.log_sum_exp, attention_workspace_,
                                       stream_));
    }
    matmul_.Forward(a.heads, w.attention_output_kernel, nullptr, branch_, s.rows, s.values, s.width);
    Add(input, w.attention_output_bias, block, 0, middle, a.second_normalized, a.second_inv_std);
    matmul_.Forward(a.second_normalized, w.hidden_kernel, hidden_bias_ + block * s.hidden * kElement, a.hidden, s.rows, s.width, s.hidden);
    if (!Failed()) Check(Activate(RowsOf(s.hidden), a.hidden, a.activated));
  }

  // From there to the block's end: `stream`, from the stream after attention on, in place; normalized for the next block, if there is one.
  void ForwardToEnd(int64_t block, const Activations& a, void* stream, const Activations& next) {
    const stf_stack_weights w = Weights(block);
    matmul_.Forward(a.activated, w.output_kernel, nullptr, branch_, sizes_.rows, sizes_.hidden, sizes_.width);
    Add(stream, w.output_bias, block, 1, stream, next.normalized, next.inv_std);
  }

  const stf_stack& stack_;
  const stf_stack_weights& weights_;
  const Sizes sizes_;
  cudaStream_t stream_;
  Matmul matmul_;
  char* attention_workspace_;
  Activations shared_[kSegment];          // of the blocks of a segment
  char* branch_;                          // [rows, width]: what a product gives to be added to the stream, or its gradient
  char *projection_bias_, *hidden_bias_;  // [block, ...] in the stack's dtype, as products take them
  const char* error_ = nullptr;
};

class Forward : public Pass {
 public:
  Forward(const stf_stack& stack, const stf_stack_weights& weights, Arena* arena, void* stream)
      : Pass(stack, weights, arena, false, stream) {}

  void Run(const void* input, void* output, void* kept, float* statistics) {
    auto activations = [&](int64_t block) { return Merge(Kept(stack_, kept, statistics, block), shared_[0]); };
    RoundBiases();
    Activations a = activations(0);
    if (a.stream && a.stream != input)
      Check(cudaMemcpyAsync(a.stream, input, sizes_.rows * sizes_.width * kElement, cudaMemcpyDeviceToDevice, stream_));
    Normalize(input, a.normalized, a.inv_std);
    for (int64_t block = 0; block < stack_.blocks; block++) {
      const Activations next = block + 1 < stack_.blocks ? activations(block + 1) : Activations{};
      // The stream lies where it is kept, or in `output`; the middle of a block where its end will be.
      void* end = next.stream ? next.stream : output;
      ForwardToActivated(block, a, input, end, /*with_attention=*/true);
      ForwardToEnd(block, a, end, next);
      input = end;
      a = next;
    }
  }
};

class Backward : public Pass {
 public:
  Backward(const stf_stack& stack, const stf_stack_weights& weights, Arena* arena, void* stream)
      : Pass(stack, weights, arena, true, stream),
        dropped_(stack.drop_below ? arena->Take(sizes_.rows * sizes_.width * kElement) : nullptr),
        hidden_grad_(stack.keep == STF_KEEP_ALL ? arena->Take(sizes_.rows * std::max(sizes_.hidden, sizes_.units) * kElement) : nullptr),
        segment_stream_(Segment(stack) > 1 ? arena->Take(sizes_.rows * sizes_.width * kElement) : nullptr),
        sums_(arena->TakeFloats(kParts * SumsWidth())) {}

  void Run(const void* kept, const float* statistics, const void* upstream, void* input_grad, const stf_stack_weights& grads) {
    const Sizes& s = sizes_;
    const int64_t stride = SumsWidth();
    float *of_output = sums_, *of_hidden = of_output + s.width, *of_attention_output = of_hidden + s.hidden,
          *of_units = of_attention_output + s.width;
    // The stream's gradient is in `upstream`, then in `input_grad`. What of it reaches a branch:
    const void* grad = upstream;
    auto branch_grad = [&] { return dropped_ ? dropped_ : grad; };
    if (stack_.keep != STF_KEEP_ALL) RoundBiases();
    Drop(upstream, stack_.blocks - 1, of_output);
    for (int64_t block = stack_.blocks - 1; block >= 0 && !Failed(); block--) {
      const int64_t first = block - block % Segment(stack_);
      if (stack_.keep != STF_KEEP_ALL && (block + 1 == stack_.blocks || block - first + 1 == Segment(stack_))) {
        Recompute(first, block, kept, statistics);
      }
      const Activations a = Of(block, kept, statistics);
      const stf_stack_weights w = Weights(block), g = OfBlock(stack_, grads, block);
      char* hidden_grad = hidden_grad_ ? hidden_grad_ : a.activated;  // which is used up when this is made
      char* units_grad = hidden_grad;                                 // likewise
      // Of the feed-forward layers.
      matmul_.KernelGradient(a.activated, branch_grad(), g.output_kernel, s.rows, s.hidden, s.width);
      matmul_.InputGradient(branch_grad(), w.output_kernel, hidden_grad, s.rows, s.hidden, s.width);
      if (!Failed()) Check(ActivateGradient(RowsOf(s.hidden), a.hidden, hidden_grad, of_hidden, stride));
      matmul_.KernelGradient(a.second_normalized, hidden_grad, g.hidden_kernel, s.rows, s.width, s.hidden);
      matmul_.InputGradient(hidden_grad, w.hidden_kernel, branch_, s.rows, s.width, s.hidden);
      ThroughNormalization(grad, a.second_normalized, a.second_inv_std, block, 0, input_grad, dropped_, of_attention_output);
      grad = input_grad;
      // Of the attention.
      matmul_.KernelGradient(a.heads, branch_grad(), g.attention_output_kernel, s.rows, s.values, s.width);
      matmul_.InputGradient(branch_grad(), w.attention_output_kernel, branch_, s.rows, s.values, s.width);
      AttentionGradient(block, a, units_grad);
      if (!Failed()) Check(SumRows(RowsOf(s.units), units_grad, of_units, stride));
      matmul_.KernelGradient(a.normalized, units_grad, g.projection_kernel, s.rows, s.width, s.units);
      matmul_.InputGradient(units_grad, w.projection_kernel, branch_, s.rows, s.width, s.units);
      FinishBiases(g);
      if (block > 0) {
        ThroughNormalization(grad, a.normalized, a.inv_std, block - 1, 1, input_grad, dropped_, of_output);
      } else {
        ThroughNormalization(grad, a.normalized, a.inv_std, 0, 0, input_grad, nullptr, nullptr);
      }
    }
  }

 private:
  Activations Of(int64_t block, const void* kept, const float* statistics) const {
    return Merge(Kept(stack_, kept, statistics, block), shared_[block % Segment(stack_)]);
  }

  // What is not kept of blocks `first` to `last`, all but the end of the last.
  void Recompute(int64_t first, int64_t last, const void* kept, const float* statistics) {
    Activations a = Of(first, kept, statistics);
    const void* input = a.stream;
    Normalize(input, a.normalized, a.inv_std);
    for (int64_t block = first; block <= last; block++) {
      const bool more = block < last;
      ForwardToActivated(block, a, input, more ? segment_stream_ : nullptr, stack_.keep == STF_KEEP_STREAM);
      if (!more) return;
      const Activations next = Of(block + 1, kept, statistics);
      ForwardToEnd(block, a, segment_stream_, next);
      input = segment_stream_;
      a = next;
    }
  }

  // The sums of a block's gradients over rows, to where they belong.
  void FinishBiases(const stf_stack_weights& g) {
    if (Failed()) return;
    const Sums sums = {{g.output_bias, g.hidden_bias, g.attention_output_bias, g.projection_bias},
                       {sizes_.width, sizes_.hidden, sizes_.width, sizes_.units}};
    Check(FinishSums(sums_, sums, stream_));
  }

  int64_t SumsWidth() const { return 2 * sizes_.width + sizes_.hidden + sizes_.units; }

  // The last block's second branch.
  void Drop(const void* upstream, int64_t block, float* sums) {
    Check(NormalizeGradient(RowsOf(sizes_.width), upstream, nullptr, nullptr, nullptr, DropoutOf(block, 1), nullptr, dropped_, sums,
                            SumsWidth()));
  }

  void ThroughNormalization(const void* upstream, const void* normalized, const float* inv_std, int64_t block, int32_t addition, void* grad,
                            void* dropped, float* sums) {
    if (Failed()) return;
    Check(NormalizeGradient(RowsOf(sizes_.width), upstream, branch_, normalized, inv_std, DropoutOf(block, addition), grad, dropped, sums,
                            SumsWidth()));
  }

  void AttentionGradient(int64_t block, const Activations& a, char* units_grad) {
    if (Failed()) return;
    stf_tensor inputs[3], grads[3];
    Unpack(block, a.units, inputs);
    Unpack(block, units_grad, grads);
    const stf_tensor heads = Values(block, a.heads), heads_grad = Values(block, branch_);
    Check(stf_attention_cuda_backward(&Problem(block), &inputs[0], &inputs[1], &inputs[2], &heads, a.log_sum_exp, &heads_grad, nullptr,
                                      &grads[0], &grads[1], &grads[2], attention_workspace_, stream_));
  }

  char* dropped_;         // null where nothing is dropped
  char* hidden_grad_;     // null where it takes the place of `activated`
  char* segment_stream_;  // of blocks that are computed again
  float* sums_;           // [kParts, SumsWidth()], in the order of FinishBiases
};

const char* Invalid(const stf_stack& stack) {
  const Sizes s(stack);
  if (stack.blocks < 1 || stack.period < 1) return "a stack must have a block";
  const int32_t dtype = stack.attention[0].dtype;
  if (dtype != STF_BFLOAT16 && dtype != STF_FLOAT16) return "a stack must be in bfloat16 or float16";
  for (const int64_t width : {s.width, s.hidden, s.units, s.values}) {
    if (width < 1 || width % kVector) return "widths must be multiples of 8";
  }
  if (s.width > kMostWidth) return "the width must be 2,048 or less";
  if (stack.keep < STF_KEEP_STREAM || stack.keep > STF_KEEP_ALL) return "keep must be from 0 to 2";
  return nullptr;
}

// The gradients of an empty batch.
const char* ClearGradients(const stf_stack& stack, const stf_stack_weights& g, cudaStream_t stream) {
  const Sizes s(stack);
  const std::pair<void*, int64_t> bytes[] = {
      {g.projection_kernel, s.width * s.units * kElement},        {g.projection_bias, s.units * int64_t{sizeof(float)}},
      {g.attention_output_kernel, s.values * s.width * kElement}, {g.attention_output_bias, s.width * int64_t{sizeof(float)}},
      {g.hidden_kernel, s.width * s.hidden * kElement},           {g.hidden_bias, s.hidden * int64_t{sizeof(float)}},
      {g.output_kernel, s.hidden * s.width * kElement},           {g.output_bias, s.width * int64_t{sizeof(float)}}};
  for (const auto& [data, of_block] : bytes) {
    const cudaError_t error = cudaMemsetAsync(data, 0, stack.blocks * of_block, stream);
    if (error != cudaSuccess) return cudaGetErrorString(error);
  }
  return nullptr;
}

}  // namespace

int64_t stf_stack_kept_rows(const stf_stack* stack) { return (stack->blocks + Segment(*stack) - 1) / Segment(*stack); }

int64_t stf_stack_kept(const stf_stack* stack) {
  const Sizes s(*stack);
  if (stack->keep == STF_KEEP_STREAM) return s.rows * s.width;
  if (stack->keep == STF_KEEP_ATTENTION) return s.rows * (s.width + s.values);
  return s.rows * (2 * s.width + s.units + s.values + 2 * s.hidden);
}

int64_t stf_stack_kept_statistics(const stf_stack* stack) {
  const Sizes s(*stack);
  if (stack->keep == STF_KEEP_STREAM) return 0;
  return s.statistics + (stack->keep == STF_KEEP_ALL ? 2 * s.rows : 0);
}

size_t stf_stack_cuda_forward_workspace(const stf_stack* stack) {
  Arena arena(nullptr);
  const stf_stack_weights none = {};
  Forward(*stack, none, &arena, nullptr);
  return arena.used();
}

size_t stf_stack_cuda_backward_workspace(const stf_stack* stack) {
  Arena arena(nullptr);
  const stf_stack_weights none = {};
  Backward(*stack, none, &arena, nullptr);
  return arena.used();
}

const char* stf_stack_cuda_forward(const stf_stack* stack, const stf_stack_weights* weights, const void* input, void* output, void* kept,
                                   float* statistics, void* workspace, void* stream) {
  if (const char* error = Invalid(*stack)) return error;
  if (Sizes(*stack).rows == 0) return nullptr;
  Arena arena(workspace);
  Forward pass(*stack, *weights, &arena, stream);
  pass.Run(input, output, kept, statistics);
  return pass.error();
}

const char* stf_stack_cuda_backward(const stf_stack* stack, const stf_stack_weights* weights, const void* kept, const float* statistics,
                                    const void* output_grad, void* input_grad, const stf_stack_weights* grads, void* workspace,
                                    void* stream) {
  if (const char* error = Invalid(*stack)) return error;
  if (Sizes(*stack).rows == 0) return ClearGradients(*stack, *grads, static_cast<cudaStream_t>(stream));
  Arena arena(workspace);
  Backward pass(*stack, *weights, &arena, stream);
  pass.Run(kept, statistics, output_grad, input_grad, *grads);
  return pass.error();
}
