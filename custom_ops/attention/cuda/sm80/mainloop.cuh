// The arithmetic of attention for one warp: 16 rows by one segment, out of shared memory.
#ifndef STF_CUSTOM_OPS_ATTENTION_CUDA_SM80_MAINLOOP_CUH_
#define STF_CUSTOM_OPS_ATTENTION_CUDA_SM80_MAINLOOP_CUH_

#include "custom_ops/attention/cuda/common/scheduler.cuh"
#include "custom_ops/attention/cuda/common/softmax.cuh"
#include "custom_ops/attention/cuda/sm80/mask.cuh"

namespace stf {
namespace cuda {

// A head's rows of a tensor to shared memory, by place(row) as LoadRows does.
template <typename T, int kDepth, int kRows, int kThreads, typename Place>
__device__ __forceinline__ void LoadHead(T* to, const stf_tensor& tensor, const Arguments& args, int batch, int head, int depth,
                                         const Place& place) {
  LoadRows<T, kDepth, kRows, kThreads>(to, Base<const T>(tensor, batch, head), tensor.position_stride, depth, args.vector, place);
}

// A block's way through the segments of its tile: while one is used, the next comes to shared memory. load(segment, stage) begins a
// segment's copies; prologue() is called when those of the first have begun; use(segment, stage) when a segment is there for all threads.
template <int kStages, typename Walk, typename Load, typename Prologue, typename Use>
__device__ __forceinline__ void ForEachSegment(Walk walk, const Load& load, const Prologue& prologue, const Use& use) {
  Segment segment, next;
  bool more = walk.Next(&segment);
  if (more) load(segment, 0);
  CommitCopies();
  prologue();
  for (int stage = 0; more; stage = (stage + 1) % kStages) {
    const bool another = walk.Next(&next);
    if (kStages == 2) {
      if (another) load(next, 1 - stage);
      CommitCopies();
    }
    WaitForCopies<kStages - 1>();
    __syncthreads();
    use(segment, stage);
    __syncthreads();
    if (kStages == 1) {
      if (another) load(next, 0);
      CommitCopies();
    }
    segment = next;
    more = another;
  }
  WaitForCopies<0>();
}

template <bool kByKey>
__device__ inline uint32_t Allowed(const Context& context, const WarpMask<kByKey>& mask, const Segment& segment, int row_begin, int unit) {
  return mask.template Allowed<kUnit / 8>(context.args, context.head, context.view, segment, row_begin, unit * kUnit);
}

// Adds a segment's keys to the softmax of 16 queries.
template <int kKeys, typename T, int kKeyDepth, int kValueDepth>
__device__ void Attend(Softmax<T, kKeyDepth, kValueDepth>* softmax, const Context& context, const Segment& segment, int row_begin,
                       int row_end, const T* query, const T* key, const T* value) {
  const WarpMask<false> mask(context.head, context.view, segment, row_begin, row_end);
  if (mask.reach_low >= mask.reach_high) return;
  const float scale = context.args.scale, factor = (scale == 0 ? 1 : fabsf(scale)) * (softmax->kNatural ? 1 : kLog2e);
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
    softmax->Largest(next, x);
  }
  float base[2];
  softmax->RaiseMax(next, factor, base);
#pragma unroll
  for (int u = 0; u < kKeys / kUnit; u++) {
    if (!mask.Reaches(u * kUnit, (u + 1) * kUnit)) continue;
    auto& x = score[u];
    softmax->Exponentiate(x, factor, base, softmax->row_sum);
    Matrix<T>::template MultiplyWeights<kValueDepth>(softmax->sum, x, value + u * kUnit * kPitch<T, kValueDepth>);
  }
}

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

}  // namespace cuda
}  // namespace stf

#endif  // STF_CUSTOM_OPS_ATTENTION_CUDA_SM80_MAINLOOP_CUH_
