// Rows of tensors to shared memory, and accumulators to and from rows, 16 bytes at a time where the tensors allow it.
#ifndef STF_CUSTOM_OPS_ATTENTION_CUDA_COMMON_ROWS_CUH_
#define STF_CUSTOM_OPS_ATTENTION_CUDA_COMMON_ROWS_CUH_

#include "custom_ops/attention/cuda/common/arguments.h"
#include "custom_ops/attention/cuda/common/mma.cuh"

namespace stf {
namespace cuda {

// Position 0 of a batch row and head.
template <typename T>
__device__ T* Base(const stf_tensor& tensor, int batch, int head) {
  return static_cast<T*>(tensor.data) + batch * tensor.batch_stride + head * tensor.head_stride;
}

template <typename T>
__device__ T* RowOf(const stf_tensor& tensor, int batch, int head, int position) {
  return Base<T>(tensor, batch, head) + position * tensor.position_stride;
}

// Copies kBytes (4 or 16) to shared memory in the background, or writes zeros.
template <int kBytes>
__device__ inline void CopyAsync(void* to, const void* from, bool valid) {
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(to));
  const int bytes = valid ? kBytes : 0;
  if (kBytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(from), "r"(bytes) : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(address), "l"(from), "r"(bytes) : "memory");
  }
}

__device__ inline void CommitCopies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

template <int kLeft>
__device__ inline void WaitForCopies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kLeft) : "memory");
}

// tile[row] = the row at position place(row) of a tensor; zeros where that is negative, and beyond `depth`.
template <typename T, int kDepth, int kRows, int kThreads, typename Place>
__device__ void LoadRows(T* tile, const T* base, int64_t stride, int depth, bool vector, Place place) {
  constexpr int kChunk = 16 / sizeof(T), kChunks = kDepth / kChunk, kParts = kChunks > kThreads ? kChunks / kThreads : 1;
  constexpr int kStep = kThreads * kParts / kChunks;
  static_assert(kThreads * kParts % kChunks == 0 && kRows % kStep == 0, "every thread copies the same columns of as many rows");
#pragma unroll
  for (int part = 0; part < kParts; part++) {
    const int column = (threadIdx.x % kChunks + part * kThreads) * kChunk;
    T* to = tile + threadIdx.x / kChunks * kPitch<T, kDepth> + column;
    const T* const columns = base + (column < depth ? column : 0);
#pragma unroll
    for (int i = 0; i < kRows; i += kStep, to += kStep * kPitch<T, kDepth>) {
      const int position = column < depth ? place(threadIdx.x / kChunks + i) : -1;
      const T* from = columns + max(position, 0) * stride;
      if (vector) {
        CopyAsync<16>(to, from, position >= 0);
      } else {
        for (int e = 0; e < kChunk; e++) to[e] = position >= 0 && column + e < depth ? from[e] : T(0.0f);
      }
    }
  }
}

// In a quad of lanes, lane t's x[i] becomes lane i's x[t].
__device__ inline void TransposeQuad(uint32_t (&x)[4]) {
  const bool odd = threadIdx.x & 1, upper = threadIdx.x & 2;
#pragma unroll
  for (int i = 0; i < 4; i += 2) {
    const uint32_t received = __shfl_xor_sync(~0u, odd ? x[i] : x[i + 1], 1);
    (odd ? x[i] : x[i + 1]) = received;
  }
#pragma unroll
  for (int i = 0; i < 2; i++) {
    const uint32_t received = __shfl_xor_sync(~0u, upper ? x[i] : x[i + 2], 2);
    (upper ? x[i] : x[i + 2]) = received;
  }
}

// Accumulators over depth (see mma.cuh) to and from two rows of a tensor: the thread's rows lane / 4 and lane / 4 + 8. A null row is
// not touched.
template <typename T, int kDepth>
struct Sums {
  __device__ static void Add(float (&sum)[kDepth / 8][4], T* const (&rows)[2], int depth, bool vector) {
    const int lane = threadIdx.x % 4;
#pragma unroll
    for (int r = 0; r < 2; r++) {
      if (vector) {
#pragma unroll
        for (int b = 0; b < kDepth / 8; b += 4) {
          const int column = 8 * b + 8 * lane;
          uint4 y = {};
          if (rows[r] && column < depth) y = *reinterpret_cast<const uint4*>(rows[r] + column);
          uint32_t x[4] = {y.x, y.y, y.z, y.w};
          TransposeQuad(x);
#pragma unroll
          for (int i = 0; i < 4; i++) {
            const float2 pair = Unpack(x[i], T());
            sum[b + i][2 * r] += pair.x;
            sum[b + i][2 * r + 1] += pair.y;
          }
        }
      } else if (rows[r]) {
#pragma unroll
        for (int b = 0; b < kDepth / 8; b++) {
#pragma unroll
          for (int e = 0; e < 2; e++) {
            const int column = Matrix<T>::Column(b, e);
            if (column < depth) sum[b][2 * r + e] += static_cast<float>(rows[r][column]);
          }
        }
      }
    }
  }

