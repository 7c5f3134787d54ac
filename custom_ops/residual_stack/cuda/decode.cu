#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <cstdint>

#include "custom_ops/residual_stack/cuda/activations.h"
#include "custom_ops/residual_stack/cuda/decode.h"
#include "custom_ops/residual_stack/cuda/decode_attention.cuh"
#include "custom_ops/residual_stack/cuda/decode_product.cuh"

namespace stf {
namespace cuda {
namespace decode {
namespace {

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
}  // namespace decode
}  // namespace cuda
}  // namespace stf

extern "C" size_t stf_stack_cuda_decode_workspace(const stf_decode* decode) {
  stf::cuda::decode::Params p;
  return stf::cuda::decode::Divide(*decode, stf::cuda::decode::Splits(*decode, stf::cuda::decode::kMostMultiprocessors), nullptr, &p);
}

extern "C" const char* stf_stack_cuda_decode(const stf_decode* decode, const stf_stack_weights* weights, const void* input, void* output,
                                             void* workspace, void* stream) {
  using namespace stf::cuda::decode;
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
