// What one attention call is: sizes, pattern and tensors, as plain C data. The CPU and the CUDA kernels both read it, and so can a
// test or a benchmark (ctypes). No TensorFlow header stands here or in any file below custom_ops/attention.
//
// Legend: B batch, T positions, H heads, D depth. Tensors are laid out [B, T, H, D]; the depth is contiguous, the rest has strides.
#ifndef STF_CUSTOM_OPS_ATTENTION_PROBLEM_H_
#define STF_CUSTOM_OPS_ATTENTION_PROBLEM_H_

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

enum stf_dtype { STF_FLOAT32 = 0, STF_BFLOAT16 = 1, STF_FLOAT16 = 2 };

// The kinds of component that a pattern is a union of. Every one is causal (j <= i).
enum stf_kind {
  STF_CAUSAL = 0,     // every j
  STF_LOCAL = 1,      // i - j <= a
  STF_STRIDED = 2,    // (i - j) mod a = 0 and i - j >= b * a
  STF_OWN_BLOCK = 3,  // j div a = i div a; counted from the document's first position where d = 1
  STF_SUMMARY = 4,    // b <= j mod a < c; of earlier blocks (j div a < i div a), and where d > 0 of the own block, i - j >= d - 1
  STF_BLOCKS = 5,     // layout[i div a][j div a], an a-sized block layout of c x c blocks whose bits begin at bit b of `layouts`; counted
                      // from the document's first position where d = 1
  STF_COLUMNS = 6,    // as STF_SUMMARY, counted from the document's first position
};

// One component. `exclude` has bit t set where the keys of the head's t-th component (t less than this one's index) are left out, so that
// the components of a union are disjoint.
typedef struct {
  int64_t kind;  // stf_kind
  int64_t a, b, c, d;
  int64_t exclude;
} stf_component;

typedef struct {
  int64_t batch, positions, heads;  // B, T, H
  int64_t key_depth, value_depth;   // depth of query and key; depth of value and output
  int32_t dtype;                    // stf_dtype of query, key, value, output and their gradients
  float scale;                      // scores are scale * (query . key)
  // Head h runs program h mod programs: components[program_begin[p]] ... components[program_begin[p + 1] - 1].
  int32_t programs;
  const int32_t* program_begin;  // [programs + 1]
  const stf_component* components;
  const uint8_t* layouts;  // bits of all block layouts, row-major, least significant bit first; may be null
  const int32_t* lengths;  // [B] positions in use of each sequence, or null: all are. Rows past it have no key.
  // [B, T, 2] Documents, which queries and keys of a pair share: of each position the first that it may attend to, and the one behind the
  // last that may attend to it. Both never fall from one position to the next. Of the documents these are the ends; a position i that is
  // of none has i + 1 and i. What is there is read and weighs nothing, so it must be finite (past a length there may be anything).
  // Null: a sequence is one document.
  const int32_t* documents;
  const float* sinks;  // [H] a score in every softmax of a head that has no value: it takes weight from the keys. Null: none
  int64_t key_heads;   // of key and value, which divide the heads: each is that of as many heads, one after another. 0: as many as heads
} stf_problem;

// A [B, T, H, D] tensor: strides in elements, depth contiguous.
typedef struct {
  void* data;
  int64_t batch_stride, position_stride, head_stride;
} stf_tensor;

#ifdef __cplusplus
}
#endif

#endif  // STF_CUSTOM_OPS_ATTENTION_PROBLEM_H_
