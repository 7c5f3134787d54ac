#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "custom_ops/residual_stack/cuda/activations.h"
#include "custom_ops/residual_stack/cuda/decode.h"

namespace stf {
namespace cuda {
namespace {

constexpr int kWarp = 32, kThreads = 512, kWarps = kThreads / kWarp;
constexpr int kRows = 16, kColumns = 16;  // of a tile of a product
constexpr int kLine = 1024;               // bytes of a row of the input that are worked on at a time
constexpr int kVector = 8;                // elements of a key or value that a lane loads
constexpr int kMostDepth = kWarp * kVector;
constexpr int kReads = 16;  // keys and values that a warp takes at a time
constexpr int kLoads = 4;   // of these, that a lane has under way
constexpr float kLog2E = 1.44269504f;

struct Part {
  char *keys, *values;
  int64_t slots;
  int32_t first_read, reads, heads;
};

struct Params {
  int32_t blocks, batch, width, hidden, heads, key_depth, value_depth;
  float epsilon, scale;
  int32_t period, splits;  // of a head's keys, each by another thread block
  const int32_t *reads, *writes;
  stf_stack_weights weights;
  const void* input;
  void* output;
  // The workspace.
  float *stream, *queries, *hidden_layer;  // [batch, width], [batch, heads key_depth], [batch, hidden]
  float *attended, *partial, *softmax;     // [batch, heads value_depth]; of splits; [split, batch, head, 2] maximum and sum
  uint32_t* arrived;                       // thread blocks, at all barriers so far, and [batch, head] splits; 0 before the launch
  int32_t first_program[STF_DECODE_PATTERNS + 1], first_part[STF_DECODE_PROGRAMS + 1];
  Part parts[STF_DECODE_PARTS];
};

// What other thread blocks write during the launch is read from the L2 cache: the L1 caches do not see it.
__device__ inline float Get(const float* from) { return __ldcg(from); }
__device__ inline float4 GetFour(const float* from) { return __ldcg(reinterpret_cast<const float4*>(from)); }

// Asks for a line of memory that a later part of the kernel loads.
__device__ inline void Prefetch(const void* from) { asm volatile("prefetch.global.L2 [%0];" ::"l"(from)); }

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

// Eight elements of a key or value.
template <typename C>
struct Vector {
  static constexpr int kWords = kVector * sizeof(C) / sizeof(uint4);
  union {
    uint4 bits[kWords];
    C elements[kVector];
  };

  __device__ Vector() {}
  __device__ void Load(const C* from) {
#pragma unroll
    for (int i = 0; i < kWords; i++) bits[i] = __ldcg(reinterpret_cast<const uint4*>(from) + i);
  }
  __device__ void Clear() {
#pragma unroll
    for (int i = 0; i < kWords; i++) bits[i] = uint4{};
  }
  __device__ float operator[](int i) const { return static_cast<float>(elements[i]); }
};

// All thread blocks have come here, and what each has written is seen by all.
struct GridBarrier {
  uint32_t* arrived;
  uint32_t expected = 0;

  __device__ void Wait() {
    __syncthreads();
    expected += gridDim.x;
    if (threadIdx.x == 0) {
      __threadfence();
      atomicAdd(arrived, 1);
      uint32_t seen;
      do {
        asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(seen) : "l"(arrived) : "memory");
      } while (seen < expected);
    }
    __syncthreads();
  }
};

__device__ inline float SumOverLanes(float x) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(~0u, x, offset);
  return x;
}

// The phases of a block; between two of them is a barrier.
enum Phase { kProject, kAttend, kCombine, kHidden, kOutput, kPhases };

// Where a step of the kernel is.
struct Place {
  int block, pattern, layer, phase;
};

// A part of an inner axis is filled up with zeros to what the tensor cores take at a time.
__device__ inline int RoundUp(int inner) { return (inner + 15) / 16 * 16; }

// A product of the inner axis' part that is in shared memory, by tensor cores for halves. The input's rows lie 16 bytes further apart than
// they are long, so that eight of them are in different banks.
template <typename T>
struct Operands {
  static constexpr int kInner = kLine / sizeof(T), kStride = kInner + 16 / sizeof(T);
  T input[kRows][kStride];
  T kernel[kInner][kColumns];
};

template <typename T>
struct Shared {
  union {
    Operands<T> operands[2];             // one is filled while the other is used
    float attended[kWarps][kMostDepth];  // of a head's softmax, by each warp's keys
  };
  float sums[kWarps][kRows][kColumns];  // of a tile, by each warp's part of the inner axis
  float maximum[kWarps], total[kWarps];
  bool last;
};

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
    for (int k = threadIdx.x; k < in; k += kThreads) stf::cuda::Prefetch(kernel + static_cast<int64_t>(k) * out + column);
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

// The smallest power of two of lanes, 4 or more, that have a row of so many elements.
__device__ inline int LanesOf(int depth) {
  int lanes = 4;
  while (lanes * kVector < depth) lanes *= 2;
  return lanes;
}

// One query's softmax over the keys that a warp has seen so far: scores are in powers of two.
struct Softmax {
  float maximum = -INFINITY, sum = 0;  // the sum is this lane's part
  float output[kVector] = {};          // of this lane's rows and elements
};

// What is read of keys or values for a head: rows of a part's slots.
template <typename C>
struct Rows {
  const C* begin;  // the head's of slot 0
  int64_t stride;  // from slot to slot
  int depth, lanes, element;

