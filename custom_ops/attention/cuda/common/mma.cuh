// The two matrix products that attention is made of, for one warp, 16 rows at a time:
//   MultiplyTransposed:  sum[16, 8 * kBlocks] += A[16, depth] * B[8 * kBlocks, depth]^T, both in shared memory   (scores)
//   MultiplyWeights:     sum[16, depth] += P[16, 8 * kBlocks] * B[8 * kBlocks, depth], P in registers           (weighted sums of rows)
// Halves run on the tensor cores (mma.m16n8k16), floats on the FP32 units, exactly.
//
// Accumulators are as mma has them: sum[b][e] is row lane / 4 + 8 * (e / 2), column 8 * b + 2 * (lane % 4) + e % 2. The floats' sums over
// depth alone are laid out in fours (see Column), so that rows of B are read 16 bytes at a time.
#ifndef STF_CUSTOM_OPS_ATTENTION_CUDA_COMMON_MMA_CUH_
#define STF_CUSTOM_OPS_ATTENTION_CUDA_COMMON_MMA_CUH_

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>

#include "custom_ops/attention/cuda/tiles.h"

namespace stf {
namespace cuda {

// RowPitch in elements.
template <typename T, int kDepth>
constexpr int kPitch = RowPitch(sizeof(T), kDepth) / sizeof(T);

__device__ inline uint32_t Pack(float x, float y, __nv_bfloat16) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(x, y);
  return reinterpret_cast<const uint32_t&>(pair);
}

__device__ inline uint32_t Pack(float x, float y, __half) {
  const __half2 pair = __floats2half2_rn(x, y);
  return reinterpret_cast<const uint32_t&>(pair);
}

__device__ inline float2 Unpack(uint32_t x, __nv_bfloat16) { return __bfloat1622float2(reinterpret_cast<const __nv_bfloat162&>(x)); }
__device__ inline float2 Unpack(uint32_t x, __half) { return __half22float2(reinterpret_cast<const __half2&>(x)); }

__device__ inline void Mma(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, __nv_bfloat16) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ inline void Mma(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, __half) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Four 8 x 8 matrices of halves; each lane gives the address of one row.
template <bool kTranspose>
__device__ inline void LoadMatrices(uint32_t (&x)[4], const void* row) {
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  if (kTranspose) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
                 : "r"(address)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
                 : "r"(address)
                 : "memory");
  }
}

template <typename T>
struct Matrix {
  // Column of element e (0 or 1) of block b of a sum over depth.
  __device__ static int Column(int b, int e) { return 8 * b + 2 * (threadIdx.x % 4) + e; }

  template <int kDepth, int kBlocks>
  __device__ static void MultiplyTransposed(float (&sum)[kBlocks][4], const T* a, const T* b) {
    const int lane = threadIdx.x % 32;
    constexpr int kRow = kPitch<T, kDepth>;
    a += (lane % 16) * kRow + lane / 16 * 8;
    b += (lane % 8 + lane / 16 * 8) * kRow + lane / 8 % 2 * 8;
#pragma unroll
    for (int k = 0; k < kDepth; k += 16) {
      uint32_t x[4];
      LoadMatrices<false>(x, a + k);
#pragma unroll
      for (int n = 0; n < kBlocks; n += 2) {
        uint32_t y[4];
        LoadMatrices<false>(y, b + n * 8 * kRow + k);
        Mma(sum[n], x, y[0], y[1], T());
        Mma(sum[n + 1], x, y[2], y[3], T());
      }
    }
  }

