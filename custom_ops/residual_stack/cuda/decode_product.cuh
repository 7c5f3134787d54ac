// The phases of the decode kernel that are products: projection, combination of heads, hidden layer, output.
#ifndef STF_CUSTOM_OPS_RESIDUAL_STACK_CUDA_DECODE_PRODUCT_CUH_
#define STF_CUSTOM_OPS_RESIDUAL_STACK_CUDA_DECODE_PRODUCT_CUH_

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <type_traits>

#include "custom_ops/residual_stack/cuda/decode_common.cuh"

namespace stf {
namespace cuda {
namespace decode {

__device__ inline uint32_t SharedAddress(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

__device__ inline void CopyAsync(void* to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(SharedAddress(to)), "l"(from) : "memory");
}

// A copy of some numbers of a row, rounded to the dtype of a product's operands.
__device__ inline void PutFour(float4 x, float* to) { *reinterpret_cast<float4*>(to) = x; }
__device__ inline void PutFour(float4 x, __nv_bfloat16* to) {
  const __nv_bfloat162 pairs[2] = {__floats2bfloat162_rn(x.x, x.y), __floats2bfloat162_rn(x.z, x.w)};
  *reinterpret_cast<uint2*>(to) = *reinterpret_cast<const uint2*>(pairs);
}
__device__ inline void PutFour(float4 x, __half* to) {
  const __half2 pairs[2] = {__floats2half2_rn(x.x, x.y), __floats2half2_rn(x.z, x.w)};
  *reinterpret_cast<uint2*>(to) = *reinterpret_cast<const uint2*>(pairs);
}

// A part of an inner axis is filled up with zeros to what the tensor cores take at a time.
__device__ inline int RoundUp(int inner) { return (inner + 15) / 16 * 16; }

// A lane's elements of a tile, eight columns at a time: rows lane / 4 and eight further down, columns 2 (lane % 4) and one further across.
using Sums = float[kColumns / 8][4];

template <typename T>
__device__ inline void MultiplyAdd(float (&sum)[4], const uint32_t (&a)[4], uint32_t b, uint32_t c) {
  if constexpr (std::is_same_v<T, __half>) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b), "r"(c));
  } else {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b), "r"(c));
  }
}

// Adds the product of a warp's part of the inner axis.
template <typename T>
__device__ inline void Multiply(const Operands<T>& o, int inner, Sums& sum) {
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
#pragma unroll 1
  for (int k = warp * 16; k < inner; k += kWarps * 16) {
    uint32_t a[4], b[4];
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(a[0]), "=r"(a[1]), "=r"(a[2]), "=r"(a[3])
                 : "r"(SharedAddress(&o.input[lane % 16][k + lane / 16 * 8])));
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(b[0]), "=r"(b[1]), "=r"(b[2]), "=r"(b[3])
                 : "r"(SharedAddress(&o.kernel[k + lane % 16][lane / 16 * 8])));
    MultiplyAdd<T>(sum[0], a, b[0], b[1]);
    MultiplyAdd<T>(sum[1], a, b[2], b[3]);
  }
}
__device__ inline void Multiply(const Operands<float>& o, int inner, Sums& sum) {
  const int warp = threadIdx.x / kWarp, row = threadIdx.x % kWarp / 4, column = threadIdx.x % 4 * 2;
#pragma unroll 4
  for (int k = warp; k < inner; k += kWarps) {
    const float x = o.input[row][k], y = o.input[row + 8][k];
#pragma unroll
    for (int g = 0; g < kColumns / 8; g++) {
      const float2 w = *reinterpret_cast<const float2*>(&o.kernel[k][8 * g + column]);
      sum[g][0] += x * w.x, sum[g][1] += x * w.y, sum[g][2] += y * w.x, sum[g][3] += y * w.y;
    }
  }
}

// A phase that is a product: input [batch, in] times kernel [in, out], plus bias. Rows of the input are of mean 0 and variance 1 in it
// where it is `normalized`.
template <typename T>
struct Product {
  const T* kernel;
  const float *bias, *input;
  int in, out;
  bool normalized;

  __device__ Product(const Params& p, int block, int phase) : normalized(phase == kProject || phase == kHidden) {
    const void* kernels;
    const int values = p.heads * p.value_depth;
    switch (phase) {
      case kProject:
        kernels = p.weights.projection_kernel, bias = p.weights.projection_bias, input = p.stream;
        in = p.width, out = 2 * p.heads * p.key_depth + values;
        break;
      case kCombine:
        kernels = p.weights.attention_output_kernel, bias = p.weights.attention_output_bias, input = p.attended;
        in = values, out = p.width;
        break;
      case kHidden:
        kernels = p.weights.hidden_kernel, bias = p.weights.hidden_bias, input = p.stream, in = p.width, out = p.hidden;
        break;
      default:
        kernels = p.weights.output_kernel, bias = p.weights.output_bias, input = p.hidden_layer, in = p.hidden, out = p.width;
    }
    kernel = static_cast<const T*>(kernels) + static_cast<int64_t>(block) * in * out;
    bias += static_cast<int64_t>(block) * out;
  }