  __device__ Rows(const char* data, const Params& p, const Part& part, int64_t layer, int batch, int head, int depth)
      : stride(static_cast<int64_t>(p.batch) * part.heads * depth), depth(depth), lanes(LanesOf(depth)) {
    begin = reinterpret_cast<const C*>(data) + layer * part.slots * stride + (static_cast<int64_t>(batch) * part.heads + head) * depth;
    element = threadIdx.x % kWarp % lanes * kVector;
  }

  // Parts of the rows from `first` on of the kReads whose slots the lanes have: of as many as there are lanes for at each load.
  template <int n>
  __device__ void Load(int slot, int first, Vector<C> (&part)[n]) const {
#pragma unroll
    for (int i = 0; i < n; i++) {
      const int row = first + (i * kWarp + static_cast<int>(threadIdx.x) % kWarp) / lanes;
      const int from = __shfl_sync(~0u, slot, row & (kWarp - 1));
      if (row < kReads && from >= 0 && element < depth) {
        part[i].Load(begin + from * stride + element);
      } else {
        part[i].Clear();
      }
    }
  }
};

// Takes kReads slots, a lane's in `slot`, into the softmax.
template <typename C>
__device__ inline void Attend(const Rows<C>& keys, const Rows<C>& values, int slot, const float (&query)[kVector], Softmax* softmax) {
  const int lane = threadIdx.x % kWarp;
  Vector<C> key[kLoads], value[kLoads];
  keys.Load(slot, 0, key);
  values.Load(slot, 0, value);
  float score = -INFINITY;
  for (int first = 0; first < kReads;) {
    const int rows = kWarp / keys.lanes;
#pragma unroll
    for (int i = 0; i < kLoads; i++) {
      float dot = 0;
#pragma unroll
      for (int e = 0; e < kVector; e++) dot += query[e] * key[i][e];
      for (int offset = keys.lanes / 2; offset > 0; offset /= 2) dot += __shfl_xor_sync(~0u, dot, offset);
      const int mine = lane - first - i * rows;
      const float given = __shfl_sync(~0u, dot, mine * keys.lanes & (kWarp - 1));
      if (mine >= 0 && mine < rows && slot >= 0) score = given;
    }
    first += kLoads * rows;
    if (first < kReads) keys.Load(slot, first, key);
  }
  float maximum = score;
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) maximum = fmaxf(maximum, __shfl_xor_sync(~0u, maximum, offset));
  maximum = fmaxf(maximum, softmax->maximum);
  const float weight = slot >= 0 ? exp2f(score - maximum) : 0.0f;
  const float correction = softmax->maximum == -INFINITY ? 0.0f : exp2f(softmax->maximum - maximum);
  softmax->maximum = maximum;
  softmax->sum = softmax->sum * correction + weight;
#pragma unroll
  for (int e = 0; e < kVector; e++) softmax->output[e] *= correction;
  for (int first = 0; first < kReads;) {
    const int rows = kWarp / values.lanes;
#pragma unroll
    for (int i = 0; i < kLoads; i++) {
      const float w = __shfl_sync(~0u, weight, first + i * rows + lane / values.lanes & (kWarp - 1));
#pragma unroll
      for (int e = 0; e < kVector; e++) softmax->output[e] += w * value[i][e];
    }
    first += kLoads * rows;
    if (first < kReads) values.Load(slot, first, value);
  }
}

// One head of one sequence, or a split of its keys. Tasks are the thread blocks' from the last one on, as tiles are from the first one on.
struct Task {
  int split, head, batch;

  __device__ Task(const Params& p, int task) {
    const int row = task / p.splits;
    split = task - row * p.splits;
    batch = row / p.heads;
    head = row - batch * p.heads;
  }
};