  __device__ static void Store(const float (&sum)[kDepth / 8][4], T* const (&rows)[2], int depth, bool vector) {
    const int lane = threadIdx.x % 4;
#pragma unroll
    for (int r = 0; r < 2; r++) {
      if (vector) {
#pragma unroll
        for (int b = 0; b < kDepth / 8; b += 4) {
          uint32_t x[4];
#pragma unroll
          for (int i = 0; i < 4; i++) x[i] = Pack(sum[b + i][2 * r], sum[b + i][2 * r + 1], T());
          TransposeQuad(x);
          const int column = 8 * b + 8 * lane;
          if (rows[r] && column < depth) *reinterpret_cast<uint4*>(rows[r] + column) = make_uint4(x[0], x[1], x[2], x[3]);
        }
      } else if (rows[r]) {
#pragma unroll
        for (int b = 0; b < kDepth / 8; b++) {
#pragma unroll
          for (int e = 0; e < 2; e++) {
            const int column = Matrix<T>::Column(b, e);
            if (column < depth) rows[r][column] = T(sum[b][2 * r + e]);
          }
        }
      }
    }
  }
};

template <int kDepth>
struct Sums<float, kDepth> {
  __device__ static void Add(float (&sum)[kDepth / 8][4], float* const (&rows)[2], int depth, bool) {
    Each(sum, rows, depth, [](float& x, float& y) { x += y; });
  }

  __device__ static void Store(float (&sum)[kDepth / 8][4], float* const (&rows)[2], int depth, bool vector) {
    if (!vector) {
      Each(sum, rows, depth, [](float& x, float& y) { y = x; });
      return;
    }
#pragma unroll
    for (int r = 0; r < 2; r++) {
      if (!rows[r]) continue;
#pragma unroll
      for (int b = 0; b < kDepth / 8; b += 2) {
        const int column = Matrix<float>::Column(b, 0);
        const float4 x = {sum[b][2 * r], sum[b][2 * r + 1], sum[b + 1][2 * r], sum[b + 1][2 * r + 1]};
        if (column < depth) *reinterpret_cast<float4*>(rows[r] + column) = x;
      }
    }
  }

 private:
  template <typename Do>
  __device__ static void Each(float (&sum)[kDepth / 8][4], float* const (&rows)[2], int depth, Do apply) {
#pragma unroll
    for (int r = 0; r < 2; r++) {
      if (!rows[r]) continue;
#pragma unroll
      for (int b = 0; b < kDepth / 8; b++) {
#pragma unroll
        for (int e = 0; e < 2; e++) {
          const int column = Matrix<float>::Column(b, e);
          if (column < depth) apply(sum[b][2 * r + e], rows[r][column]);
        }
      }
    }
  }
};

// delta[row] = sum over depth of output * output_grad, for a warp's 16 rows; output_grad is in shared memory (zeros beyond `depth`).
template <typename T, int kDepth, typename Place>
__device__ void SumProducts(float* delta, const T* grads, const T* output, int64_t stride, int depth, bool vector, Place place) {
  constexpr int kChunk = 16 / sizeof(T), kChunks = kDepth / kChunk, kLanes = kChunks < 32 ? kChunks : 32;
  const int lane = threadIdx.x % 32;
#pragma unroll 4
  for (int row = lane / kLanes; row < 16; row += 32 / kLanes) {
    const int position = place(row);
    float sum = 0;
    for (int column = lane % kLanes * kChunk; column < depth && position >= 0; column += kLanes * kChunk) {
      T x[kChunk];
      if (vector) {
        *reinterpret_cast<uint4*>(x) = *reinterpret_cast<const uint4*>(output + position * stride + column);
      } else {
        for (int e = 0; e < kChunk; e++) x[e] = column + e < depth ? output[position * stride + column + e] : T(0.0f);
      }
#pragma unroll
      for (int e = 0; e < kChunk; e++) {
        sum = fmaf(static_cast<float>(x[e]), static_cast<float>(grads[row * kPitch<T, kDepth> + column + e]), sum);
      }
    }
#pragma unroll
    for (int other = kLanes / 2; other > 0; other /= 2) sum += __shfl_xor_sync(~0u, sum, other);
    if (lane % kLanes == 0) delta[row] = sum;
  }
}

}  // namespace cuda
}  // namespace stf

#endif  // STF_CUSTOM_OPS_ATTENTION_CUDA_COMMON_ROWS_CUH_
