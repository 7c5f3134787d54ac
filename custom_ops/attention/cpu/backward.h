// Backward, from the output and the log-sum-exp of the whole pattern:
//
//   P = exp(S - lse),   delta_i = dO_i . O_i - dlse_i,   dS = scale P (dO V^T - delta)
//   dQ = dS K,   dK = dS^T Q,   dV = P^T dO                                                   over the pattern's pairs (i, j)
//
// Query tiles are the outer loop, so that a tile's dQ is its own. dK and dV are shared: in a whole sequence they are summed in the
// worker's scratch; else tiles of a sequence take turns, the earlier one first, key by key. Either way the order of every sum is that of
// the tiles, whatever the number of workers.
#ifndef STF_CUSTOM_OPS_ATTENTION_CPU_BACKWARD_H_
#define STF_CUSTOM_OPS_ATTENTION_CPU_BACKWARD_H_

#include "custom_ops/attention/cpu/forward.h"

namespace stf {
namespace cpu {
namespace STF_ISA {

struct BackwardScratch {
  float *query_rows, *query, *grad_rows, *grad;  // Q and dO of the tile, as read and transposed
  float* query_grad;                             // [kLanes, key_depth]
  float *scores, *score_grads;                   // [kKeys, kLanes]
  float *log_sum_exp, *delta, *row;
  KeyReader keys;
  float *key_grad, *value_grad;  // as many rows as `keys` has
  size_t bytes;

