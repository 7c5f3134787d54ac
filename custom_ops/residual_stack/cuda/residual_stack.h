// A stack of residual blocks (Child et al. 2019, Eqs. 11-14) and its gradient, in float16 or bfloat16. Plain C; nothing is allocated,
// nothing waits, everything runs on the stream that is given.
//
// A block takes the residual stream x to x + a + b, where a = drop(W_p attend(norm(x) W_qkv + b_qkv) + b_p) and
// b = drop(W_2 f(W_1 norm(x + a) + b_1) + b_2), f(u) = u sigmoid(1.702 u). Normalizations have no scale and no offset of their own: those
// are part of the kernel and bias behind them (stf/layers/block.py). Matrix products are cuBLAS', the rest is ours, and each tensor that
// the gradient needs is written where it is kept.
#ifndef STF_CUSTOM_OPS_RESIDUAL_STACK_CUDA_RESIDUAL_STACK_H_
#define STF_CUSTOM_OPS_RESIDUAL_STACK_CUDA_RESIDUAL_STACK_H_

#include <stddef.h>

#include "custom_ops/attention/problem.h"

#ifdef __cplusplus
extern "C" {
#endif

// What a forward pass keeps of each block for the gradient, which computes the rest again.
enum stf_keep {
  STF_KEEP_STREAM = 0,     // every second block's input; two blocks are computed again at a time
  STF_KEEP_ATTENTION = 1,  // its input, and attention's output and log-sum-exp
  STF_KEEP_ALL = 2,        // both normalized streams, query, key and value, attention's output, the hidden layer before and after f
};

// Which positions of whole sequences a stack's are, where it has a part of them: position t of it is `first + t / run * step + t % run`
// of a sequence of `length`. Dropout's masks are then those of the whole. length 0: it has whole sequences.
typedef struct {
  int64_t length, first, run, step;
} stf_part;

typedef struct {
  int64_t blocks;
  int64_t width, hidden_width;  // of the stream; of the feed-forward layer
  int32_t keep;                 // stf_keep
  float epsilon;                // added to variances
  // A word below `drop_below` (of 2^32) drops an element; what stays is multiplied by `drop_scale`. 0: nothing is dropped.
  uint32_t drop_below;
  float drop_scale;
  const int32_t* seed;  // [2], device memory
  stf_part part;
  // Block k runs attention[k mod period]. All of one batch, positions, heads, depths and dtype, which are the stack's; no lengths.
  int32_t period;
  const stf_problem* attention;
} stf_stack;

// The weights of all blocks, or their gradients: [block, ...], row-major, device memory; kernels in the stack's dtype, biases in float32.
// `units` is heads (2 key_depth + value_depth).
typedef struct {
  void* projection_kernel;        // [block, width, units]
  float* projection_bias;         // [block, units]
  void* attention_output_kernel;  // [block, heads value_depth, width]
  float* attention_output_bias;   // [block, width]
  void* hidden_kernel;            // [block, width, hidden_width]
  float* hidden_bias;             // [block, hidden_width]
  void* output_kernel;            // [block, hidden_width, width]
  float* output_bias;             // [block, width]
} stf_stack_weights;

// What is kept: so many rows, one for each block or two, of elements of the stack's dtype and of floats.
int64_t stf_stack_kept_rows(const stf_stack* stack);
int64_t stf_stack_kept(const stf_stack* stack);
int64_t stf_stack_kept_statistics(const stf_stack* stack);

// Bytes of device memory, aligned to 256, that a call needs as `workspace`.
size_t stf_stack_cuda_forward_workspace(const stf_stack* stack);
size_t stf_stack_cuda_backward_workspace(const stf_stack* stack);

// input, output: [batch, position, width]. kept: [rows, stf_stack_kept], statistics: [rows, stf_stack_kept_statistics], both as the
// gradient takes them; `kept` may be `input` where that is all there is to keep. Returns null, or what went wrong.
const char* stf_stack_cuda_forward(const stf_stack* stack, const stf_stack_weights* weights, const void* input, void* output, void* kept,
                                   float* statistics, void* workspace, void* stream);

// Gradients of a scalar loss from that of the output. Every element is written; the same bits every time.
const char* stf_stack_cuda_backward(const stf_stack* stack, const stf_stack_weights* weights, const void* kept, const float* statistics,
                                    const void* output_grad, void* input_grad, const stf_stack_weights* grads, void* workspace,
                                    void* stream);

#ifdef __cplusplus
}
#endif

#endif  // STF_CUSTOM_OPS_RESIDUAL_STACK_CUDA_RESIDUAL_STACK_H_