// What a warp reads of a head's caches: kReads at a time, in turn with the other warps of all splits. `apply` is called with keys, values
// and the lane's slot, -1 where it has none.
template <typename C, typename Apply>
__device__ inline void EachReads(const Params& p, const Place& at, const Task& task, Apply apply) {
  const int lane = threadIdx.x % kWarp, first = p.first_program[at.pattern], programs = p.first_program[at.pattern + 1] - first;
  const int number = task.head / programs, program = first + task.head - number * programs;
  const int workers = p.splits * kWarps;
  int group = task.split * kWarps + threadIdx.x / kWarp;  // of the next reads that are this warp's, in the part at hand
  for (int t = p.first_part[program]; t < p.first_part[program + 1]; t++) {
    const Part& part = p.parts[t];
    const int groups = (part.reads + kReads - 1) / kReads;
    if (group < groups) {
      const Rows<C> keys(part.keys, p, part, at.layer, task.batch, number, p.key_depth);
      const Rows<C> values(part.values, p, part, at.layer, task.batch, number, p.value_depth);
      for (; group < groups; group += workers) {
        const int read = group * kReads + lane;
        const int slot = lane < kReads && read < part.reads ? __ldg(p.reads + part.first_read + read) : -1;
        if (__any_sync(~0u, slot >= 0)) apply(keys, values, slot);
      }
    }
    group -= groups;
  }
}

// Whether this thread block is the last of so many that come here; then it sees what all have written, and the count begins again.
__device__ inline bool LastOf(int thread_blocks, uint32_t* count, bool* last) {
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    *last = atomicAdd(count, 1) + 1 == thread_blocks;
    if (*last) *count = 0;
    __threadfence();
  }
  __syncthreads();
  return *last;
}

// A thread's element of a head's attention, from those of all splits.
__device__ inline void MergeSplits(const Params& p, int64_t row, int64_t value, bool exists) {
  const int64_t rows = static_cast<int64_t>(p.batch) * p.heads;
  float maximum = -INFINITY, total = 0, output = 0;
  for (int s = 0; s < p.splits; s++) maximum = fmaxf(maximum, Get(p.softmax + 2 * (s * rows + row)));
  for (int s = 0; s < p.splits; s++) {
    const float of_split = Get(p.softmax + 2 * (s * rows + row));
    if (of_split == -INFINITY) continue;
    const float weight = exp2f(of_split - maximum);
    total += weight * Get(p.softmax + 2 * (s * rows + row) + 1);
    if (exists) output += weight * Get(p.partial + s * rows * p.value_depth + value);
  }
  if (exists) p.attended[value] = total == 0 ? 0.0f : output / total;
}

// Runs the phase that is attention, a task of it.
template <typename T, typename C>
__device__ inline void Attention(const Params& p, const Place& at, const Task& task, Shared<T>* shared) {
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int64_t row = static_cast<int64_t>(task.batch) * p.heads + task.head;
  const int element = lane % LanesOf(p.key_depth) * kVector;
  float query[kVector] = {};
  if (element < p.key_depth) {
    const float* const from = p.queries + row * p.key_depth + element;
    *reinterpret_cast<float4*>(query) = GetFour(from), *reinterpret_cast<float4*>(query + 4) = GetFour(from + 4);
  }
  Softmax softmax;
  EachReads<C>(p, at, task, [&](const Rows<C>& keys, const Rows<C>& values, int slot) { Attend(keys, values, slot, query, &softmax); });
  // All of the warp's, then all warps'.
  softmax.sum = SumOverLanes(softmax.sum);
  const int lanes = LanesOf(p.value_depth);
  for (int offset = kWarp / 2; offset >= lanes; offset /= 2) {
#pragma unroll
    for (int e = 0; e < kVector; e++) softmax.output[e] += __shfl_xor_sync(~0u, softmax.output[e], offset);
  }
  if (lane < lanes) {
#pragma unroll
    for (int e = 0; e < kVector; e++) shared->attended[warp][lane * kVector + e] = softmax.output[e];
  }
  if (lane == 0) shared->maximum[warp] = softmax.maximum, shared->total[warp] = softmax.sum;
  __syncthreads();
  const bool exists = threadIdx.x < p.value_depth;
  float maximum = -INFINITY, total = 0, output = 0;
#pragma unroll
  for (int i = 0; i < kWarps; i++) maximum = fmaxf(maximum, shared->maximum[i]);
#pragma unroll
  for (int i = 0; i < kWarps; i++) {
    const float weight = shared->maximum[i] == -INFINITY ? 0.0f : exp2f(shared->maximum[i] - maximum);
    total += weight * shared->total[i];
    if (exists && weight > 0) output += weight * shared->attended[i][threadIdx.x];
  }
  const int64_t value = row * p.value_depth + threadIdx.x;
  if (p.splits == 1) {
    if (exists) p.attended[value] = total == 0 ? 0.0f : output / total;
  } else {
    const int64_t of_split = static_cast<int64_t>(task.split) * p.batch * p.heads;
    if (exists) p.partial[of_split * p.value_depth + value] = output;
    if (threadIdx.x == 0) p.softmax[2 * (of_split + row)] = maximum, p.softmax[2 * (of_split + row) + 1] = total;
    if (LastOf(p.splits, p.arrived + 1 + row, &shared->last)) MergeSplits(p, row, value, exists);
  }
  __syncthreads();
}

