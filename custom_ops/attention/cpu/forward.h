// Forward: for each tile of queries, scores of its keys, their softmax online, and the weighted sum of the values.
//
//   S = scale Q K^T,   lse_i = log sum_j exp S_ij,   O_i = sum_j exp(S_ij - lse_i) V_j        over the pattern's pairs (i, j)
#ifndef STF_CUSTOM_OPS_ATTENTION_CPU_FORWARD_H_
#define STF_CUSTOM_OPS_ATTENTION_CPU_FORWARD_H_

#include "custom_ops/attention/cpu/gemm.h"
#include "custom_ops/attention/cpu/softmax.h"
#include "custom_ops/attention/cpu/tile.h"

namespace stf {
namespace cpu {
namespace STF_ISA {

struct ForwardScratch {
  float *query_rows, *query;  // [kLanes, depth] as read; [depth, kLanes] transposed and scaled
  float* output;              // [kLanes, value_depth]
  float* scores;              // [kKeys, kLanes]
  KeyReader keys;
  size_t bytes;

  ForwardScratch(const stf_problem& p, char* memory, bool whole) {
    const int64_t key_row = Padded(p.key_depth), value_row = Padded(p.value_depth);
    const int64_t rows = whole ? kWholeLimit : kKeys;
    Scratch scratch(memory);
    query_rows = scratch.Floats(kLanes * key_row);
    query = scratch.Floats(kLanes * key_row);
    output = scratch.Floats(kLanes * value_row);
    scores = scratch.Floats(kKeys * kLanes);
    keys = {scratch.Floats(rows * key_row), scratch.Floats(rows * value_row), whole};
    bytes = scratch.used();
  }
};

// A head's score without a value, or -infinity: the log-sum-exp of a query without a key.
inline float SinkOf(const Arguments& args, const Item& item) {
  return args.problem->sinks ? args.problem->sinks[item.head] : -__builtin_inff();
}

// Rows of queries past the length: no key, so output 0.
inline void ForwardUnused(const Arguments& args, const Item& item, int64_t begin, int64_t end) {
  const stf_problem& p = *args.problem;
  for (int64_t m = begin; m < end; m++) {
    const int64_t position = item.sequence + m * item.pass->stride;
    __builtin_memset(Element(args.output, p.dtype, item.batch, position, item.head), 0, p.value_depth * ElementSize(p.dtype));
    args.log_sum_exp[(item.batch * p.heads + item.head) * p.positions + position] = SinkOf(args, item);
  }
}

inline void ReadQueries(const Arguments& args, const Item& item, const View& view, int64_t first, int lanes, const stf_tensor& tensor,
                        int64_t depth, float* rows) {
  const int32_t dtype = args.problem->dtype;
  const int64_t row = Padded(depth);
  for (int lane = 0; lane < lanes; lane++) {
    const char* from = Element(tensor, dtype, item.batch, view.Position(first + lane), item.head);
    if (item.whole) PrefetchNext(from, depth * ElementSize(dtype));
    ReadRow(from, dtype, depth, rows + lane * row);
  }
  const int64_t read = (lanes + kGranule - 1) / kGranule * kGranule;
  Fill(rows + lanes * row, (read - lanes) * row, 0);
}

// Where an earlier pass of the head left off: its output and log-sum-exp are a state of the online softmax.
inline void Continue(const Arguments& args, const Item& item, const View& view, int64_t first, int lanes, float* output,
                     SoftmaxState* state) {
  const stf_problem& p = *args.problem;
  const int64_t row = Padded(p.value_depth);
  for (int lane = 0; lane < lanes; lane++) {
    const int64_t position = view.Position(first + lane);
    const float log_sum_exp = args.log_sum_exp[(item.batch * p.heads + item.head) * p.positions + position];
    ReadRow(Element(args.partial, STF_FLOAT32, item.batch, position, item.head), STF_FLOAT32, p.value_depth, output + lane * row);
    state->top[lane] = log_sum_exp;
    state->sum[lane] = log_sum_exp == -__builtin_inff() ? 0.0f : 1.0f;
  }
}

inline void WriteOutput(const Arguments& args, const Item& item, const View& view, int64_t first, int lanes, float* output,
                        const SoftmaxState& state) {
  const stf_problem& p = *args.problem;
  const int64_t row = Padded(p.value_depth);
  const bool partial = !item.pass->last && args.partial.data;
  const stf_tensor& to = partial ? args.partial : args.output;
  const int32_t dtype = partial ? static_cast<int32_t>(STF_FLOAT32) : p.dtype;
  for (int lane = 0; lane < lanes; lane++) {
    const int64_t position = view.Position(first + lane);
    const float sum = state.sum[lane];
    const Vec factor = Broadcast(sum == 0 ? 0.0f : 1.0f / sum);
    float* x = output + lane * row;
    for (int64_t d = 0; d < row; d += kWidth) Store(x + d, Load(x + d) * factor);
    char* row_to = Element(to, dtype, item.batch, position, item.head);
    if (item.whole) PrefetchNext(row_to, p.value_depth * ElementSize(dtype));
    WriteRow(x, dtype, p.value_depth, row_to);
    args.log_sum_exp[(item.batch * p.heads + item.head) * p.positions + position] =
        sum == 0 ? -__builtin_inff() : state.top[lane] + __builtin_logf(sum);
  }
}

inline void ForwardTile(const Arguments& args, const Item& item, const View& view, int64_t first, int lanes, const ForwardScratch& s) {
  const stf_problem& p = *args.problem;
  const int64_t value_row = Padded(p.value_depth);
  ReadQueries(args, item, view, first, lanes, args.query, p.key_depth, s.query_rows);
  Transpose(s.query_rows, lanes, p.key_depth, p.scale, s.query);

  SoftmaxState state;
  state.Clear();
  if (item.pass->first) {
    Fill(s.output, lanes * value_row, 0);
    if (p.sinks) state.Begin(SinkOf(args, item));
  } else {
    Continue(args, item, view, first, lanes, s.output, &state);
  }
  Walk walk(p, *item.pass, view, first, first + lanes - 1);
  Segment segment;
  SegmentMask mask;
  while (walk.Next(&segment)) {
    FindMask(p, *item.pass, view, first, lanes, segment, &mask);
    if (mask.strip_count == 0) continue;
    const Keys keys = s.keys.Get(args, item, view, segment);
    Scores(mask, keys.key, keys.key_row, p.key_depth, s.query, s.scores);
    if (OnlineSoftmax(mask, lanes, s.scores, &state)) {
      for (int lane = 0; lane < lanes; lane++) {
        const Vec factor = Broadcast(state.rescale[lane]);
        float* x = s.output + lane * value_row;
        for (int64_t d = 0; d < value_row; d += kWidth) Store(x + d, Load(x + d) * factor);
      }
    }
    for (int i = 0; i < mask.strip_count; i++) {
      const Strip& strip = mask.strips[i];
      const int64_t lane = strip.granule_begin * kGranule, lane_end = Least(strip.granule_end * kGranule, lanes);
      Gemm(lane_end - lane, value_row, strip.end - strip.begin, Left{s.scores + strip.begin * kLanes + lane, 1, kLanes},
           keys.value + strip.begin * keys.value_row, keys.value_row, s.output + lane * value_row, value_row, true);
    }
  }
  WriteOutput(args, item, view, first, lanes, s.output, state);
}

inline void ForwardItem(const Arguments& args, const Item& item, char* memory) {
  const View view = ViewOf(args, item);
  const ForwardScratch scratch(*args.problem, memory, item.whole);
  if (item.whole) scratch.keys.Read(args, item, item.pass->program[item.pass->members[0]], view, 0, view.count);
  for (int64_t tile = item.tile_begin; tile < item.tile_end; tile++) {
    const int64_t first = tile * kLanes, end = Least(first + kLanes, Queries(args, item));
    const int64_t used = Most(first, Least(end, view.count));
    if (used > first) ForwardTile(args, item, view, first, static_cast<int>(used - first), scratch);
    if (item.pass->first) ForwardUnused(args, item, used, end);
  }
}

}  // namespace STF_ISA
}  // namespace cpu
}  // namespace stf

#endif  // STF_CUSTOM_OPS_ATTENTION_CPU_FORWARD_H_
