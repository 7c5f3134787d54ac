// The arithmetic of attention for one warp: 16 rows by one segment, out of shared memory. The kernels differ in how tiles come there.
#ifndef STF_CUSTOM_OPS_ATTENTION_CUDA_TILE_CUH_
#define STF_CUSTOM_OPS_ATTENTION_CUDA_TILE_CUH_

#include "custom_ops/attention/cuda/mask.cuh"
#include "custom_ops/attention/cuda/rows.cuh"

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

template <bool kByKey>
__device__ inline uint32_t Allowed(const Context& context, const WarpMask<kByKey>& mask, const Segment& segment, int row_begin, int unit) {
  return mask.template Allowed<kUnit / 8>(context.args, context.head, context.view, segment, row_begin, unit * kUnit);
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
  float most[2], total[4];  // total: two parts for each row

  __device__ void Start() {
    Clear(sum);
#pragma unroll
    for (int r = 0; r < 2; r++) {
      most[r] = -INFINITY;
      total[2 * r] = total[2 * r + 1] = 0;
    }
  }

  // Goes on from the output of other keys, which is in `sum`, and their log-sum-exp.
  __device__ void Continue(const float (&log_sum_exp)[2]) {
#pragma unroll
    for (int r = 0; r < 2; r++) {
      most[r] = log_sum_exp[r] * (kNatural ? 1 : kLog2e);
      total[2 * r] = most[r] == -INFINITY ? 0 : 1.0f / 4;  // a quad's lanes each hold a part of the total
      total[2 * r + 1] = 0;
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
  __device__ void Raise(const float (&largest)[4], float factor, float (&base)[2]) {
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
      raise = raise || next[r] > most[r] + kSlack;
    }
    if (__any_sync(~0u, raise)) {
#pragma unroll
      for (int r = 0; r < 2; r++) {
        next[r] = fmaxf(most[r], next[r]);
        const float shrink = Exp2((most[r] - (next[r] == -INFINITY ? 0 : next[r])) * (kNatural ? kLog2e : 1));
        most[r] = next[r];
        total[2 * r] *= shrink;
        total[2 * r + 1] *= shrink;
#pragma unroll
        for (int b = 0; b < kValueDepth / 8; b++) {
          sum[b][2 * r] *= shrink;
          sum[b][2 * r + 1] *= shrink;
        }
      }
    }
#pragma unroll
    for (int r = 0; r < 2; r++) base[r] = most[r] == -INFINITY ? 0 : most[r];
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

  template <int kKeys>
  __device__ void Attend(const Context& context, const Segment& segment, int row_begin, int row_end, const T* query, const T* key,
                         const T* value) {
    const WarpMask<false> mask(context.head, context.view, segment, row_begin, row_end);
    if (mask.reach_low >= mask.reach_high) return;
    const float scale = context.args.scale, factor = (scale == 0 ? 1 : fabsf(scale)) * (kNatural ? 1 : kLog2e);
    float score[kKeys / kUnit][kUnit / 8][4];
    float next[4] = {-INFINITY, -INFINITY, -INFINITY, -INFINITY};
#pragma unroll
    for (int u = 0; u < kKeys / kUnit; u++) {
      if (!mask.Reaches(u * kUnit, (u + 1) * kUnit)) continue;
      auto& x = score[u];
      Clear(x);
      Matrix<T>::template MultiplyTransposed<kKeyDepth>(x, query, key + u * kUnit * kPitch<T, kKeyDepth>);
      if (scale <= 0) {
#pragma unroll
        for (auto& block : x) {
#pragma unroll
          for (float& each : block) each = scale < 0 ? -each : 0;
        }
      }
      if (mask.Cuts(u * kUnit, (u + 1) * kUnit)) {
        const uint32_t allowed = Allowed(context, mask, segment, row_begin, u);
#pragma unroll
        for (int b = 0; b < kUnit / 8; b++) {
#pragma unroll
          for (int e = 0; e < 4; e++) x[b][e] = allowed >> (4 * b + e) & 1 ? x[b][e] : -INFINITY;
        }
      }
      Largest(next, x);
    }
    float base[2];
    Raise(next, factor, base);
#pragma unroll
    for (int u = 0; u < kKeys / kUnit; u++) {
      if (!mask.Reaches(u * kUnit, (u + 1) * kUnit)) continue;
      auto& x = score[u];
      Exponentiate(x, factor, base, total);
      Matrix<T>::template MultiplyWeights<kValueDepth>(sum, x, value + u * kUnit * kPitch<T, kValueDepth>);
    }
  }

  // Divides by the totals; afterwards `sum` is the output, `most` the log-sum-exp (natural logarithm).
  __device__ void Finish() {
#pragma unroll
    for (int r = 0; r < 2; r++) {
      float all = total[2 * r] + total[2 * r + 1];
      all += __shfl_xor_sync(~0u, all, 1);
      all += __shfl_xor_sync(~0u, all, 2);
      const float inverse = all > 0 ? 1 / all : 0;
      most[r] = all > 0 ? most[r] * (kNatural ? 1 : kLn2) + logf(all) : -INFINITY;
#pragma unroll
      for (int b = 0; b < kValueDepth / 8; b++) {
        sum[b][2 * r] *= inverse;
        sum[b][2 * r + 1] *= inverse;
      }
    }
  }
};

// Backward. With weight p = exp(score - log_sum_exp) and p' = p * (output_grad . value - delta):
// query_grad = scale * sum p' key, key_grad = scale * sum p' query, value_grad = sum p output_grad.

// Adds a segment's keys to the query gradients of 16 queries, but for the factor scale.
template <typename T, int kKeyDepth, int kValueDepth, int kKeys>
__device__ void AddQueryGrad(const Context& context, const Segment& segment, int row_begin, int row_end, const T* query,
                             const T* output_grad, const T* key, const T* value, const float (&log_sum_exp)[2], const float (&delta)[2],
                             float (&sum)[kKeyDepth / 8][4]) {
  const WarpMask<false> mask(context.head, context.view, segment, row_begin, row_end);
#pragma unroll
  for (int u = 0; u < kKeys / kUnit; u++) {
    if (!mask.Reaches(u * kUnit, (u + 1) * kUnit)) continue;
    const T* keys = key + u * kUnit * kPitch<T, kKeyDepth>;
    float x[kUnit / 8][4], y[kUnit / 8][4];
    Clear(x);
    Clear(y);
    Matrix<T>::template MultiplyTransposed<kKeyDepth>(x, query, keys);
    Matrix<T>::template MultiplyTransposed<kValueDepth>(y, output_grad, value + u * kUnit * kPitch<T, kValueDepth>);
    const bool cut = mask.Cuts(u * kUnit, (u + 1) * kUnit);
    const uint32_t allowed = cut ? Allowed(context, mask, segment, row_begin, u) : ~0u;
#pragma unroll
    for (int b = 0; b < kUnit / 8; b++) {
#pragma unroll
      for (int e = 0; e < 4; e++) {
        const float weight = Weight<T>(x[b][e], context.args.scale, log_sum_exp[e / 2]);
        x[b][e] = allowed >> (4 * b + e) & 1 ? weight * (y[b][e] - delta[e / 2]) : 0;
      }
    }
    Matrix<T>::template MultiplyWeights<kKeyDepth>(sum, x, keys);
  }
}

enum Part { kBoth, kKeyPart, kValuePart };  // which of a key's gradients a kernel computes: large depths take one at a time

// Adds a segment's queries to the key and value gradients of 16 keys, the former but for the factor scale. log_sum_exp and delta are the
// queries', in shared memory.
template <typename T, int kKeyDepth, int kValueDepth, int kQueries, Part kPart>
__device__ void AddKeyGrads(const Context& context, const Segment& segment, int row_begin, int row_end, const T* key, const T* value,
                            const T* query, const T* output_grad, const float* log_sum_exp, const float* delta,
                            float (&key_sum)[kKeyDepth / 8][4], float (&value_sum)[kValueDepth / 8][4]) {
  const WarpMask<true> mask(context.head, context.view, segment, row_begin, row_end);
#pragma unroll
  for (int u = 0; u < kQueries / kUnit; u++) {
    if (!mask.Reaches(u * kUnit, (u + 1) * kUnit)) continue;
    const T* queries = query + u * kUnit * kPitch<T, kKeyDepth>;
    const T* grads = output_grad + u * kUnit * kPitch<T, kValueDepth>;
    float x[kUnit / 8][4], y[kUnit / 8][4];
    Clear(x);
    Clear(y);
    Matrix<T>::template MultiplyTransposed<kKeyDepth>(x, key, queries);
    if (kPart != kValuePart) Matrix<T>::template MultiplyTransposed<kValueDepth>(y, value, grads);
    const bool cut = mask.Cuts(u * kUnit, (u + 1) * kUnit);
    const uint32_t allowed = cut ? Allowed(context, mask, segment, row_begin, u) : ~0u;
#pragma unroll
    for (int b = 0; b < kUnit / 8; b++) {
      const int column = u * kUnit + 8 * b + 2 * (threadIdx.x % 4);
      const float2 sums = *reinterpret_cast<const float2*>(log_sum_exp + column), deltas = *reinterpret_cast<const float2*>(delta + column);
#pragma unroll
      for (int e = 0; e < 4; e++) {
        const float weight = Weight<T>(x[b][e], context.args.scale, e % 2 ? sums.y : sums.x);
        x[b][e] = allowed >> (4 * b + e) & 1 ? weight : 0;
        y[b][e] = x[b][e] * (y[b][e] - (e % 2 ? deltas.y : deltas.x));
      }
    }
    if (kPart != kKeyPart) Matrix<T>::template MultiplyWeights<kValueDepth>(value_sum, x, grads);
    if (kPart != kValuePart) Matrix<T>::template MultiplyWeights<kKeyDepth>(key_sum, y, queries);
  }
}

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

#endif  // STF_CUSTOM_OPS_ATTENTION_CUDA_TILE_CUH_