  BackwardScratch(const stf_problem& p, char* memory, bool whole) {
    const int64_t key_row = Padded(p.key_depth), value_row = Padded(p.value_depth);
    const int64_t rows = whole ? kWholeLimit : kKeys;
    Scratch scratch(memory);
    query_rows = scratch.Floats(kLanes * key_row);
    query = scratch.Floats(kLanes * key_row);
    grad_rows = scratch.Floats(kLanes * value_row);
    grad = scratch.Floats(kLanes * value_row);
    query_grad = scratch.Floats(kLanes * key_row);
    scores = scratch.Floats(kKeys * kLanes);
    score_grads = scratch.Floats(kKeys * kLanes);
    log_sum_exp = scratch.Floats(kLanes);
    delta = scratch.Floats(kLanes);
    row = scratch.Floats(value_row);
    keys = {scratch.Floats(rows * key_row), scratch.Floats(rows * value_row), whole};
    key_grad = scratch.Floats(rows * key_row);
    value_grad = scratch.Floats(rows * value_row);
    bytes = scratch.used();
  }
};

// A finished row of a gradient: into its float32 sum where there is one (the first pass' write, the others add), else straight out.
inline void WriteGradient(const Arguments& args, const Item& item, const stf_tensor& sum, const stf_tensor& grad, int64_t position,
                          int64_t depth, const float* row) {
  const int32_t dtype = sum.data ? static_cast<int32_t>(STF_FLOAT32) : args.problem->dtype;
  char* to = Element(sum.data ? sum : grad, dtype, item.batch, position, item.head);
  if (item.whole) PrefetchNext(to, depth * ElementSize(dtype));
  if (item.pass->first) {
    WriteRow(row, dtype, depth, to);
  } else {
    AddRow(row, depth, reinterpret_cast<float*>(to));
  }
}

inline void ClearGradient(const Arguments& args, const Item& item, const stf_tensor& sum, const stf_tensor& grad, int64_t position,
                          int64_t depth) {
  const int32_t dtype = sum.data ? static_cast<int32_t>(STF_FLOAT32) : args.problem->dtype;
  __builtin_memset(Element(sum.data ? sum : grad, dtype, item.batch, position, item.head), 0, depth * ElementSize(dtype));
}

// Waits until no earlier tile of the sequence will add to keys before position `end`.
inline void AwaitTurn(const Item& item, int64_t tile, int64_t end) {
  int64_t* finished = item.progress + item.tiles;
  int64_t done = __atomic_load_n(finished, __ATOMIC_ACQUIRE);
  while (done < tile && __atomic_load_n(item.progress + done, __ATOMIC_ACQUIRE) == kDone) done++;
  __atomic_store_n(finished, done, __ATOMIC_RELEASE);  // a race may set it back: it stays a number of tiles that are done
  for (int64_t earlier = done; earlier < tile; earlier++) {
    for (int tries = 0; __atomic_load_n(item.progress + earlier, __ATOMIC_ACQUIRE) < end; tries++) {
      if (tries > 64) Yield();
    }
  }
}

// The sums of a segment's keys to their place, in turn.
inline void AddKeyGradients(const Arguments& args, const Item& item, const View& view, int64_t tile, const Segment& segment,
                            const SegmentMask& mask, const BackwardScratch& s) {
  const stf_problem& p = *args.problem;
  const stf_component& c = *segment.component;
  AwaitTurn(item, tile, KeyPosition(c, view, segment.begin + segment.count - 1) + 1);
  for (int i = 0; i < mask.strip_count; i++) {
    for (int64_t t = mask.strips[i].begin; t < mask.strips[i].end; t++) {
      const int64_t position = KeyPosition(c, view, segment.begin + t);
      AddRow(s.key_grad + t * Padded(p.key_depth), p.key_depth,
             reinterpret_cast<float*>(Element(args.key_sum, STF_FLOAT32, item.batch, position, item.head)));
      AddRow(s.value_grad + t * Padded(p.value_depth), p.value_depth,
             reinterpret_cast<float*>(Element(args.value_sum, STF_FLOAT32, item.batch, position, item.head)));
    }
  }
}

// log_sum_exp and delta of the tile's lanes. Lanes without a query, or whose query has no key, get a weight of 2^-126
// that meets only zeros or a mask.
inline void ReadStatistics(const Arguments& args, const Item& item, const View& view, int64_t first, int lanes, const BackwardScratch& s) {
  const stf_problem& p = *args.problem;
  const int64_t value_row = Padded(p.value_depth);
  Fill(s.log_sum_exp, kLanes, 1e30f);
  Fill(s.delta, kLanes, 0);
  for (int lane = 0; lane < lanes; lane++) {
    const int64_t position = view.Position(first + lane);
    const int64_t statistic = (item.batch * p.heads + item.head) * p.positions + position;
    if (args.log_sum_exp[statistic] != -__builtin_inff()) s.log_sum_exp[lane] = args.log_sum_exp[statistic];
    const char* from = Element(args.output, p.dtype, item.batch, position, item.head);
    if (item.whole) PrefetchNext(from, p.value_depth * ElementSize(p.dtype));
    ReadRow(from, p.dtype, p.value_depth, s.row);
    Vec sum = {};
    for (int64_t d = 0; d < value_row; d += kWidth) sum += Load(s.row + d) * Load(s.grad_rows + lane * value_row + d);
    float delta = args.log_sum_exp_grad ? -args.log_sum_exp_grad[statistic] : 0.0f;
    for (int i = 0; i < kWidth; i++) delta += sum[i];
    s.delta[lane] = delta;
  }
}

inline void BackwardSegment(const stf_problem& p, int lanes, const Segment& segment, const SegmentMask& mask, const Keys& keys, bool whole,
                            const BackwardScratch& s) {
  const int64_t key_row = Padded(p.key_depth), value_row = Padded(p.value_depth);
  Scores(mask, keys.key, keys.key_row, p.key_depth, s.query, s.scores);
  Scores(mask, keys.value, keys.value_row, p.value_depth, s.grad, s.score_grads);
  SoftmaxGradient(mask, lanes, p.scale, s.log_sum_exp, s.delta, s.scores, s.score_grads);
  for (int i = 0; i < mask.strip_count; i++) {
    const Strip& strip = mask.strips[i];
    const int64_t lane = strip.granule_begin * kGranule, lane_end = Least(strip.granule_end * kGranule, lanes),
                  count = strip.end - strip.begin;
    const float* weights = s.scores + strip.begin * kLanes + lane;
    const float* score_grads = s.score_grads + strip.begin * kLanes + lane;
    const int64_t t = (whole ? segment.begin : 0) + strip.begin;
    Gemm(lane_end - lane, key_row, count, Left{score_grads, 1, kLanes}, keys.key + strip.begin * keys.key_row, keys.key_row,
         s.query_grad + lane * key_row, key_row, true);
    Gemm(count, value_row, lane_end - lane, Left{weights, kLanes, 1}, s.grad_rows + lane * value_row, value_row,
         s.value_grad + t * value_row, value_row, whole);
    Gemm(count, key_row, lane_end - lane, Left{score_grads, kLanes, 1}, s.query_rows + lane * key_row, key_row, s.key_grad + t * key_row,
         key_row, whole);
  }
}

inline void BackwardTile(const Arguments& args, const Item& item, const View& view, int64_t tile, int lanes, const BackwardScratch& s) {
  const stf_problem& p = *args.problem;
  const int64_t first = tile * kLanes, key_row = Padded(p.key_depth);
  ReadQueries(args, item, view, first, lanes, args.query, p.key_depth, s.query_rows);
  ReadQueries(args, item, view, first, lanes, args.output_grad, p.value_depth, s.grad_rows);
  Transpose(s.query_rows, lanes, p.key_depth, p.scale, s.query);
  Transpose(s.grad_rows, lanes, p.value_depth, 1, s.grad);
  ReadStatistics(args, item, view, first, lanes, s);
  Fill(s.query_grad, lanes * key_row, 0);

  Walk walk(p, *item.pass, view, first, first + lanes - 1);
  Segment segment;
  SegmentMask mask;
  while (walk.Next(&segment)) {
    FindMask(p, *item.pass, view, first, lanes, segment, &mask);
    if (mask.strip_count > 0) {
      BackwardSegment(p, lanes, segment, mask, s.keys.Get(args, item, view, segment), item.whole, s);
      if (!item.whole) AddKeyGradients(args, item, view, tile, segment, mask, s);
    }
    if (!item.whole) __atomic_store_n(item.progress + tile, walk.Position(kDone), __ATOMIC_RELEASE);
  }
  for (int lane = 0; lane < lanes; lane++) {
    WriteGradient(args, item, args.query_sum, args.query_grad, view.Position(first + lane), p.key_depth, s.query_grad + lane * key_row);
  }
}

// A whole sequence's key gradients from scratch to their place.
inline void WriteKeyGradients(const Arguments& args, const Item& item, const View& view, const BackwardScratch& s) {
  const stf_problem& p = *args.problem;
  for (int64_t m = 0; m < view.count; m++) {
    WriteGradient(args, item, args.key_sum, args.key_grad, view.Position(m), p.key_depth, s.key_grad + m * Padded(p.key_depth));
    WriteGradient(args, item, args.value_sum, args.value_grad, view.Position(m), p.value_depth, s.value_grad + m * Padded(p.value_depth));
  }
}

inline void BackwardItem(const Arguments& args, const Item& item, char* memory) {
  const stf_problem& p = *args.problem;
  const View view = ViewOf(args, item);
  const BackwardScratch scratch(p, memory, item.whole);
  if (item.whole) {
    scratch.keys.Read(args, item, item.pass->program[item.pass->members[0]], view, 0, view.count);
    Fill(scratch.key_grad, view.count * Padded(p.key_depth), 0);
    Fill(scratch.value_grad, view.count * Padded(p.value_depth), 0);
  }
  for (int64_t tile = item.tile_begin; tile < item.tile_end; tile++) {
    const int64_t first = tile * kLanes, end = Least(first + kLanes, Queries(args, item));
    const int64_t used = Most(first, Least(end, view.count));
    if (item.pass->first) {
      // Key rows at the tile's own positions: no earlier tile reaches them (j <= i), and later ones wait for this one.
      for (int64_t m = item.whole ? used : first; m < end; m++) {
        const int64_t position = item.sequence + m * item.pass->stride;
        ClearGradient(args, item, args.key_sum, args.key_grad, position, p.key_depth);
        ClearGradient(args, item, args.value_sum, args.value_grad, position, p.value_depth);
        if (m >= used) ClearGradient(args, item, args.query_sum, args.query_grad, position, p.key_depth);
      }
    }
    if (used > first) BackwardTile(args, item, view, tile, static_cast<int>(used - first), scratch);
    if (!item.whole) __atomic_store_n(item.progress + tile, kDone, __ATOMIC_RELEASE);
  }
  if (item.whole) WriteKeyGradients(args, item, view, scratch);
}

}  // namespace STF_ISA
}  // namespace cpu
}  // namespace stf

#endif  // STF_CUSTOM_OPS_ATTENTION_CPU_BACKWARD_H_
