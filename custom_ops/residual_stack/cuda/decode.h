// One more position of every sequence through all blocks of a stack, beside caches of the keys and values before it. Plain C; nothing is
// allocated, nothing waits, everything runs on the stream that is given.
//
// The blocks are those of residual_stack.h. All of them are one launch: the stream is a few rows, so that a product takes less time than a
// launch does. Sums, the stream between blocks and all that is not in a cache are float32.
#ifndef STF_CUSTOM_OPS_RESIDUAL_STACK_CUDA_DECODE_H_
#define STF_CUSTOM_OPS_RESIDUAL_STACK_CUDA_DECODE_H_

#include <stddef.h>

#include "custom_ops/residual_stack/cuda/residual_stack.h"

#ifdef __cplusplus
extern "C" {
#endif

// How much of each a call may have.
enum {
  STF_DECODE_PARTS = 48,     // of a cache, in all patterns
  STF_DECODE_PROGRAMS = 48,  // in all patterns
  STF_DECODE_PATTERNS = 16,  // that the blocks take in turn
};

// A part of a cache: the keys and values that one component of a program keeps, for the heads of that program.
typedef struct {
  void *keys, *values;  // [layer, slot, batch, head of the program, depth], in the cache's dtype
  int64_t slots;        // of a layer
  int64_t reads;        // how many numbers of `reads` are this part's; they stand behind those of the parts before
} stf_cache_part;

typedef struct {
  int64_t blocks, batch, width, hidden_width;
  int64_t heads, key_depth, value_depth;
  int32_t dtype, cache_dtype;  // stf_dtype of input, output and kernels; of the caches: the same or float32
  float epsilon, scale;        // as in stf_stack and stf_problem
  // Block k runs pattern k mod period, whose layer k div period its caches' parts hold. Head h of pattern m runs its program h mod
  // (first_program[m + 1] - first_program[m]), whose parts are those from first_part[program] to before first_part[program + 1].
  int32_t period;
  const int32_t* first_program;  // [period + 1]
  const int32_t* first_part;     // [programs + 1]
  const stf_cache_part* parts;
  // Device memory. Numbers must be below the part's `slots`, which nothing checks.
  const int32_t* reads;   // [the sum of all parts'] slots that the position attends to, its own among them; -1: none
  const int32_t* writes;  // [parts] the slot that the position's key and value are written to, or -1
} stf_decode;

// Bytes of device memory, aligned to 256, that a call needs as `workspace`, on whichever GPU. Dtypes and device memory are not looked at.
size_t stf_stack_cuda_decode_workspace(const stf_decode* decode);

// input, output: [batch, width]. All heads' softmax is over what is read of all parts of their program; attention to nothing gives 0.
// Deterministic. Returns null, or what went wrong.
const char* stf_stack_cuda_decode(const stf_decode* decode, const stf_stack_weights* weights, const void* input, void* output,
                                  void* workspace, void* stream);

#ifdef __cplusplus
}
#endif

#endif  // STF_CUSTOM_OPS_RESIDUAL_STACK_CUDA_DECODE_H_
