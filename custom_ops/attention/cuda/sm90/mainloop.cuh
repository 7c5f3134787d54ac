// The arithmetic of attention for a warpgroup: 64 rows by one segment, out of shared memory.
#ifndef STF_CUSTOM_OPS_ATTENTION_CUDA_SM90_MAINLOOP_CUH_
#define STF_CUSTOM_OPS_ATTENTION_CUDA_SM90_MAINLOOP_CUH_

#include "custom_ops/attention/cuda/sm90/mask.cuh"
#include "custom_ops/attention/cuda/sm90/wgmma.cuh"

namespace stf {
namespace cuda {

// Whether a condition holds for any of the warpgroup's threads.
__device__ inline bool AnyOfWarpgroup(bool condition) {
  int any;
  asm volatile("{\n.reg .pred p, q;\nsetp.ne.b32 p, %1, 0;\nbarrier.cta.red.or.pred q, %2, 128, p;\nselp.b32 %0, 1, 0, q;\n}\n"
               : "=r"(any)
               : "r"(static_cast<int>(condition)), "r"(1 + threadIdx.x / 128)
               : "memory");
  return any;
}

// Adds a segment's keys to 64 queries. *settled: whether all of the warpgroup's rows have a largest score. Then most segments change
// nothing about those, and looking for larger ones takes as long as all else: weights are computed from the scores so far, and only where
// they turn out too large it is done once more with care.
template <typename T, int kKeyDepth, int kValueDepth, int kRows, int kVisited, typename Mask>
__device__ inline void WarpgroupAttend(Softmax<T, kKeyDepth, kValueDepth>& softmax, bool* settled, const Context& context, const Mask& mask,
                                       const WarpgroupSegment& segment, int warpgroup_begin, int row_end, uint32_t query, uint32_t key,
                                       uint32_t value) {
  constexpr float kMost = 1024;  // the sum of the weights that a thread has of a row
  float x[kStageRows / 8][4];
  uint32_t p[kStageRows / 16][4];
  const float scale = context.args.scale, factor = (scale == 0 ? 1 : fabsf(scale)) * kLog2e;
  for (bool careful = !*settled;; careful = true) {
    BeginProducts();
    MultiplyScores<T, kKeyDepth, kRows, kVisited>(x, query, key);
    CommitProducts();
    WaitForProducts();
    FenceRegisters(x);
    if (scale <= 0) {
#pragma unroll
      for (auto& block : x) {
#pragma unroll
        for (float& each : block) each = scale < 0 ? -each : 0;
      }
    }
    if (mask.Apply(context, segment, warpgroup_begin, row_end, [&](int b, int e) { x[b][e] = -INFINITY; })) careful = true;
    float base[2] = {softmax.row_max[0], softmax.row_max[1]};
    if (careful) {
      float largest[4] = {-INFINITY, -INFINITY, -INFINITY, -INFINITY};
      softmax.Largest(largest, x);
      softmax.RaiseMax(largest, factor, base);
    }
    float sum[4] = {0, 0, 0, 0};
    softmax.Exponentiate(x, factor, base, sum);
    PackWeights<T>(p, x);
    const bool doubt =
        careful ? softmax.row_max[0] == -INFINITY || softmax.row_max[1] == -INFINITY : !(fmaxf(sum[0] + sum[1], sum[2] + sum[3]) <= kMost);
    const bool any = AnyOfWarpgroup(doubt);
    if (careful) *settled = !any;
    if (!careful && any) continue;
#pragma unroll
    for (int e = 0; e < 4; e++) softmax.row_sum[e] += sum[e];
    break;
  }
  FenceRegisters(softmax.sum);
  BeginProducts();
  MultiplyWeighted<T, kValueDepth, kVisited>(softmax.sum, p, value);
  CommitProducts();
  WaitForProducts();
  FenceRegisters(softmax.sum);
}

// Adds a segment's keys to the query gradients of 64 queries, but for the factor scale.
template <typename T, int kKeyDepth, int kValueDepth, int kRows, int kVisited, typename Mask>
__device__ inline void WarpgroupAddQueryGrad(const Context& context, const Mask& mask, const WarpgroupSegment& segment, int warpgroup_begin,
                                             int row_end, uint32_t query, uint32_t output_grad, uint32_t key, uint32_t value,
                                             const float (&log_sum_exp)[2], const float (&delta)[2], float (&sum)[kKeyDepth / 8][4]) {
  float x[kStageRows / 8][4], y[kStageRows / 8][4];
  BeginProducts();
  MultiplyScores<T, kKeyDepth, kRows, kVisited>(x, query, key);
  CommitProducts();
  MultiplyScores<T, kValueDepth, kRows, kVisited>(y, output_grad, value);
  CommitProducts();
  WaitForProducts<1>();
  FenceRegisters(x);
#pragma unroll
  for (int b = 0; b < kStageRows / 8; b++) {
#pragma unroll
    for (int e = 0; e < 4; e++) x[b][e] = Weight<T>(x[b][e], context.args.scale, log_sum_exp[e / 2]);
  }
  mask.Apply(context, segment, warpgroup_begin, row_end, [&](int b, int e) { x[b][e] = 0; });
  WaitForProducts();
  FenceRegisters(y);
#pragma unroll
  for (int b = 0; b < kStageRows / 8; b++) {
#pragma unroll
    for (int e = 0; e < 4; e++) x[b][e] *= y[b][e] - delta[e / 2];
  }
  uint32_t p[kStageRows / 16][4];
  PackWeights<T>(p, x);
  FenceRegisters(sum);
  BeginProducts();
  MultiplyWeighted<T, kKeyDepth, kVisited>(sum, p, key);
  CommitProducts();
  WaitForProducts();
  FenceRegisters(sum);
}

// Adds a segment's queries to the key and value gradients of 64 keys, the former but for the factor scale. log_sum_exp and delta are the
// queries', in shared memory, where they are once sums_ready() and deltas_ready() return. use(score_grads), with the scores' gradients as
// StoreWeights takes them, is called while products are under way, and may issue more.
template <typename T, int kKeyDepth, int kValueDepth, int kRows, int kVisited, typename Mask, typename SumsReady, typename DeltasReady,
          typename Use>
__device__ inline void WarpgroupAddKeyGrads(const Context& context, const Mask& mask, const WarpgroupSegment& segment, int warpgroup_begin,
                                            int row_end, uint32_t key, uint32_t value, uint32_t query, uint32_t output_grad,
                                            const float* log_sum_exp, const float* delta, float (&key_sum)[kKeyDepth / 8][4],
                                            float (&value_sum)[kValueDepth / 8][4], SumsReady sums_ready, DeltasReady deltas_ready,
                                            Use use) {
  float x[kStageRows / 8][4], y[kStageRows / 8][4];
  float2 sums[kStageRows / 8], deltas[kStageRows / 8];
  BeginProducts();
  MultiplyScores<T, kKeyDepth, kRows, kVisited>(x, key, query);
  CommitProducts();
  MultiplyScores<T, kValueDepth, kRows, kVisited>(y, value, output_grad);
  CommitProducts();
  sums_ready();
#pragma unroll
  for (int b = 0; b < kStageRows / 8; b++) {
    sums[b] = *reinterpret_cast<const float2*>(log_sum_exp + 8 * b + 2 * (threadIdx.x % 4));
  }
  WaitForProducts<1>();
  FenceRegisters(x);
#pragma unroll
  for (int b = 0; b < kStageRows / 8; b++) {
#pragma unroll
    for (int e = 0; e < 4; e++) x[b][e] = Weight<T>(x[b][e], context.args.scale, e % 2 ? sums[b].y : sums[b].x);
  }
  mask.Apply(context, segment, warpgroup_begin, row_end, [&](int b, int e) { x[b][e] = 0; });
  uint32_t p[kStageRows / 16][4];
  PackWeights<T>(p, x);
  deltas_ready();
#pragma unroll
  for (int b = 0; b < kStageRows / 8; b++) {
    deltas[b] = *reinterpret_cast<const float2*>(delta + 8 * b + 2 * (threadIdx.x % 4));
  }
  WaitForProducts();
  FenceRegisters(y);
  FenceRegisters(value_sum);
  BeginProducts();
  MultiplyWeighted<T, kValueDepth, kVisited>(value_sum, p, output_grad);
  CommitProducts();
#pragma unroll
  for (int b = 0; b < kStageRows / 8; b++) {
#pragma unroll
    for (int e = 0; e < 4; e++) y[b][e] = x[b][e] * (y[b][e] - (e % 2 ? deltas[b].y : deltas[b].x));
  }
  uint32_t q[kStageRows / 16][4];
  PackWeights<T>(q, y);
  FenceRegisters(key_sum);
  BeginProducts();
  MultiplyWeighted<T, kKeyDepth, kVisited>(key_sum, q, query);
  CommitProducts();
  use(q);
  WaitForProducts();
  FenceRegisters(key_sum);
  FenceRegisters(value_sum);
}

// delta[r] = sum over depth of output * output_grad, for a thread's two rows, at positions place(0) and place(1); zero where that is
// negative. The row's quad of lanes finds the same.
template <typename T, int kDepth, typename Place>
__device__ inline void WarpgroupSumProducts(float (&delta)[2], const T* output, int64_t output_stride, const T* grad, int64_t grad_stride,
                                            int depth, Place place) {
  constexpr int kParts = kDepth / 32;
  const int column = threadIdx.x % 4 * 8;
  uint4 a[2][kParts], b[2][kParts];
  // All loads first, of what exists in any case: a branch around one would wait for it.
#pragma unroll
  for (int r = 0; r < 2; r++) {
    const int64_t position = max(place(r), 0);
#pragma unroll
    for (int i = 0; i < kParts; i++) {
      const int at = column + 32 * i < depth ? column + 32 * i : 0;
      a[r][i] = *reinterpret_cast<const uint4*>(output + position * output_stride + at);
      b[r][i] = *reinterpret_cast<const uint4*>(grad + position * grad_stride + at);
    }
  }
#pragma unroll
  for (int r = 0; r < 2; r++) {
    float sum = 0;
#pragma unroll
    for (int i = 0; i < kParts; i++) {
      const uint32_t x[4] = {a[r][i].x, a[r][i].y, a[r][i].z, a[r][i].w}, y[4] = {b[r][i].x, b[r][i].y, b[r][i].z, b[r][i].w};
      float part = 0;
#pragma unroll
      for (int e = 0; e < 4; e++) {
        const float2 left = Unpack(x[e], T()), right = Unpack(y[e], T());
        part = fmaf(left.x, right.x, fmaf(left.y, right.y, part));
      }
      sum += column + 32 * i < depth ? part : 0;
    }
    sum += __shfl_xor_sync(~0u, sum, 1);
    sum += __shfl_xor_sync(~0u, sum, 2);
    delta[r] = place(r) < 0 ? 0 : sum;
  }
}

}  // namespace cuda
}  // namespace stf

#endif  // STF_CUSTOM_OPS_ATTENTION_CUDA_SM90_MAINLOOP_CUH_
