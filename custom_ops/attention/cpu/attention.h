// The CPU kernels' entry points. Plain C; they neither allocate outputs nor start threads.
#ifndef STF_CUSTOM_OPS_ATTENTION_CPU_ATTENTION_H_
#define STF_CUSTOM_OPS_ATTENTION_CPU_ATTENTION_H_

#include "custom_ops/attention/problem.h"

#ifdef __cplusplus
extern "C" {
#endif

// Runs body(argument, worker) once for each worker in 0 ... workers - 1, on any threads, in any order, and returns when all have ended.
// Workers take their work from a shared counter, so that fewer threads than workers is right too. Null runs one worker in place.
typedef struct {
  void* context;
  void (*run)(void* context, int32_t workers, void (*body)(void* argument, int32_t worker), void* argument);
  int32_t workers;  // how many run at once at the most
} stf_parallel;

// out [B, T, H, value_depth], log_sum_exp [B, H, T] float32 (natural logarithm). Every element of both is written.
// Returns 0, or 1 where memory for the workers' scratch could not be had.
int stf_attention_cpu_forward(const stf_problem* problem, const stf_tensor* query, const stf_tensor* key, const stf_tensor* value,
                              const stf_tensor* output, float* log_sum_exp, const stf_parallel* parallel);

// Gradients of a scalar loss, from those with respect to output and log_sum_exp (null: zero). Every element is written. The bits do not
// depend on the number of workers. Returns as above.
int stf_attention_cpu_backward(const stf_problem* problem, const stf_tensor* query, const stf_tensor* key, const stf_tensor* value,
                               const stf_tensor* output, const float* log_sum_exp, const stf_tensor* output_grad,
                               const float* log_sum_exp_grad, const stf_tensor* query_grad, const stf_tensor* key_grad,
                               const stf_tensor* value_grad, const stf_parallel* parallel);

// Name of the instruction set that the kernels run with here: "avx512", "avx2" or "generic". STF_CPU_ISA in the environment may ask for a
// lesser one (for tests).
const char* stf_attention_cpu_isa(void);

#ifdef __cplusplus
}
#endif

#endif  // STF_CUSTOM_OPS_ATTENTION_CPU_ATTENTION_H_
