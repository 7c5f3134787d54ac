#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <type_traits>

#include "custom_ops/residual_stack/cuda/rowwise.h"

namespace stf {
namespace cuda {
namespace {

constexpr int kWarp = 32, kThreads = 256, kWarps = kThreads / kWarp;
constexpr int kLaneElements = kVector, kWarpElements = kWarp * kLaneElements;  // of a row, at a time

// Eight elements of a row, as a lane has them.
using Values = float[kLaneElements];

__device__ inline float2 ToFloats(__nv_bfloat162 x) { return __bfloat1622float2(x); }
__device__ inline float2 ToFloats(__half2 x) { return __half22float2(x); }
__device__ inline void FromFloats(float x, float y, __nv_bfloat162* pair) { *pair = __floats2bfloat162_rn(x, y); }
__device__ inline void FromFloats(float x, float y, __half2* pair) { *pair = __floats2half2_rn(x, y); }

template <typename T>
struct PairOf;
template <>
struct PairOf<__nv_bfloat16> {
  using Type = __nv_bfloat162;
};
template <>
struct PairOf<__half> {
  using Type = __half2;
};

template <typename T>
union Vector {
  uint4 bits;
  typename PairOf<T>::Type pairs[kLaneElements / 2];
};

template <typename T>
__device__ inline void Load(const T* from, Values& x) {
  Vector<T> v;
  v.bits = *reinterpret_cast<const uint4*>(from);
#pragma unroll
  for (int i = 0; i < kLaneElements / 2; i++) {
    const float2 pair = ToFloats(v.pairs[i]);
    x[2 * i] = pair.x;
    x[2 * i + 1] = pair.y;
  }
}

__device__ inline void Load(const float* from, Values& x) {
#pragma unroll
  for (int i = 0; i < kLaneElements; i += 4) {
    const float4 v = *reinterpret_cast<const float4*>(from + i);
    x[i] = v.x;
    x[i + 1] = v.y;
    x[i + 2] = v.z;
    x[i + 3] = v.w;
  }
}

// Writes x, unless `to` is null, and leaves in it what is written: rounded.
template <typename T>
__device__ inline void Store(Values& x, T* to) {
  Vector<T> v;
#pragma unroll
  for (int i = 0; i < kLaneElements / 2; i++) {
    FromFloats(x[2 * i], x[2 * i + 1], &v.pairs[i]);
    const float2 pair = ToFloats(v.pairs[i]);
    x[2 * i] = pair.x;
    x[2 * i + 1] = pair.y;
  }
  if (to) *reinterpret_cast<uint4*>(to) = v.bits;
}

__device__ inline float WarpSum(float x) {
#pragma unroll
  for (int lane = kWarp / 2; lane > 0; lane /= 2) x += __shfl_xor_sync(~0u, x, lane);
  return x;
}

__device__ inline uint32_t Mix(uint32_t word) {
  word ^= word >> 16;
  word *= 0x21F0AAADu;
  word ^= word >> 15;
  word *= 0x735A2D97u;
  return word ^ word >> 15;
}

// The masks of one addition. `first` and `second` are the seed's words.
struct Mask {
  uint32_t first, second, below;
  int64_t positions;
  stf_part part;

