// Gradients of keys and values that several heads share: each head's own, added in the order of the heads.
#ifndef STF_CUSTOM_OPS_ATTENTION_CUDA_COMMON_GROUPS_CUH_
#define STF_CUSTOM_OPS_ATTENTION_CUDA_COMMON_GROUPS_CUH_

#include "custom_ops/attention/cuda/common/rows.cuh"

namespace stf {
namespace cuda {

constexpr int kGroupThreads = 256;

// to[b, t, h] = the sum of from[b, t, group * h] ... from[b, t, group * h + group - 1], in float32. kElements of a row at a time.
template <typename T, int kElements>
__global__ void SumGroupsKernel(stf_tensor from, stf_tensor to, int group, int heads, int positions, int depth, int64_t count) {
  using Elements = typename std::conditional<kElements == 1, T, uint4>::type;
  const int columns = depth / kElements;
  for (int64_t i = blockIdx.x * int64_t{kGroupThreads} + threadIdx.x; i < count; i += gridDim.x * int64_t{kGroupThreads}) {
    const int64_t row = i / columns;
    const int column = static_cast<int>(i % columns) * kElements, head = static_cast<int>(row % heads);
    const int64_t place = row / heads, batch = place / positions, position = place % positions;
    const T* x = static_cast<const T*>(from.data) + batch * from.batch_stride + position * from.position_stride +
                 int64_t{head} * group * from.head_stride + column;
    float sum[kElements] = {};
    for (int other = 0; other < group; other++, x += from.head_stride) {
      alignas(16) T elements[kElements];
      *reinterpret_cast<Elements*>(elements) = *reinterpret_cast<const Elements*>(x);
#pragma unroll
      for (int e = 0; e < kElements; e++) sum[e] += static_cast<float>(elements[e]);
    }
    alignas(16) T elements[kElements];
#pragma unroll
    for (int e = 0; e < kElements; e++) elements[e] = T(sum[e]);
    T* const y = static_cast<T*>(to.data) + batch * to.batch_stride + position * to.position_stride + head * to.head_stride + column;
    *reinterpret_cast<Elements*>(y) = *reinterpret_cast<Elements*>(elements);
  }
}

}  // namespace cuda
}  // namespace stf

#endif  // STF_CUSTOM_OPS_ATTENTION_CUDA_COMMON_GROUPS_CUH_
