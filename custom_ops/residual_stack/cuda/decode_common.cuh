// What the phases of the decode kernel share: its parameters, its shared memory, where it is, the barrier between phases.
#ifndef STF_CUSTOM_OPS_RESIDUAL_STACK_CUDA_DECODE_COMMON_CUH_
#define STF_CUSTOM_OPS_RESIDUAL_STACK_CUDA_DECODE_COMMON_CUH_

#include <cstdint>

#include "custom_ops/residual_stack/cuda/decode.h"

namespace stf {
namespace cuda {
namespace decode {

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

}  // namespace decode
}  // namespace cuda
}  // namespace stf

#endif  // STF_CUSTOM_OPS_RESIDUAL_STACK_CUDA_DECODE_COMMON_CUH_
