// The phase of the decode kernel that is attention: one query a head and sequence, over the slots of its caches.
#ifndef STF_CUSTOM_OPS_RESIDUAL_STACK_CUDA_DECODE_ATTENTION_CUH_
#define STF_CUSTOM_OPS_RESIDUAL_STACK_CUDA_DECODE_ATTENTION_CUH_

#include "custom_ops/residual_stack/cuda/decode_common.cuh"

namespace stf {
namespace cuda {
namespace decode {

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

}  // namespace decode
}  // namespace cuda
}  // namespace stf

#endif  // STF_CUSTOM_OPS_RESIDUAL_STACK_CUDA_DECODE_ATTENTION_CUH_