  template <int kDepth, int kBlocks>
  __device__ static void MultiplyWeights(float (&sum)[kDepth / 8][4], const float (&p)[kBlocks][4], const T* b) {
    const int lane = threadIdx.x % 32;
    constexpr int kRow = kPitch<T, kDepth>;
    b += (lane % 16) * kRow + lane / 16 * 8;
#pragma unroll
    for (int k = 0; k < kBlocks; k += 2) {
      const uint32_t x[4] = {Pack(p[k][0], p[k][1], T()), Pack(p[k][2], p[k][3], T()), Pack(p[k + 1][0], p[k + 1][1], T()),
                             Pack(p[k + 1][2], p[k + 1][3], T())};
#pragma unroll
      for (int n = 0; n < kDepth / 8; n += 2) {
        uint32_t y[4];
        LoadMatrices<true>(y, b + k * 8 * kRow + n * 8);
        Mma(sum[n], x, y[0], y[1], T());
        Mma(sum[n + 1], x, y[2], y[3], T());
      }
    }
  }
};

template <>
struct Matrix<float> {
  __device__ static int Column(int b, int e) { return b / 2 * 16 + 4 * (threadIdx.x % 4) + b % 2 * 2 + e; }

  template <int kDepth, int kBlocks>
  __device__ static void MultiplyTransposed(float (&sum)[kBlocks][4], const float* a, const float* b) {
    const int lane = threadIdx.x % 32;
    constexpr int kRow = kPitch<float, kDepth>;
    a += lane / 4 * kRow;
    b += 2 * (lane % 4) * kRow;
#pragma unroll 2
    for (int k = 0; k < kDepth; k += 4) {
      const float4 x[2] = {*reinterpret_cast<const float4*>(a + k), *reinterpret_cast<const float4*>(a + 8 * kRow + k)};
#pragma unroll
      for (int n = 0; n < kBlocks; n++) {
#pragma unroll
        for (int e = 0; e < 2; e++) {
          const float4 y = *reinterpret_cast<const float4*>(b + (n * 8 + e) * kRow + k);
#pragma unroll
          for (int r = 0; r < 2; r++) {
            float s = sum[n][2 * r + e];
            s = fmaf(x[r].x, y.x, s);
            s = fmaf(x[r].y, y.y, s);
            s = fmaf(x[r].z, y.z, s);
            sum[n][2 * r + e] = fmaf(x[r].w, y.w, s);
          }
        }
      }
    }
  }

  template <int kDepth, int kBlocks>
  __device__ static void MultiplyWeights(float (&sum)[kDepth / 8][4], const float (&p)[kBlocks][4], const float* b) {
    constexpr int kRow = kPitch<float, kDepth>;
    const int lane = threadIdx.x % 32;
    b += 4 * (lane % 4);
#pragma unroll
    for (int k = 0; k < kBlocks; k++) {
#pragma unroll
      for (int column = 0; column < 8; column++) {  // the lane that holds it has the weight of this row of B
        const int source = (lane & ~3) + column / 2;
        const float top = __shfl_sync(~0u, p[k][column % 2], source), bottom = __shfl_sync(~0u, p[k][2 + column % 2], source);
        const float* row = b + (8 * k + column) * kRow;
#pragma unroll
        for (int n = 0; n < kDepth / 8; n += 2) {
          const float4 y = *reinterpret_cast<const float4*>(row + n * 8);
          sum[n][0] = fmaf(top, y.x, sum[n][0]);
          sum[n][1] = fmaf(top, y.y, sum[n][1]);
          sum[n][2] = fmaf(bottom, y.x, sum[n][2]);
          sum[n][3] = fmaf(bottom, y.y, sum[n][3]);
          sum[n + 1][0] = fmaf(top, y.z, sum[n + 1][0]);
          sum[n + 1][1] = fmaf(top, y.w, sum[n + 1][1]);
          sum[n + 1][2] = fmaf(bottom, y.z, sum[n + 1][2]);
          sum[n + 1][3] = fmaf(bottom, y.w, sum[n + 1][3]);
        }
      }
    }
  }
};

}  // namespace cuda
}  // namespace stf

#endif  // STF_CUSTOM_OPS_ATTENTION_CUDA_COMMON_MMA_CUH_
