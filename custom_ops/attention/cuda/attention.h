// The CUDA kernels' entry points. Plain C; nothing is allocated, nothing waits, everything runs on the stream that is given.
//
// Tensors, `lengths`, `layouts`, `documents` and `sinks` are device memory; the problem itself, its components and program_begin are host
// memory, read before the call returns. Sequences may have up to 2^30 - 1 positions.
#ifndef STF_CUSTOM_OPS_ATTENTION_CUDA_ATTENTION_H_
#define STF_CUSTOM_OPS_ATTENTION_CUDA_ATTENTION_H_

#include <stddef.h>

#include "custom_ops/attention/problem.h"

#ifdef __cplusplus
extern "C" {
#endif

// What an entry point refuses itself, beside CUDA's errors.
enum stf_cuda_refusal {
  STF_CUDA_OLD_DEVICE = -1,       // less shared memory than any tile fits in: older than compute capability 8.0
  STF_CUDA_UNKNOWN_KERNELS = -2,  // STF_CUDA_KERNELS in the environment asks for kernels that there are none of
};

// Bytes of device memory, aligned to 16, that a call needs as `workspace` (may be 0).
size_t stf_attention_cuda_forward_workspace(const stf_problem* problem);
size_t stf_attention_cuda_backward_workspace(const stf_problem* problem);

// Sums are float32 from end to end, with two exceptions: an output in halves that takes two launches is rounded between them (of three or
// more the workspace holds it), and so is each head's gradient of a key or value that heads share, before they are added.
//
// out [B, T, H, value_depth], log_sum_exp [B, H, T] float32 (natural logarithm). Every element of both is written. `stream` is a
// cudaStream_t. Returns 0, a
// cudaError_t or an stf_cuda_refusal.
int stf_attention_cuda_forward(const stf_problem* problem, const stf_tensor* query, const stf_tensor* key, const stf_tensor* value,
                               const stf_tensor* output, float* log_sum_exp, void* workspace, void* stream);

// Gradients of a scalar loss, from those with respect to output and log_sum_exp (null: zero). Every element is written; the same bits
// every time. Returns as above.
int stf_attention_cuda_backward(const stf_problem* problem, const stf_tensor* query, const stf_tensor* key, const stf_tensor* value,
                                const stf_tensor* output, const float* log_sum_exp, const stf_tensor* output_grad,
                                const float* log_sum_exp_grad, const stf_tensor* query_grad, const stf_tensor* key_grad,
                                const stf_tensor* value_grad, void* workspace, void* stream);

// In words, what an entry point returned.
const char* stf_attention_cuda_error(int error);

#ifdef __cplusplus
}
#endif

#endif  // STF_CUSTOM_OPS_ATTENTION_CUDA_ATTENTION_H_
