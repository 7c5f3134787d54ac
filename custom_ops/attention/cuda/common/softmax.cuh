// The online softmax, and what else the mainloops share.
#ifndef STF_CUSTOM_OPS_ATTENTION_CUDA_COMMON_SOFTMAX_CUH_
#define STF_CUSTOM_OPS_ATTENTION_CUDA_COMMON_SOFTMAX_CUH_

#include "custom_ops/attention/cuda/common/rows.cuh"
#include "custom_ops/attention/cuda/common/sets.cuh"

namespace stf {
namespace cuda {

constexpr int kUnit = 32;  // columns that are worked on at once, or left out where the warp's rows need none of them
constexpr float kLog2e = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

__device__ inline float Exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// What a warp needs to know beside the tiles.
struct Context {
  const Arguments& args;
  const Head& head;
  const View& view;
};

// exp(scale * score - log_sum_exp). For floats the difference comes first, which is where they keep their precision.
template <typename T>
__device__ inline float Weight(float score, float scale, float log_sum_exp) {
  if (sizeof(T) == 4) return Exp2(fmaf(score, scale, -log_sum_exp) * kLog2e);
  return Exp2(fmaf(score, scale * kLog2e, -kLog2e * log_sum_exp));
}

template <int kBlocks>
__device__ inline void Clear(float (&sum)[kBlocks][4]) {
#pragma unroll
  for (int b = 0; b < kBlocks; b++) {
#pragma unroll
    for (int e = 0; e < 4; e++) sum[b][e] = 0;
  }
}

// The online softmax of 16 queries: of the keys so far, the sum of exp(score - most) * value over the keys, and the same without value.
// Scores are in units of log 2; those of floats in natural ones, so that the difference comes first.
template <typename T, int kKeyDepth, int kValueDepth>
struct Softmax {
  static constexpr bool kNatural = sizeof(T) == 4;
  // Lets a row's largest score outgrow `most` by so much before the sums are shrunk: weights stay far below what a half can hold.
  static constexpr float kSlack = kNatural ? 5 : 8;
  float sum[kValueDepth / 8][4];
  float row_max[2], row_sum[4];  // total: two parts for each row

  // Of a head's keys; where there are `sinks`, one of them is a score without a value.
  __device__ void Start(const float* sinks, int head) {
    Clear(sum);
    const float sink = sinks ? sinks[head] : -INFINITY;
    Begin({sink, sink}, sinks != nullptr);
  }

  // Goes on from the output of other keys, which is in `sum`, and their log-sum-exp.
  __device__ void Continue(const float (&log_sum_exp)[2]) { Begin(log_sum_exp, true); }

  // With scores of such log-sum-exps, where there are `some`, whose values are in `sum`.
  __device__ void Begin(const float (&log_sum_exp)[2], bool some) {
#pragma unroll
    for (int r = 0; r < 2; r++) {
      row_max[r] = log_sum_exp[r] * (kNatural ? 1 : kLog2e);
      row_sum[2 * r] = some && row_max[r] != -INFINITY ? 1.0f / 4 : 0;  // a quad's lanes each hold a part of the total
      row_sum[2 * r + 1] = 0;
    }
  }

  template <int kBlocks>
  __device__ static void Largest(float (&largest)[4], const float (&x)[kBlocks][4]) {
#pragma unroll
    for (int b = 0; b < kBlocks; b++) {
#pragma unroll
      for (int e = 0; e < 4; e++) largest[e] = fmaxf(largest[e], x[b][e]);
    }
  }

  // Raises `most` to the largest scores, where they have outgrown it, and shrinks the sums; exponents are taken from `base`.
  __device__ void RaiseMax(const float (&largest)[4], float factor, float (&base)[2]) {
    float next[2];
    bool raise = false;
#pragma unroll
    for (int r = 0; r < 2; r++) next[r] = fmaxf(largest[2 * r], largest[2 * r + 1]);
#pragma unroll
    for (int other = 1; other < 4; other *= 2) {
#pragma unroll
      for (int r = 0; r < 2; r++) next[r] = fmaxf(next[r], __shfl_xor_sync(~0u, next[r], other));
    }
#pragma unroll
    for (int r = 0; r < 2; r++) {
      next[r] *= factor;
      raise = raise || next[r] > row_max[r] + kSlack;
    }
    if (__any_sync(~0u, raise)) {
#pragma unroll
      for (int r = 0; r < 2; r++) {
        next[r] = fmaxf(row_max[r], next[r]);
        const float shrink = Exp2((row_max[r] - (next[r] == -INFINITY ? 0 : next[r])) * (kNatural ? kLog2e : 1));
        row_max[r] = next[r];
        row_sum[2 * r] *= shrink;
        row_sum[2 * r + 1] *= shrink;
#pragma unroll
        for (int b = 0; b < kValueDepth / 8; b++) {
          sum[b][2 * r] *= shrink;
          sum[b][2 * r + 1] *= shrink;
        }
      }
    }
#pragma unroll
    for (int r = 0; r < 2; r++) base[r] = row_max[r] == -INFINITY ? 0 : row_max[r];
  }

  // Scores become weights; adds them to `sum`.
  template <int kBlocks>
  __device__ static void Exponentiate(float (&x)[kBlocks][4], float factor, const float (&base)[2], float (&sum)[4]) {
#pragma unroll
    for (int b = 0; b < kBlocks; b++) {
#pragma unroll
      for (int e = 0; e < 4; e++) {
        x[b][e] = Exp2(fmaf(x[b][e], factor, -base[e / 2]) * (kNatural ? kLog2e : 1));
        sum[e] += x[b][e];
      }
    }
  }

  // Divides by the totals; afterwards `sum` is the output, `most` the log-sum-exp (natural logarithm).
  __device__ void Finish() {
#pragma unroll
    for (int r = 0; r < 2; r++) {
      float all = row_sum[2 * r] + row_sum[2 * r + 1];
      all += __shfl_xor_sync(~0u, all, 1);
      all += __shfl_xor_sync(~0u, all, 2);
      const float inverse = all > 0 ? 1 / all : 0;
      row_max[r] = all > 0 ? row_max[r] * (kNatural ? 1 : kLn2) + logf(all) : -INFINITY;
#pragma unroll
      for (int b = 0; b < kValueDepth / 8; b++) {
        sum[b][2 * r] *= inverse;
        sum[b][2 * r + 1] *= inverse;
      }
    }
  }
};

template <int kBlocks>
__device__ inline void Scale(float (&sum)[kBlocks][4], float factor) {
#pragma unroll
  for (int b = 0; b < kBlocks; b++) {
#pragma unroll
    for (int e = 0; e < 4; e++) sum[b][e] *= factor;
  }
}

}  // namespace cuda
}  // namespace stf

#endif  // STF_CUSTOM_OPS_ATTENTION_CUDA_COMMON_SOFTMAX_CUH_