// T of the kernels, C of the caches.
template <typename T, typename C>
__global__ void __launch_bounds__(kThreads, 1) Decode(const __grid_constant__ Params p) {
  extern __shared__ __align__(16) char memory[];
  Shared<T>& shared = *reinterpret_cast<Shared<T>*>(memory);
  GridBarrier barrier = {p.arrived};
  const int64_t elements = static_cast<int64_t>(p.batch) * p.width;
  for (int64_t i = blockIdx.x * kThreads + threadIdx.x; i < elements; i += gridDim.x * kThreads) {
    p.stream[i] = static_cast<float>(static_cast<const T*>(p.input)[i]);
  }
  const int first_task = gridDim.x - 1 - blockIdx.x, tasks = p.batch * p.heads * p.splits;
  Place at = {};
  // One copy of the code of all products: instructions that are run once a block come from far.
#pragma unroll 1
  while (at.block < p.blocks) {
    if (at.phase == kAttend) {
      Product<T>(p, at.block, kCombine).Prefetch();
      barrier.Wait();
      for (int task = first_task; task < tasks; task += gridDim.x) Attention<T, C>(p, at, Task(p, task), &shared);
    } else {
      if (at.phase == kCombine) Product<T>(p, at.block, kHidden).Prefetch();
      if (at.phase == kHidden) Product<T>(p, at.block, kOutput).Prefetch();
      if (at.phase == kOutput && at.block + 1 < p.blocks) Product<T>(p, at.block + 1, kProject).Prefetch();
      Run<T, C>(Product<T>(p, at.block, at.phase), p, at, &barrier, &shared);
    }
    if (++at.phase < kPhases) continue;
    at.phase = 0, at.block++, at.pattern++;
    if (at.pattern == p.period) at.pattern = 0, at.layer++;
  }
}

// Thread blocks: one a multiprocessor. The workspace has room for as many as may be, whichever GPU is at hand where it is asked for.
constexpr int kMostMultiprocessors = 256;

int Multiprocessors() {
  int device, count;
  if (cudaGetDevice(&device) || cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device)) return 1;
  return std::min(count, kMostMultiprocessors);
}

// How many thread blocks share a head's keys, so that all have some.
int64_t Splits(const stf_decode& d, int multiprocessors) {
  int64_t most = 1;  // reads of a head
  for (int m = 0; m < d.period; m++) {
    for (int program = d.first_program[m]; program < d.first_program[m + 1]; program++) {
      int64_t reads = 0;
      for (int t = d.first_part[program]; t < d.first_part[program + 1]; t++) reads += d.parts[t].reads;
      most = std::max(most, reads);
    }
  }
  const int64_t tasks = std::max<int64_t>(d.batch * d.heads, 1);
  return std::max<int64_t>(1, std::min(multiprocessors / tasks, (most + kWarps * kReads - 1) / (kWarps * kReads)));
}

// Bytes of what is 0 before the launch.
size_t Counters(const stf_decode& d) { return (1 + d.batch * d.heads) * sizeof(uint32_t); }

// Divides the workspace; `begin` may be null, to count.
size_t Divide(const stf_decode& d, int64_t splits, void* begin, Params* p) {
  Arena arena(begin);
  p->arrived = reinterpret_cast<uint32_t*>(arena.Take(Counters(d)));
  p->stream = arena.TakeFloats(d.batch * d.width);
  p->queries = arena.TakeFloats(d.batch * d.heads * d.key_depth);
  p->hidden_layer = arena.TakeFloats(d.batch * d.hidden_width);
  p->attended = arena.TakeFloats(d.batch * d.heads * d.value_depth);
  p->partial = arena.TakeFloats(splits * d.batch * d.heads * d.value_depth);
  p->softmax = arena.TakeFloats(2 * splits * d.batch * d.heads);
  return arena.used();
}

