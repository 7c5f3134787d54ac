// The ends of the kernels: results to their tensors, or, between the launches of a call, to float32 sums.
#ifndef STF_CUSTOM_OPS_ATTENTION_CUDA_COMMON_EPILOGUE_CUH_
#define STF_CUSTOM_OPS_ATTENTION_CUDA_COMMON_EPILOGUE_CUH_

#include "custom_ops/attention/cuda/common/rows.cuh"
#include "custom_ops/attention/cuda/common/scheduler.cuh"
#include "custom_ops/attention/cuda/common/softmax.cuh"

namespace stf {
namespace cuda {

// Applies a function to accumulators and to the float rows that hold sums between launches, whatever T is.
template <typename T, int kDepth, typename Do>
__device__ inline void EachPartial(float (&sum)[kDepth / 8][4], float* const (&rows)[2], int depth, bool vector, Do apply) {
#pragma unroll
  for (int r = 0; r < 2; r++) {
    if (!rows[r]) continue;
#pragma unroll
    for (int b = 0; b < kDepth / 8; b++) {
      const int column = Matrix<T>::Column(b, 0);
      float *x = &sum[b][2 * r], *y = rows[r] + column;
      if (vector) {
        if (column < depth) apply(*reinterpret_cast<float2*>(x), *reinterpret_cast<float2*>(y));
      } else {
        float2 pair = {column < depth ? y[0] : 0, column + 1 < depth ? y[1] : 0};
        apply(*reinterpret_cast<float2*>(x), pair);
        if (column < depth) y[0] = pair.x;
        if (column + 1 < depth) y[1] = pair.y;
      }
    }
  }
}

// A thread's two rows of the output and of the log-sum-exp, at two positions; negative: none.
// Between launches the output is kept in float32 where kPartial, else rounded to T.
template <typename T, int kDepth, bool kPartial>
struct OutputRows {
  T* output[2];
  float *partial[2], *log_sum_exp[2];

  __device__ OutputRows(const Arguments& args, int batch, int head, const int (&positions)[2]) {
#pragma unroll
    for (int r = 0; r < 2; r++) {
      const bool exists = positions[r] >= 0;
      output[r] = exists ? RowOf<T>(args.output, batch, head, positions[r]) : nullptr;
      partial[r] = kPartial && exists ? RowOf<float>(args.output_partial, batch, head, positions[r]) : nullptr;
      log_sum_exp[r] = exists ? args.log_sum_exp + StatisticsBase(args, batch, head) + positions[r] : nullptr;
    }
  }

  // Begins an online softmax where earlier launches left it.
  template <typename Softmax>
  __device__ void Continue(Softmax* softmax, const Arguments& args, bool vector) const {
    Clear(softmax->sum);
    if constexpr (kPartial) {
      EachPartial<T, kDepth>(softmax->sum, partial, args.value_depth, vector, [](float2& x, float2& y) { x = y; });
    } else {
      Sums<T, kDepth>::Add(softmax->sum, output, args.value_depth, vector);
    }
    const float sums[2] = {log_sum_exp[0] ? *log_sum_exp[0] : -INFINITY, log_sum_exp[1] ? *log_sum_exp[1] : -INFINITY};
    softmax->Continue(sums);
  }

  // Stores one that is finished: output and log-sum-exp of the keys so far.
  template <typename Softmax>
  __device__ void Store(Softmax* softmax, const Arguments& args, const Launch& launch, bool vector) const {
    if (kPartial && !launch.last) {
      EachPartial<T, kDepth>(softmax->sum, partial, args.value_depth, vector, [](float2& x, float2& y) { y = x; });
    } else {
      Sums<T, kDepth>::Store(softmax->sum, output, args.value_depth, vector);
    }
#pragma unroll
    for (int r = 0; r < 2; r++) {
      if (log_sum_exp[r] && threadIdx.x % 4 == 0) *log_sum_exp[r] = softmax->row_max[r];
    }
  }
};

// The end of a gradient in one launch: what earlier launches summed is added; the sum goes to `rows`, stays partial for later ones, or
// both.
template <typename T, int kDepth>
__device__ inline void StoreGradient(float (&sum)[kDepth / 8][4], T* const (&rows)[2], float* const (&partial)[2], int depth, bool vector,
                                     bool first, bool last, bool write) {
  if (!first) {
    EachPartial<T, kDepth>(sum, partial, depth, vector, [](float2& x, float2& y) {
      x.x += y.x;
      x.y += y.y;
    });
  }
  if (write) Sums<T, kDepth>::Store(sum, rows, depth, vector);
  if (!last) {
    EachPartial<T, kDepth>(sum, partial, depth, vector, [](float2& x, float2& y) { y = x; });
  }
}

// The thread's two rows of gradients at two positions; negative: none.
template <typename T>
struct GradientRows {
  T* rows[2];
  float* partial[2];

  __device__ GradientRows(const stf_tensor& tensor, const stf_tensor& partials, int batch, int head, const int (&positions)[2]) {
#pragma unroll
    for (int r = 0; r < 2; r++) {
      rows[r] = positions[r] < 0 ? nullptr : RowOf<T>(tensor, batch, head, positions[r]);
      partial[r] = positions[r] < 0 ? nullptr : RowOf<float>(partials, batch, head, positions[r]);
    }
  }
};

// Query gradients at two positions, but for the factor scale.
template <typename T, int kDepth>
__device__ inline void StoreQueryGradients(float (&sum)[kDepth / 8][4], const Arguments& args, const Launch& launch, int batch, int head,
                                           const int (&positions)[2]) {
  Scale(sum, args.scale);
  const GradientRows<T> to(args.query_grad, args.query_partial, batch, head, positions);
  StoreGradient<T, kDepth>(sum, to.rows, to.partial, args.key_depth, true, launch.first, launch.last, launch.last);
}

// Key gradients, but for the factor scale, and value gradients.
template <typename T, int kKeyDepth, int kValueDepth>
__device__ inline void StoreKeyGradients(float (&key_sum)[kKeyDepth / 8][4], float (&value_sum)[kValueDepth / 8][4], const Arguments& args,
                                         const Launch& launch, int batch, int head, const int (&positions)[2]) {
  Scale(key_sum, args.scale);
  const GradientRows<T> keys(args.key_grad, args.key_partial, batch, head, positions);
  StoreGradient<T, kKeyDepth>(key_sum, keys.rows, keys.partial, args.key_depth, true, launch.key_first, launch.key_last, launch.key_write);
  const GradientRows<T> values(args.value_grad, args.value_partial, batch, head, positions);
  StoreGradient<T, kValueDepth>(value_sum, values.rows, values.partial, args.value_depth, true, launch.key_first, launch.key_last,
                                launch.key_write);
}

}  // namespace cuda
}  // namespace stf

#endif  // STF_CUSTOM_OPS_ATTENTION_CUDA_COMMON_EPILOGUE_CUH_
