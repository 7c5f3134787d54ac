// What the instruction-set independent half (attention.cc, schedule.cc) and the kernels compiled once for each instruction set share.
#ifndef STF_CUSTOM_OPS_ATTENTION_CPU_KERNELS_H_
#define STF_CUSTOM_OPS_ATTENTION_CPU_KERNELS_H_

#include <stddef.h>
#include <stdint.h>

#include "custom_ops/attention/problem.h"

namespace stf {
namespace cpu {

constexpr int kLanes = 64;    // queries in a tile: the lanes of the score tile's rows
constexpr int kKeys = 64;     // keys in a segment: the score tile's rows, at the most
constexpr int kGranule = 16;  // granularity, in lanes and in keys, at which masked-out work is left out

// Components of one head that share their queries' sequences, so that one online softmax serves them all: either every component that
// runs over plain positions, or a single strided one.
struct Pass {
  const stf_component* program;  // the head's first component: what `exclude` bits count from
  const int32_t* members;        // indices into `program`
  int count;
  int64_t stride;  // query m of sequence r stands at position r + m * stride
  bool first;      // the head's first pass: it writes where later ones add
  bool last;
};

// One piece of work: some query tiles of one sequence of one head of one batch row.
struct Item {
  int64_t batch, head, sequence;
  int64_t key_head;  // of keys and values
  int64_t tile_begin, tile_end;
  const Pass* pass;
  bool whole;  // the whole sequence: keys and their gradients are kept in the worker's scratch
  // Backward, unless whole. For each tile of the sequence, the first key position that it may still add to; then, in one more element,
  // a number of tiles that are done from the first on.
  int64_t* progress;
  int64_t tiles;
};

// A tensor whose data is null is not in use.
struct Arguments {
  const stf_problem* problem;
  stf_tensor query, key, value, output;
  float* log_sum_exp;      // [B, H, T]
  stf_tensor partial;      // float32: the output between a head's passes; `output` itself where that is float32
  stf_tensor output_grad;  // from here on: backward
  const float* log_sum_exp_grad;
  stf_tensor query_grad, key_grad, value_grad;
  stf_tensor query_sum, key_sum, value_sum;  // float32, of all heads: the gradients while they are summed, or the gradients themselves
};

// The kernels of one instruction set.
struct Kernels {
  const char* name;
  size_t (*forward_scratch)(const stf_problem&, bool whole);  // bytes a worker needs
  size_t (*backward_scratch)(const stf_problem&, bool whole);
  void (*forward)(const Arguments&, const Item&, char* scratch);
  void (*backward)(const Arguments&, const Item&, char* scratch);
  // `depth` floats to dtype: the last step where gradients were summed in float32.
  void (*convert)(const float* from, int32_t dtype, int64_t depth, void* to);
};

extern const Kernels kGenericKernels;
#if defined(__x86_64__)
extern const Kernels kAvx2Kernels;
extern const Kernels kAvx512Kernels;
#endif

constexpr int64_t kDone = INT64_MAX;   // the progress of a tile that adds nothing any more
constexpr int64_t kWholeLimit = 2048;  // the longest sequence that is worked on whole

void Yield();  // gives the processor to another thread while waiting for a turn

// Padded depth: rows in scratch are whole vectors of the widest instruction set. (Static: see simd.h on merged inline functions.)
static inline int64_t Padded(int64_t depth) { return (depth + 15) / 16 * 16; }

}  // namespace cpu
}  // namespace stf

#endif  // STF_CUSTOM_OPS_ATTENTION_CPU_KERNELS_H_
