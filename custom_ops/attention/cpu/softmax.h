// Softmax over the keys of a tile, online (one segment after another) and, with the log-sum-exp known, its gradient. Differences of
// scores are small where their weights matter, so that they, not the scores, are turned into powers of 2: large scores keep their last
// bits.
#ifndef STF_CUSTOM_OPS_ATTENTION_CPU_SOFTMAX_H_
#define STF_CUSTOM_OPS_ATTENTION_CPU_SOFTMAX_H_

#include "custom_ops/attention/cpu/mask.h"

namespace stf {
namespace cpu {
namespace STF_ISA {

inline __attribute__((always_inline)) Vec Exp(Vec x) { return Exp2(x * Broadcast(1.44269504088896341f)); }

// Of each lane: the largest score so far, the sum of exp(score - top), and what the last segment multiplied earlier sums by.
struct SoftmaxState {
  alignas(64) float top[kLanes], sum[kLanes], rescale[kLanes];

  void Clear() {
    for (int lane = 0; lane < kLanes; lane++) {
      top[lane] = -__builtin_inff();
      sum[lane] = 0;
      rescale[lane] = 1;
    }
  }

  // Begins with a score that has no value.
  void Begin(float sink) {
    for (int lane = 0; lane < kLanes; lane++) {
      top[lane] = sink;
      sum[lane] = 1;
    }
  }
};

inline bool Touches(const Strip& strip, int lane) { return strip.granule_begin * kGranule <= lane && lane < strip.granule_end * kGranule; }

// Turns the scores of a segment into weights relative to the new top. True where any lane's earlier sums must be rescaled.
inline bool OnlineSoftmax(const SegmentMask& mask, int lanes, float* scores, SoftmaxState* state) {
  const Vec nothing = Broadcast(-__builtin_inff());
  bool rescale = false;
  for (int lane = 0; lane < lanes; lane += kWidth) {
    const Vec old_top = Load(state->top + lane);
    Vec top = old_top;
    for (int i = 0; i < mask.strip_count; i++) {
      if (!Touches(mask.strips[i], lane)) continue;
      for (int t = mask.strips[i].begin; t < mask.strips[i].end; t++) {
        Vec x = Load(scores + t * kLanes + lane);
        if (mask.cut[t / kGranule]) {
          x = Allowed(mask, t, lane) ? x : nothing;
          Store(scores + t * kLanes + lane, x);
        }
        top = Max(x, top);
      }
    }
    const Vec base = top == nothing ? Vec{} : top;
    const Vec factor = old_top == top ? Broadcast(1.0f) : Exp(old_top - base);
    Vec sum = Load(state->sum + lane) * factor;
    for (int i = 0; i < mask.strip_count; i++) {
      if (!Touches(mask.strips[i], lane)) continue;
      for (int t = mask.strips[i].begin; t < mask.strips[i].end; t++) {
        const Vec x = Load(scores + t * kLanes + lane);
        Vec weight = Exp(x - base);
        if (mask.cut[t / kGranule]) weight = x == nothing ? Vec{} : weight;
        Store(scores + t * kLanes + lane, weight);
        sum += weight;
      }
    }
    Store(state->top + lane, top);
    Store(state->sum + lane, sum);
    Store(state->rescale + lane, factor);
    for (int i = 0; i < kWidth; i++) rescale = rescale || state->rescale[lane + i] != 1.0f;
  }
  return rescale;
}

// Backward: scores to weights P = exp(score - lse), and `grads`, the dot products of dO and V, to dS = P (grads - delta) scale.
inline void SoftmaxGradient(const SegmentMask& mask, int lanes, float scale, const float* log_sum_exp, const float* delta, float* scores,
                            float* grads) {
  const Vec factor = Broadcast(scale);
  for (int lane = 0; lane < lanes; lane += kWidth) {
    const Vec base = Load(log_sum_exp + lane), shift = Load(delta + lane);
    for (int i = 0; i < mask.strip_count; i++) {
      if (!Touches(mask.strips[i], lane)) continue;
      for (int t = mask.strips[i].begin; t < mask.strips[i].end; t++) {
        float *score = scores + t * kLanes + lane, *grad = grads + t * kLanes + lane;
        Vec weight = Exp(Load(score) - base);
        Vec score_grad = weight * (Load(grad) - shift) * factor;
        if (mask.cut[t / kGranule]) {
          const IntVec allowed = Allowed(mask, t, lane);
          weight = allowed ? weight : Vec{};
          score_grad = allowed ? score_grad : Vec{};
        }
        Store(score, weight);
        Store(grad, score_grad);
      }
    }
  }
}

}  // namespace STF_ISA
}  // namespace cpu
}  // namespace stf

#endif  // STF_CUSTOM_OPS_ATTENTION_CPU_SOFTMAX_H_