  __device__ explicit Mask(const Dropout& dropout)
      : first(dropout.below ? Mix(dropout.seed[0] + static_cast<uint32_t>(dropout.block)) : 0),
        second(dropout.below ? Mix(dropout.seed[1] + (static_cast<uint32_t>(dropout.addition) << 30)) : 0),
        below(dropout.below),
        positions(dropout.positions),
        part(dropout.part) {}
  __device__ uint32_t OfRow(int64_t row) const {
    if (part.length && below) {
      const int64_t sequence = row / positions, t = row % positions;
      row = sequence * part.length + part.first + t / part.run * part.step + t % part.run;
    }
    return Mix(Mix(static_cast<uint32_t>(row) + first) ^ second);
  }
  __device__ bool Keeps(uint32_t of_row, int column) const { return Mix(of_row + static_cast<uint32_t>(column) * 0x9E3779B9u) >= below; }
};

// A warp's rows: begin, and the step to the next.
struct WarpRows {
  int64_t begin = int64_t{blockIdx.x} * kWarps + threadIdx.x / kWarp, step = int64_t{gridDim.x} * kWarps;
};

// Sums of all warps' lanes into sums[blockIdx.x][column ...], columns from `column` on. For all threads of a block.
__device__ inline void SumWarps(const Values& lane_sums, int64_t column, int64_t width, float* sums, int64_t stride) {
  __shared__ float shared[kWarps][kWarpElements];
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  __syncthreads();  // of the call before
#pragma unroll
  for (int i = 0; i < kLaneElements; i++) shared[warp][lane * kLaneElements + i] = lane_sums[i];
  __syncthreads();
  for (int i = threadIdx.x; i < kWarpElements && column + i < width; i += kThreads) {
    float sum = 0;
    for (int w = 0; w < kWarps; w++) sum += shared[w][i];
    sums[blockIdx.x * stride + column + i] = sum;
  }
}

template <typename T, int kChunks>
__global__ void __launch_bounds__(kThreads)
    AddAndNormalizeKernel(const T* input, const T* branch, const float* bias, Dropout dropout, float epsilon, T* output, T* normalized,
                          float* inv_std, int64_t rows, int width) {
  const int lane = threadIdx.x % kWarp;
  const Mask mask(dropout);
  const float inverse_width = 1.0f / width;
  for (WarpRows r; r.begin < rows; r.begin += r.step) {
    const int64_t row = r.begin, at = row * width;
    const uint32_t row_mask = mask.OfRow(row);
    Values x[kChunks];
    float sum = 0;
#pragma unroll
    for (int c = 0; c < kChunks; c++) {
      const int column = c * kWarpElements + lane * kLaneElements;
      if (column >= width) break;
      Load(input + at + column, x[c]);
      if (branch) {
        Values y, b;
        Load(branch + at + column, y);
        Load(bias + column, b);
#pragma unroll
        for (int i = 0; i < kLaneElements; i++) {
          const float value = y[i] + b[i];
          if (!mask.below) {
            x[c][i] += value;
          } else if (mask.Keeps(row_mask, column + i)) {
            x[c][i] += value * dropout.scale;
          }
        }
        Store(x[c], output ? output + at + column : nullptr);
      }
#pragma unroll
      for (int i = 0; i < kLaneElements; i++) sum += x[c][i];
    }
    if (!normalized) continue;
    const float mean = WarpSum(sum) * inverse_width;
    float squares = 0;
#pragma unroll
    for (int c = 0; c < kChunks; c++) {
      if (c * kWarpElements + lane * kLaneElements >= width) break;
#pragma unroll
      for (int i = 0; i < kLaneElements; i++) squares += (x[c][i] - mean) * (x[c][i] - mean);
    }
    const float scale = rsqrtf(WarpSum(squares) * inverse_width + epsilon);
#pragma unroll
    for (int c = 0; c < kChunks; c++) {
      const int column = c * kWarpElements + lane * kLaneElements;
      if (column >= width) break;
#pragma unroll
      for (int i = 0; i < kLaneElements; i++) x[c][i] = (x[c][i] - mean) * scale;
      Store(x[c], normalized + at + column);
    }
    if (lane == 0) inv_std[row] = scale;
  }
}

// Of h = (x - mean) / std: dx = (dh - mean(dh) - h mean(dh h)) / std.
template <typename T, int kChunks>
__global__ void __launch_bounds__(kThreads)
    NormalizeGradientKernel(const T* upstream, const T* normalized_grad, const T* normalized, const float* inv_std, Dropout dropout,
                            T* grad, T* dropped, float* sums, int64_t stride, int64_t rows, int width) {
  const int lane = threadIdx.x % kWarp;
  const Mask mask(dropout);
  const float inverse_width = 1.0f / width;
  Values column_sums[kChunks] = {};
  for (WarpRows r; r.begin < rows; r.begin += r.step) {
    const int64_t row = r.begin, at = row * width;
    Values g[kChunks], h[kChunks];
    float mean = 0, along = 0;
    if (normalized_grad) {
#pragma unroll
      for (int c = 0; c < kChunks; c++) {
        const int column = c * kWarpElements + lane * kLaneElements;
        if (column >= width) break;
        Load(normalized_grad + at + column, g[c]);
        Load(normalized + at + column, h[c]);
#pragma unroll
        for (int i = 0; i < kLaneElements; i++) {
          mean += g[c][i];
          along += g[c][i] * h[c][i];
        }
      }
      mean = WarpSum(mean) * inverse_width;
      along = WarpSum(along) * inverse_width;
    }
    const float scale = normalized_grad ? inv_std[row] : 0;
    const uint32_t row_mask = mask.OfRow(row);
#pragma unroll
    for (int c = 0; c < kChunks; c++) {
      const int column = c * kWarpElements + lane * kLaneElements;
      if (column >= width) break;
      Values x;
      Load(upstream + at + column, x);
      if (normalized_grad) {
#pragma unroll
        for (int i = 0; i < kLaneElements; i++) x[i] += (g[c][i] - mean - h[c][i] * along) * scale;
        Store(x, grad + at + column);
      }
      if (dropped) {
#pragma unroll
        for (int i = 0; i < kLaneElements; i++) x[i] = mask.Keeps(row_mask, column + i) ? x[i] * dropout.scale : 0.0f;
        Store(x, dropped + at + column);
      }
#pragma unroll
      for (int i = 0; i < kLaneElements; i++) column_sums[c][i] += x[i];
    }
  }
  if (!sums) return;
#pragma unroll
  for (int c = 0; c < kChunks; c++) SumWarps(column_sums[c], c * kWarpElements, width, sums, stride);
}

// u sigmoid(1.702 u), and its slope.
__device__ inline float Sigmoid(float u) { return 1.0f / (1.0f + __expf(-1.702f * u)); }

template <typename T>
__global__ void __launch_bounds__(kThreads) ActivateKernel(const T* input, T* output, int64_t vectors) {
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < vectors; i += int64_t{gridDim.x} * kThreads) {
    Values x;
    Load(input + i * kLaneElements, x);
#pragma unroll
    for (int j = 0; j < kLaneElements; j++) x[j] *= Sigmoid(x[j]);
    Store(x, output + i * kLaneElements);
  }
}

// blockIdx.y: which columns. kActivation: `grad` times the slope at `input`, in place; otherwise `input` alone is summed.
template <typename T, bool kActivation>
__global__ void __launch_bounds__(kThreads)
    SumRowsKernel(const T* input, T* grad, float* sums, int64_t stride, int64_t rows, int64_t width) {
  const int64_t column = int64_t{blockIdx.y} * kWarpElements, at = column + threadIdx.x % kWarp * kLaneElements;
  Values column_sums = {};
  if (at < width) {
#pragma unroll 2
    for (WarpRows r; r.begin < rows; r.begin += r.step) {
      Values u;
      Load(input + r.begin * width + at, u);
      if constexpr (kActivation) {
        Values g;
        Load(grad + r.begin * width + at, g);
#pragma unroll
        for (int i = 0; i < kLaneElements; i++) {
          const float s = Sigmoid(u[i]);
          u[i] = g[i] * s * (1.0f + 1.702f * u[i] * (1.0f - s));
        }
        Store(u, grad + r.begin * width + at);
      }
#pragma unroll
      for (int i = 0; i < kLaneElements; i++) column_sums[i] += u[i];
    }
  }
  SumWarps(column_sums, column, width, sums, stride);
}

__global__ void __launch_bounds__(kThreads) FinishSumsKernel(const float* sums, Sums outputs, int64_t stride) {
  __shared__ float shared[kWarps][kWarp];
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  int64_t column = int64_t{blockIdx.x} * kWarp + lane;
  float sum = 0;
  if (column < stride) {
#pragma unroll 11
    for (int part = warp; part < kParts; part += kWarps) sum += sums[part * stride + column];
  }
  shared[warp][lane] = sum;
  __syncthreads();
  if (warp > 0 || column >= stride) return;
  sum = 0;
  for (int w = 0; w < kWarps; w++) sum += shared[w][lane];
#pragma unroll
  for (int i = 0; i < 4; i++) {
    if (column >= 0 && column < outputs.columns[i] && outputs.output[i]) outputs.output[i][column] = sum;
    column -= outputs.columns[i];
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads) RoundKernel(const float* input, T* output, int64_t vectors) {
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < vectors; i += int64_t{gridDim.x} * kThreads) {
    Values x;
    Load(input + i * kLaneElements, x);
    Store(x, output + i * kLaneElements);
  }
}

// Calls a function with a null pointer of the dtype's type.
template <typename Function>
cudaError_t OfDtype(int32_t dtype, Function function) {
  if (dtype == STF_BFLOAT16) {
    function(static_cast<__nv_bfloat16*>(nullptr));
  } else {
    function(static_cast<__half*>(nullptr));
  }
  return cudaGetLastError();
}

// Calls a function with how many times a warp must go along a row, a power of two, as a type.
template <typename Function>
void OfWidth(int64_t width, Function function) {
  if (width <= kWarpElements) return function(std::integral_constant<int, 1>());
  if (width <= 2 * kWarpElements) return function(std::integral_constant<int, 2>());
  if (width <= 4 * kWarpElements) return function(std::integral_constant<int, 4>());
  return function(std::integral_constant<int, 8>());
}

// Thread blocks for so many threads' work.
int64_t Blocks(int64_t threads) { return std::min((threads + kThreads - 1) / kThreads, int64_t{1} << 30); }

}  // namespace

cudaError_t AddAndNormalize(const Rows& rows, const void* input, const void* branch, const float* bias, const Dropout& dropout,
                            float epsilon, void* output, void* normalized, float* inv_std) {
  return OfDtype(rows.dtype, [&](auto* null) {
    using T = std::remove_pointer_t<decltype(null)>;
    OfWidth(rows.width, [&](auto chunks) {
      AddAndNormalizeKernel<T, decltype(chunks)::value><<<Blocks(rows.count * kWarp), kThreads, 0, rows.stream>>>(
          static_cast<const T*>(input), static_cast<const T*>(branch), bias, dropout, epsilon, static_cast<T*>(output),
          static_cast<T*>(normalized), inv_std, rows.count, static_cast<int>(rows.width));
    });
  });
}

cudaError_t NormalizeGradient(const Rows& rows, const void* upstream, const void* normalized_grad, const void* normalized,
                              const float* inv_std, const Dropout& dropout, void* grad, void* dropped, float* sums, int64_t stride) {
  return OfDtype(rows.dtype, [&](auto* null) {
    using T = std::remove_pointer_t<decltype(null)>;
    OfWidth(rows.width, [&](auto chunks) {
      NormalizeGradientKernel<T, decltype(chunks)::value><<<kParts, kThreads, 0, rows.stream>>>(
          static_cast<const T*>(upstream), static_cast<const T*>(normalized_grad), static_cast<const T*>(normalized), inv_std, dropout,
          static_cast<T*>(grad), static_cast<T*>(dropped), sums, stride, rows.count, static_cast<int>(rows.width));
    });
  });
}

cudaError_t Activate(const Rows& rows, const void* input, void* output) {
  return OfDtype(rows.dtype, [&](auto* null) {
    using T = std::remove_pointer_t<decltype(null)>;
    const int64_t vectors = rows.count * rows.width / kLaneElements;
    ActivateKernel<T><<<Blocks(vectors), kThreads, 0, rows.stream>>>(static_cast<const T*>(input), static_cast<T*>(output), vectors);
  });
}

cudaError_t ActivateGradient(const Rows& rows, const void* input, void* grad, float* sums, int64_t stride) {
  return OfDtype(rows.dtype, [&](auto* null) {
    using T = std::remove_pointer_t<decltype(null)>;
    const dim3 grid(kParts, (rows.width + kWarpElements - 1) / kWarpElements);
    SumRowsKernel<T, true>
        <<<grid, kThreads, 0, rows.stream>>>(static_cast<const T*>(input), static_cast<T*>(grad), sums, stride, rows.count, rows.width);
  });
}

cudaError_t SumRows(const Rows& rows, const void* input, float* sums, int64_t stride) {
  return OfDtype(rows.dtype, [&](auto* null) {
    using T = std::remove_pointer_t<decltype(null)>;
    const dim3 grid(kParts, (rows.width + kWarpElements - 1) / kWarpElements);
    SumRowsKernel<T, false>
        <<<grid, kThreads, 0, rows.stream>>>(static_cast<const T*>(input), nullptr, sums, stride, rows.count, rows.width);
  });
}

cudaError_t Round(int32_t dtype, const float* input, void* output, int64_t count, cudaStream_t stream) {
  return OfDtype(dtype, [&](auto* null) {
    using T = std::remove_pointer_t<decltype(null)>;
    const int64_t vectors = count / kLaneElements;
    RoundKernel<T><<<Blocks(vectors), kThreads, 0, stream>>>(input, static_cast<T*>(output), vectors);
  });
}

cudaError_t FinishSums(const float* sums, const Sums& outputs, cudaStream_t stream) {
  int64_t stride = 0;
  for (const int64_t columns : outputs.columns) stride += columns;
  FinishSumsKernel<<<(stride + kWarp - 1) / kWarp, kThreads, 0, stream>>>(sums, outputs, stride);
  return cudaGetLastError();
}

}  // namespace cuda
}  // namespace stf