struct Kernel {
  const void* function;
  size_t shared;  // bytes of shared memory
};

template <typename T, typename C>
Kernel KernelOf() {
  static_assert(sizeof(Shared<T>) <= 99 << 10, "as much as every card from compute capability 8.0 on has");
  return {reinterpret_cast<const void*>(Decode<T, C>), sizeof(Shared<T>)};
}

Kernel KernelOf(const stf_decode& d) {
  if (d.cache_dtype == STF_FLOAT32) {
    if (d.dtype == STF_FLOAT32) return KernelOf<float, float>();
    return d.dtype == STF_BFLOAT16 ? KernelOf<__nv_bfloat16, float>() : KernelOf<__half, float>();
  }
  if (d.dtype != d.cache_dtype) return {};
  return d.dtype == STF_BFLOAT16 ? KernelOf<__nv_bfloat16, __nv_bfloat16>() : KernelOf<__half, __half>();
}

const char* Wrong(const stf_decode& d) {
  if (d.blocks < 1) return "there must be a block";
  if (!KernelOf(d).function) return "the caches' dtype must be the stack's or float32";
  if (d.width % kVector || d.hidden_width % kVector || d.key_depth % kVector || d.value_depth % kVector)
    return "widths and depths must be multiples of 8";
  if (d.key_depth > kMostDepth || d.value_depth > kMostDepth) return "depths must be 256 or less";
  if (d.period > STF_DECODE_PATTERNS) return "there may be 16 patterns at most";
  const int programs = d.first_program[d.period];
  if (programs > STF_DECODE_PROGRAMS || d.first_part[programs] > STF_DECODE_PARTS)
    return "there may be 48 programs and parts of caches at most";
  return nullptr;
}

}  // namespace
}  // namespace cuda
}  // namespace stf

extern "C" size_t stf_stack_cuda_decode_workspace(const stf_decode* decode) {
  stf::cuda::Params p;
  return stf::cuda::Divide(*decode, stf::cuda::Splits(*decode, stf::cuda::kMostMultiprocessors), nullptr, &p);
}

extern "C" const char* stf_stack_cuda_decode(const stf_decode* decode, const stf_stack_weights* weights, const void* input, void* output,
                                             void* workspace, void* stream) {
  using namespace stf::cuda;
  const stf_decode& d = *decode;
  if (const char* wrong = Wrong(d)) return wrong;
  if (d.batch == 0) return nullptr;
  Params p = {};
  p.blocks = d.blocks;
  p.batch = d.batch;
  p.width = d.width;
  p.hidden = d.hidden_width;
  p.heads = d.heads;
  p.key_depth = d.key_depth;
  p.value_depth = d.value_depth;
  p.epsilon = d.epsilon;
  p.scale = d.scale;
  p.period = d.period;
  p.splits = Splits(d, Multiprocessors());
  p.reads = d.reads;
  p.writes = d.writes;
  p.weights = *weights;
  p.input = input;
  p.output = output;
  Divide(d, p.splits, workspace, &p);
  std::copy_n(d.first_program, d.period + 1, p.first_program);
  const int programs = d.first_program[d.period];
  std::copy_n(d.first_part, programs + 1, p.first_part);
  int32_t first_read = 0;
  for (int m = 0; m < d.period; m++) {
    const int of_pattern = d.first_program[m + 1] - d.first_program[m];
    for (int program = d.first_program[m]; program < d.first_program[m + 1]; program++) {
      const int number = program - d.first_program[m], heads = (static_cast<int>(d.heads) - number + of_pattern - 1) / of_pattern;
      for (int t = d.first_part[program]; t < d.first_part[program + 1]; t++) {
        const stf_cache_part& part = d.parts[t];
        p.parts[t] = {static_cast<char*>(part.keys),
                      static_cast<char*>(part.values),
                      part.slots,
                      first_read,
                      static_cast<int32_t>(part.reads),
                      heads};
        first_read += part.reads;
      }
    }
  }
  const cudaStream_t on = static_cast<cudaStream_t>(stream);
  cudaError_t error = cudaMemsetAsync(p.arrived, 0, Counters(d), on);
  void* arguments[] = {&p};
  const Kernel kernel = KernelOf(d);
  if (!error) error = cudaFuncSetAttribute(kernel.function, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(kernel.shared));
  if (!error) error = cudaLaunchCooperativeKernel(kernel.function, dim3(Multiprocessors()), dim3(kThreads), arguments, kernel.shared, on);
  return error ? cudaGetErrorString(error) : nullptr;
}
