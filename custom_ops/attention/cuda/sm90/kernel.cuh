// The one body of Hopper's kernels, for halves whose rows may be read 16 bytes at a time: a producer warp loads tiles (pipeline.cuh), the
// other warpgroups consume them, 64 rows of the block's tile each. A pass, which passes.cuh has three of, says what is loaded and what is
// computed. Compiled for other chips the body is empty.
#ifndef STF_CUSTOM_OPS_ATTENTION_CUDA_SM90_KERNEL_CUH_
#define STF_CUSTOM_OPS_ATTENTION_CUDA_SM90_KERNEL_CUH_

#include "custom_ops/attention/cuda/sm90/mask.cuh"
#include "custom_ops/attention/cuda/sm90/pipeline.cuh"

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define STF_HAS_WGMMA 1
#else
#define STF_HAS_WGMMA 0
#endif

namespace stf {
namespace cuda {

// Rows that are not in use may hold anything, even what times zero is not zero.
template <typename Tile, int kKeyDepth, int kValueDepth>
__device__ inline void ClearUnused(const StageInfo& info, uint32_t tile) {
  if (!(info.flags & kClearUnused)) return;
  ClearRows<kKeyDepth, kStageRows>(tile, info.count, kStageRows);
  ClearRows<kValueDepth, kStageRows>(tile + Tile::kStageKeyBytes, info.count, kStageRows);
  SyncWarpgroup();
}

// The same of a warpgroup's own rows.
template <typename Tile, int kKeyDepth, int kValueDepth>
__device__ inline void ClearOwn(const Arguments& args, const WorkTile& work_tile, uint32_t tile, int warpgroup_row) {
  const int begin = max(warpgroup_row, work_tile.used - work_tile.first);
  if (!args.lengths || begin >= warpgroup_row + 64) return;
  ClearRows<kKeyDepth, Tile::kRows>(tile, begin, warpgroup_row + 64);
  if constexpr (kValueDepth > 0) ClearRows<kValueDepth, Tile::kRows>(tile + Tile::kOwnKeyBytes, begin, warpgroup_row + 64);
  SyncWarpgroup();
}

// A pass P has
//   Tile, kByKey (whether the block's rows are keys), kGeneral (whether masks may be more than intervals), kDocuments (whether there may be
//   documents),
//   kKeyDepth, kValueDepth and kOwnValueDepth (0 where the block has one tensor's rows alone), kStageArrivals,
//   Load(pipeline, args, launch, maps): the producer's work,
//   P(args, launch, work_tile, view, row): the prologue of a tile, whose rows `row` and row + 8 are the thread's,
//   Mainloop(context, mask, segment, begin, end, own_key, own_value, stage, statistics): one segment, for the warpgroup's rows [begin, end)
//   in use; addresses in shared memory of the warpgroup's own rows, and of the segment's,
//   Epilogue(args, launch, work_tile, view, row).
template <typename P>
__global__ __launch_bounds__((P::Tile::kThreads), (P::Tile::kBlocks)) void Sm90Kernel(const __grid_constant__ Arguments args,
                                                                                      const __grid_constant__ Launch launch,
                                                                                      const __grid_constant__ Maps maps) {
#if STF_HAS_WGMMA
  using Tile = typename P::Tile;
  constexpr int kKeyDepth = P::kKeyDepth, kValueDepth = P::kValueDepth;
  extern __shared__ __align__(kTileAlignment) char shared[];
  const Pipeline<Tile> pipeline(shared);
  pipeline.Start(P::kStageArrivals);
  if (threadIdx.x >= Tile::kConsumers) {
    DeallocateRegisters<Tile::kProducerRegisters>();
    if (threadIdx.x < Tile::kConsumers + 32) P::Load(pipeline, args, launch, maps);
    return;
  }
  AllocateRegisters<Tile::kConsumerRegisters>();
  const int warpgroup_row = Uniform(threadIdx.x / 128 * 64), lane_row = threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4;
  PipelineState<Tile::kOwnStages> own;
  PipelineState<Tile::kStages> state;
  while (true) {
    WaitBarrier(pipeline.OwnFull(own.stage), own.phase);
    const WorkTile work_tile = *pipeline.WorkTileOf(own.stage);
    if (work_tile.batch < 0) return;
    const View view = work_tile.template ViewOf<P::kDocuments>(args, launch);
    const Head head = work_tile.HeadOf(launch);
    const Context context = {args, head, view};
    const int warpgroup_begin = work_tile.first + warpgroup_row;
    P pass(args, launch, work_tile, view, work_tile.first + lane_row);
    ClearOwn<Tile, kKeyDepth, P::kOwnValueDepth>(args, work_tile, pipeline.Own(own.stage), warpgroup_row);
    const uint32_t own_key = Uniform(pipeline.Own(own.stage) + warpgroup_row * SharedTile<kKeyDepth, Tile::kRows>::kRowBytes);
    const uint32_t own_value =
        Uniform(pipeline.Own(own.stage) + Tile::kOwnKeyBytes + warpgroup_row * SharedTile<kValueDepth, Tile::kRows>::kRowBytes);
    WarpgroupMask<P::kByKey, P::kGeneral> mask;
    int component = -1;
    Consume(pipeline, &state, [&](const StageInfo& info, uint32_t stage) {
      if (info.component != component) {
        component = info.component;
        mask.Find(head.components + component, view, warpgroup_begin, work_tile.end);
      }
      const WarpgroupSegment segment = {mask.component, info.begin, info.count};
      const uint32_t rows = Uniform(pipeline.Stage(stage));
      ClearUnused<Tile, kKeyDepth, kValueDepth>(info, rows);
      if (!mask.Reaches(segment)) return;
      pass.Mainloop(context, mask, segment, warpgroup_begin, work_tile.end, own_key, own_value, rows, pipeline.Statistics(stage));
    });
    ArriveWarp(pipeline.OwnEmpty(own.stage));
    own.Next();
    pass.Epilogue(args, launch, work_tile, view, work_tile.first + lane_row);
  }
#endif
}

}  // namespace cuda
}  // namespace stf

#endif  // STF_CUSTOM_OPS_ATTENTION_CUDA_SM90_KERNEL_CUH_