  __device__ int ColumnTiles() const { return (out + kColumns - 1) / kColumns; }

  // Asks for the weights of this thread block's first tile.
  __device__ void Prefetch() const {
    const int column = blockIdx.x % ColumnTiles() * kColumns;
    for (int k = threadIdx.x; k < in; k += kThreads) decode::Prefetch(kernel + static_cast<int64_t>(k) * out + column);
  }

  // Begins to copy a tile's columns of a part of the kernel to shared memory; what the kernel does not have is 0.
  __device__ void CopyKernel(int first, int inner, int column, Operands<T>* to) const {
    constexpr int kPieces = kColumns * sizeof(T) / 16;  // of a row
    for (int i = threadIdx.x; i < RoundUp(inner) * kPieces; i += kThreads) {
      const int k = i / kPieces, piece = i % kPieces * (16 / static_cast<int>(sizeof(T)));
      if (k < inner && column + piece < out) {
        CopyAsync(&to->kernel[k][piece], kernel + static_cast<int64_t>(first + k) * out + column + piece);
      } else {
        *reinterpret_cast<uint4*>(&to->kernel[k][piece]) = uint4{};
      }
    }
    asm volatile("cp.async.commit_group;" ::: "memory");
  }
};

// A warp's rows of a tile's input.
template <typename T>
struct InputRows {
  static constexpr int kEach = kRows / kWarps, kPieces = Operands<T>::kInner / (4 * kWarp);
  static_assert(kRows % kWarps == 0, "each warp has as many");
  const float* rows[kEach];
  float mean[kEach] = {}, scale[kEach];
  float4 x[kEach][kPieces];

  // Rows behind the last are the last's again; nothing comes of them.
  __device__ InputRows(const Product<T>& product, int first_row, int batch) {
#pragma unroll
    for (int r = 0; r < kEach; r++) {
      const int row = min(first_row + static_cast<int>(threadIdx.x) / kWarp + r * kWarps, batch - 1);
      rows[r] = product.input + static_cast<int64_t>(row) * product.in;
      scale[r] = 1;
    }
  }

  __device__ void Load(int first, int inner) {
    const int lane = threadIdx.x % kWarp;
#pragma unroll
    for (int i = 0; i < kPieces; i++) {
      const int k = 4 * (i * kWarp + lane);
#pragma unroll
      for (int r = 0; r < kEach; r++) x[r][i] = k < inner ? GetFour(rows[r] + first + k) : float4{mean[r], mean[r], mean[r], mean[r]};
    }
  }

  // Mean and scale of whole rows; of those that are longer than what is loaded at a time, by another look at all of them.
  __device__ void Normalize(int in, float epsilon) {
    constexpr int kInner = Operands<T>::kInner;
    float sum[kEach] = {};
    for (int first = 0; first < in; first += kInner) {
      if (in > kInner) Load(first, min(kInner, in - first));
#pragma unroll
      for (int i = 0; i < kPieces; i++) {
#pragma unroll
        for (int r = 0; r < kEach; r++) sum[r] += x[r][i].x + x[r][i].y + x[r][i].z + x[r][i].w;
      }
    }
#pragma unroll
    for (int r = 0; r < kEach; r++) mean[r] = SumOverLanes(sum[r]) / in, sum[r] = 0;
    for (int first = 0; first < in; first += kInner) {
      if (in > kInner) Load(first, min(kInner, in - first));
      const int lane = threadIdx.x % kWarp;
#pragma unroll
      for (int i = 0; i < kPieces; i++) {
        if (first + 4 * (i * kWarp + lane) >= in) break;
#pragma unroll
        for (int r = 0; r < kEach; r++) {
          const float4 d = {x[r][i].x - mean[r], x[r][i].y - mean[r], x[r][i].z - mean[r], x[r][i].w - mean[r]};
          sum[r] += d.x * d.x + d.y * d.y + d.z * d.z + d.w * d.w;
        }
      }
    }
#pragma unroll
    for (int r = 0; r < kEach; r++) scale[r] = rsqrtf(SumOverLanes(sum[r]) / in + epsilon);
    if (in > kInner) Load(0, kInner);
  }

  __device__ void Put(int inner, Operands<T>* to) const {
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
#pragma unroll
    for (int i = 0; i < kPieces; i++) {
      const int k = 4 * (i * kWarp + lane);
      if (k >= RoundUp(inner)) break;
#pragma unroll
      for (int r = 0; r < kEach; r++) {
        const float m = mean[r], s = k < inner ? scale[r] : 0.0f;
        const float4 v = x[r][i];
        PutFour(float4{(v.x - m) * s, (v.y - m) * s, (v.z - m) * s, (v.w - m) * s}, &to->input[warp + r * kWarps][k]);
      }
    }
  }
};

