// From a block's index to its piece of work.
#ifndef STF_CUSTOM_OPS_ATTENTION_CUDA_COMMON_SCHEDULER_CUH_
#define STF_CUSTOM_OPS_ATTENTION_CUDA_COMMON_SCHEDULER_CUH_

#include "custom_ops/attention/cuda/common/sets.cuh"

namespace stf {
namespace cuda {

struct TileIndex {
  int batch, head, key_head, program, sequence, tile;  // key_head: of keys and values
  Head components;
};

// Heads are innermost, then sequences, so that blocks that run together read neighbouring memory; the last tiles, which are the longest
// ones where the pattern is causal, come first. Where there are many sequences the tiles of each follow one another instead: what they all
// read is still in the L2. False where the head does not exist.
__device__ inline bool FindTile(const Arguments& args, const Launch& launch, int index, int sequences, bool last_first, TileIndex* work) {
  const int slot = index % launch.head_slots, program = slot % launch.programs;
  index /= launch.head_slots;
  if (launch.together) {
    work->tile = index % launch.tiles;
    index /= launch.tiles;
  }
  work->sequence = index % sequences;
  index /= sequences;
  if (launch.together) {
    work->batch = index;
  } else {
    work->batch = index % args.batch;
    work->tile = index / args.batch;
  }
  if (last_first) work->tile = launch.tiles - 1 - work->tile;
  work->program = program;
  work->head = launch.number[program] + slot / launch.programs * launch.period;
  work->key_head = args.group == 1 ? work->head : work->head / args.group;
  work->components = {launch.components + launch.begin[program], launch.members[program]};
  return work->head < args.heads;
}

__device__ inline int Length(const Arguments& args, int batch) {
  return args.lengths ? min(max(args.lengths[batch], 0), args.positions) : args.positions;
}

// How many of a sequence's positions are less than `end`.
__device__ inline int CountBelow(const Launch& launch, int sequence, int end) {
  const int start = sequence * launch.sequence_stride;
  return end <= start ? 0 : min(launch.longest, (end - start - 1) / launch.stride + 1);
}

// How many keys a sequence has at positions less than `end`, numbered as component c numbers them.
__device__ inline int CountKeys(const Launch& launch, const Component& c, int sequence, int end) {
  if (c.kind != STF_SUMMARY) return CountBelow(launch, sequence, end);
  const int width = c.c - c.b, blocks = end / c.a;
  return blocks * width + min(width, max(0, end - blocks * c.a - c.b));
}

// A batch row's documents, or null. Kernels without kDocuments have none.
template <bool kDocuments = true>
__device__ inline const int32_t* DocumentsOf(const Arguments& args, int batch) {
  return kDocuments && args.documents ? args.documents + int64_t{2} * batch * args.positions : nullptr;
}

__device__ inline View FindView(const Arguments& args, const Launch& launch, int sequence, int batch) {
  return {sequence * launch.sequence_stride, launch.stride, CountBelow(launch, sequence, Length(args, batch)), DocumentsOf(args, batch)};
}

__device__ inline int64_t StatisticsBase(const Arguments& args, int batch, int head) {
  return (static_cast<int64_t>(batch) * args.heads + head) * args.positions;
}

}  // namespace cuda
}  // namespace stf

#endif  // STF_CUSTOM_OPS_ATTENTION_CUDA_COMMON_SCHEDULER_CUH_
