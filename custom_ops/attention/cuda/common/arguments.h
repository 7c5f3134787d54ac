// What host and kernels share: a call's tensors, and one launch's programs and numbering of tiles.
//
// Legend: B batch, T positions, H heads, D depth. A launch walks *sequences* of queries: query m of sequence s stands at position
// s * sequence_stride + m * stride. Plain positions are one sequence of stride 1; a strided component of stride l has l sequences; own
// blocks of l are T / l sequences of stride 1, l positions apart.
#ifndef STF_CUSTOM_OPS_ATTENTION_CUDA_COMMON_ARGUMENTS_H_
#define STF_CUSTOM_OPS_ATTENTION_CUDA_COMMON_ARGUMENTS_H_

#include <stdint.h>

#include "custom_ops/attention/problem.h"
#include "custom_ops/attention/sets.h"

namespace stf {
namespace cuda {

// stf_component in 32 bits: clamped to the number of positions, which changes no set. `bits` is where a block layout begins.
struct Component {
  int32_t kind, a, b, c, d;
  int64_t bits;
  uint64_t exclude;
  uint32_t reciprocal, shift;  // summary: x / (c - b) is x * reciprocal >> shift, for 0 <= x < 2^31
};

STF_SETS int64_t SummaryBlock(const Component& c, int64_t t) {
  return static_cast<int>(static_cast<uint64_t>(t) * c.reciprocal >> c.shift);
}
STF_SETS int64_t LayoutBegin(const Component& c) { return c.bits; }

// A component of a call with so many positions.
inline Component ComponentOf(const stf_component& from, int64_t positions) {
  const auto cut = [&](int64_t x) { return static_cast<int32_t>(x < positions ? x : positions); };
  Component c = {static_cast<int32_t>(from.kind),    cut(from.a), cut(from.b), cut(from.c), cut(from.d), 0,
                 static_cast<uint64_t>(from.exclude)};
  if (from.kind == STF_BLOCKS) {
    c.b = 0;
    c.c = static_cast<int32_t>(from.c);  // a layout's row, however long
    c.bits = from.b;
  }
  if (from.kind == STF_SUMMARY || from.kind == STF_COLUMNS) {
    c.d = static_cast<int32_t>(from.d < positions + 1 ? from.d : positions + 1);  // from there on, of no key of the own block
  }
  if (from.kind == STF_SUMMARY) {
    const uint64_t width = c.c > c.b ? c.c - c.b : 1;
    uint32_t bits = 0;
    while (uint64_t{1} << bits < width) bits++;
    c.shift = 31 + bits;
    c.reciprocal = static_cast<uint32_t>(((uint64_t{1} << c.shift) + width - 1) / width);
  }
  return c;
}

// Whether a component's keys lie apart in memory: a summary's, but for one of a single block.
STF_SETS bool IsScattered(const Component& c, int32_t positions) { return c.kind == STF_SUMMARY && c.a < positions; }

struct Arguments {
  stf_tensor query, key, value, output;
  stf_tensor output_partial;  // float: the output between launches; null: `output` holds it, rounded
  float* log_sum_exp;         // [B, H, T]
  stf_tensor output_grad;     // from here on: backward
  const float* log_sum_exp_grad;
  stf_tensor query_grad, key_grad, value_grad;
  stf_tensor query_partial, key_partial, value_partial;  // float: gradients between launches
  float* delta;                                          // [B, H, T]: sum of output * output_grad over depth, less log_sum_exp_grad
  const int32_t* lengths;                                // [B] or null
  const int32_t* documents;                              // [B, T, 2] or null
  const float* sinks;                                    // [H] or null
  const uint8_t* layouts;
  int32_t batch, positions, heads, key_depth, value_depth;
  int32_t group;  // heads that share a key's and a value's
  float scale;
  bool vector;  // whether rows may be read and written 16 bytes at a time
};

constexpr int kMaxComponents = 64;  // in a launch; a single head has 63 at the most
constexpr int kMaxPrograms = 64;

struct Launch {
  Component components[kMaxComponents];
  uint64_t members[kMaxPrograms];  // of a program's components, those that this launch is about; bit 0 is `begin`
  int16_t begin[kMaxPrograms];     // a program's first component
  int32_t number[kMaxPrograms];    // of the program: heads number, number + period, ... run it
  int32_t programs, period, component_count;
  int32_t head_slots;                                   // programs * the most heads that one of them has
  int32_t sequences, sequence_stride, stride, longest;  // longest: positions of the longest sequence
  int32_t tiles;                                        // of the longest sequence, or of the keys; packed: tiles full of sequences
  bool first, last;                                     // whether nothing was, or will be, added to the queries' results by other launches
  bool key_first, key_last;                             // the same of the keys' gradients
  bool key_write;       // whether the keys' gradients are written: last, or the last that has some of the keys
  bool sm90;            // whether its kernels are those of Hopper (sm90/)
  bool together;        // whether a sequence's tiles follow one another
  bool general;         // whether some component is irregular (see sets.h) or leaves out others
  int32_t run;          // sm90, backward in one pass: blocks of kBackwardKeys keys of a tile, of which `tiles` counts
  int32_t packed_rows;  // packed: rows of a tile that a sequence takes; sm90: as many as it is long
  int64_t work_tiles;   // sm90: tiles of rows in all
  bool persistent;      // sm90: blocks stay, and take every gridDim.x-th tile: each is short
};

// A tensor as Hopper's copy engine knows it (CUtensorMap), opaque.
struct alignas(64) TensorMap {
  uint64_t words[16];
};

// What the blocks of a launch copy: of each pair, first the tensor of depth key_depth, then that of depth value_depth. Rows are numbered as
// the launch's sequences are. Where some sequences have a position more than others, these `longer` first ones need a map of their own.
struct Maps {
  TensorMap own[2][2], streamed[2][2];  // [tensor][whether of a longer sequence]: a block's own rows, and those that it visits
  TensorMap summary[2];                 // the latter, by position, a few at a time: a summary's columns
  TensorMap output[2];                  // backward in one pass: outputs of rows that it visits
  int32_t own_rows, summary_rows;       // rows that are copied at a time
  int32_t longer;
};

}  // namespace cuda
}  // namespace stf

#endif  // STF_CUSTOM_OPS_ATTENTION_CUDA_COMMON_ARGUMENTS_H_