// Where a new key or value goes: to the caches of all parts of its head's program.
template <typename C>
__device__ inline void Keep(const Params& p, const Place& at, int batch, int head, int element, bool is_key, float x) {
  const int first = p.first_program[at.pattern], programs = p.first_program[at.pattern + 1] - first, program = first + head % programs;
  const int depth = is_key ? p.key_depth : p.value_depth;
  for (int t = p.first_part[program]; t < p.first_part[program + 1]; t++) {
    const Part& part = p.parts[t];
    const int slot = __ldg(p.writes + t);
    if (slot < 0) continue;
    const int64_t row = ((at.layer * part.slots + slot) * p.batch + batch) * part.heads + head / programs;
    reinterpret_cast<C*>(is_key ? part.keys : part.values)[row * depth + element] = static_cast<C>(x);
  }
}

// What becomes of an element of a product.
template <typename T, typename C>
__device__ inline void Store(const Params& p, const Place& at, int row, int column, float x) {
  if (at.phase == kProject) {
    const int keys = p.heads * p.key_depth;
    if (column < keys) {
      p.queries[static_cast<int64_t>(row) * keys + column] = x * p.scale * kLog2E;
    } else {
      const bool is_key = column < 2 * keys;
      const int depth = is_key ? p.key_depth : p.value_depth, unit = column - (is_key ? keys : 2 * keys), head = unit / depth;
      Keep<C>(p, at, row, head, unit - head * depth, is_key, x);
    }
  } else if (at.phase == kHidden) {
    p.hidden_layer[static_cast<int64_t>(row) * p.hidden + column] = x / (1 + exp2f(-1.702f * kLog2E * x));
  } else {
    const int64_t i = static_cast<int64_t>(row) * p.width + column;
    p.stream[i] = x;
    if (at.phase == kOutput && at.block + 1 == p.blocks) static_cast<T*>(p.output)[i] = static_cast<T>(x);
  }
}

// Runs a phase that is a product. Waits at the barrier before it reads what other phases write. A tile is of kRows rows and kColumns
// columns.
template <typename T, typename C>
__device__ inline void Run(const Product<T>& product, const Params& p, const Place& at, GridBarrier* barrier, Shared<T>* shared) {
  constexpr int kInner = Operands<T>::kInner;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, column_tiles = product.ColumnTiles();
  const int tiles = (p.batch + kRows - 1) / kRows * column_tiles, in = product.in;
  bool waited = false;
  for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    const int row_tile = tile / column_tiles, first_row = row_tile * kRows, first_column = (tile - row_tile * column_tiles) * kColumns;
    // The element of the tile that this thread ends.
    const int row = first_row + threadIdx.x / kColumns, column = first_column + threadIdx.x % kColumns;
    const bool ends = threadIdx.x < kRows * kColumns && row < p.batch && column < product.out;
    product.CopyKernel(0, min(kInner, in), first_column, shared->operands);
    float end = ends ? __ldg(product.bias + column) : 0.0f;
    if (!waited) barrier->Wait();
    waited = true;
    InputRows<T> input(product, first_row, p.batch);
    input.Load(0, min(kInner, in));
    if (ends && (at.phase == kCombine || at.phase == kOutput)) end += Get(p.stream + static_cast<int64_t>(row) * p.width + column);
    if (product.normalized) input.Normalize(in, p.epsilon);
    Sums sum = {};
    Operands<T>* operands = shared->operands;
    for (int first = 0, inner = min(kInner, in); inner > 0;) {
      input.Put(inner, operands);
      asm volatile("cp.async.wait_all;" ::: "memory");
      __syncthreads();
      const Operands<T>& ready = *operands;
      const int multiplied = inner;
      first += kInner;
      inner = min(kInner, in - first);
      if (inner > 0) {
        operands = operands == shared->operands ? operands + 1 : shared->operands;
        product.CopyKernel(first, inner, first_column, operands);
        input.Load(first, inner);
      }
      Multiply(ready, multiplied, sum);
    }
#pragma unroll
    for (int g = 0; g < kColumns / 8; g++) {
#pragma unroll
      for (int half = 0; half < 2; half++) {
        *reinterpret_cast<float2*>(&shared->sums[warp][lane / 4 + 8 * half][8 * g + lane % 4 * 2]) = {sum[g][2 * half],
                                                                                                      sum[g][2 * half + 1]};
      }
    }
    __syncthreads();
    if (ends) {
#pragma unroll
      for (int i = 0; i < kWarps; i++) end += shared->sums[i][0][threadIdx.x];
      Store<T, C>(p, at, row, column, end);
    }
  }
  if (!waited) barrier->Wait();
}

}  // namespace decode
}  // namespace cuda
}  // namespace stf

#endif  // STF_CUSTOM_OPS_RESIDUAL_STACK_CUDA_DECODE_PRODUCT_CUH_
