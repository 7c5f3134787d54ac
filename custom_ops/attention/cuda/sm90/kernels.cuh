// The kernels of forward.cuh and backward.cuh for warpgroups: the same walk over segments, copied by the copy engine, products by wgmma.
// For halves whose rows may be read 16 bytes at a time, on Hopper. Elsewhere their bodies are empty.
#ifndef STF_CUSTOM_OPS_ATTENTION_CUDA_SM90_KERNELS_CUH_
#define STF_CUSTOM_OPS_ATTENTION_CUDA_SM90_KERNELS_CUH_

#include "custom_ops/attention/cuda/common/epilogue.cuh"
#include "custom_ops/attention/cuda/kernels.h"
#include "custom_ops/attention/cuda/sm90/mainloop.cuh"
#include "custom_ops/attention/cuda/sm90/pipeline.cuh"

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define STF_HAS_WGMMA 1
#else
#define STF_HAS_WGMMA 0
#endif

namespace stf {
namespace cuda {

// Which of a map's two variants has a sequence of this launch.
__device__ inline int Variant(const Maps& maps, int sequence) { return sequence < maps.longer ? 1 : 0; }

// The producer warp of a launch by queries: own rows are the queries' (kGrads: and the output gradients'); keys and
// values stream.
template <typename Tile, int kKeyDepth, int kValueDepth, bool kGrads, bool kGeneral>
__device__ inline void ProduceByQuery(const Pipeline<Tile>& pipeline, const Arguments& args, const Launch& launch, const Maps& maps) {
  auto copy_own = [&](const WorkTile& work_tile, uint32_t tile, uint32_t full) {
    const int sequence = work_tile.sequence, variant = Variant(maps, sequence);
    auto index = [&](int row) { return work_tile.first + row; };
    CopyRows<kKeyDepth, Tile::kRows>(tile, maps.own[0][variant], 64, full, work_tile.batch, work_tile.head, sequence, index);
    if constexpr (kGrads) {
      CopyRows<kValueDepth, Tile::kRows>(tile + Tile::kOwnKeyBytes, maps.own[1][variant], 64, full, work_tile.batch, work_tile.head,
                                         sequence, index);
    }
  };
  auto copy = [&](const WorkTile& work_tile, const WarpgroupSegment& segment, uint32_t tile, uint32_t full) {
    if (segment.component->kind == STF_SUMMARY) {
      auto index = [&](int row) { return KeyPosition(*segment.component, work_tile.ViewOf(launch), segment.begin + row); };
      CopyRows<kKeyDepth, kStageRows>(tile, maps.summary[0], maps.summary_rows, full, work_tile.batch, work_tile.head, 0, index);
      CopyRows<kValueDepth, kStageRows>(tile + Tile::kStageKeyBytes, maps.summary[1], maps.summary_rows, full, work_tile.batch,
                                        work_tile.head, 0, index);
      return;
    }
    const int sequence = work_tile.sequence, variant = Variant(maps, sequence);
    auto index = [&](int row) { return segment.begin + row; };
    CopyRows<kKeyDepth, kStageRows>(tile, maps.streamed[0][variant], 64, full, work_tile.batch, work_tile.head, sequence, index);
    CopyRows<kValueDepth, kStageRows>(tile + Tile::kStageKeyBytes, maps.streamed[1][variant], 64, full, work_tile.batch, work_tile.head,
                                      sequence, index);
  };
  Produce<Tile, false, kGeneral>(pipeline, args, launch, copy_own, copy,
                                 [](const WorkTile&, const WarpgroupSegment&, uint32_t, uint32_t) {});
}

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

template <typename T, int kKeyDepth, int kValueDepth, bool kGeneral, bool kPartial>
__global__ __launch_bounds__(
    (KernelTile<kForward, kKeyDepth, kValueDepth>::kThreads),
    (KernelTile<kForward, kKeyDepth, kValueDepth>::kBlocks)) void Sm90ForwardKernel(const __grid_constant__ Arguments args,
                                                                                    const __grid_constant__ Launch launch,
                                                                                    const __grid_constant__ Maps maps) {
#if STF_HAS_WGMMA
  using Tile = KernelTile<kForward, kKeyDepth, kValueDepth>;
  extern __shared__ __align__(kTileAlignment) char shared[];
  const Pipeline<Tile> pipeline(shared);
  pipeline.Start(1);
  if (threadIdx.x >= Tile::kConsumers) {
    DeallocateRegisters<Tile::kProducerRegisters>();
    if (threadIdx.x >= Tile::kConsumers + 32) return;
    ProduceByQuery<Tile, kKeyDepth, kValueDepth, false, kGeneral>(pipeline, args, launch, maps);
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
    const View view = work_tile.ViewOf(launch);
    const Head head = work_tile.HeadOf(launch);
    const Context context = {args, head, view};
    const int warpgroup_begin = work_tile.first + warpgroup_row;
    auto position = [&](int row) { return row < work_tile.existing ? view.Position(row) : -1; };
    auto find_rows = [&]() {  // anew where they are needed: registers are few between
      const int row = work_tile.first + lane_row;
      return OutputRows<T, kValueDepth, kPartial>(args, work_tile.batch, work_tile.head, {position(row), position(row + 8)});
    };
    Softmax<T, kKeyDepth, kValueDepth> softmax;
    bool settled = false;
    find_rows().Begin(&softmax, args, launch, true);
    ClearOwn<Tile, kKeyDepth, 0>(args, work_tile, pipeline.Own(own.stage), warpgroup_row);
    const uint32_t queries = Uniform(pipeline.Own(own.stage) + warpgroup_row * SharedTile<kKeyDepth, Tile::kRows>::kRowBytes);
    WarpgroupMask<false, kGeneral> mask;
    int component = -1;
    Consume(pipeline, &state, [&](const StageInfo& info, uint32_t stage) {
      if (info.component != component) {
        component = info.component;
        mask.Find(head.components + component, view, warpgroup_begin, work_tile.end);
      }
      const WarpgroupSegment segment = {mask.component, info.begin, info.count};
      const uint32_t keys = Uniform(pipeline.Stage(stage));
      ClearUnused<Tile, kKeyDepth, kValueDepth>(info, keys);
      if (!mask.Reaches(segment)) return;
      WarpgroupAttend<T, kKeyDepth, kValueDepth, Tile::kRows, kStageRows>(softmax, &settled, context, mask, segment, warpgroup_begin,
                                                                          work_tile.end, queries, keys, keys + Tile::kStageKeyBytes);
    });
    if (threadIdx.x % 32 == 0) Arrive(pipeline.OwnEmpty(own.stage));
    own.Next();
    softmax.Finish();
    find_rows().Store(&softmax, args, launch, true);
  }
#endif
}

template <typename T, int kKeyDepth, int kValueDepth, bool kGeneral>
__global__ __launch_bounds__(
    (KernelTile<kQueryGrad, kKeyDepth, kValueDepth>::kThreads),
    (KernelTile<kQueryGrad, kKeyDepth, kValueDepth>::kBlocks)) void Sm90QueryGradKernel(const __grid_constant__ Arguments args,
                                                                                        const __grid_constant__ Launch launch,
                                                                                        const __grid_constant__ Maps maps) {
#if STF_HAS_WGMMA
  using Tile = KernelTile<kQueryGrad, kKeyDepth, kValueDepth>;
  extern __shared__ __align__(kTileAlignment) char shared[];
  const Pipeline<Tile> pipeline(shared);
  pipeline.Start(1);
  if (threadIdx.x >= Tile::kConsumers) {
    DeallocateRegisters<Tile::kProducerRegisters>();
    if (threadIdx.x >= Tile::kConsumers + 32) return;
    ProduceByQuery<Tile, kKeyDepth, kValueDepth, true, kGeneral>(pipeline, args, launch, maps);
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
    const View view = work_tile.ViewOf(launch);
    const Head head = work_tile.HeadOf(launch);
    const Context context = {args, head, view};
    const int warpgroup_begin = work_tile.first + warpgroup_row;
    const int64_t statistics = StatisticsBase(args, work_tile.batch, work_tile.head);
    float log_sum_exp[2], delta[2];
    if (launch.first) {
      const T* const output = Base<const T>(args.output, work_tile.batch, work_tile.head);
      const T* const grad = Base<const T>(args.output_grad, work_tile.batch, work_tile.head);
      GroupSumProducts<T, kValueDepth>(delta, output, args.output.position_stride, grad, args.output_grad.position_stride, args.value_depth,
                                       [&](int r) {
                                         const int row = work_tile.first + lane_row + 8 * r;
                                         return row < work_tile.end ? view.Position(row) : -1;
                                       });
    }
#pragma unroll
    for (int r = 0; r < 2; r++) {
      const int row = work_tile.first + lane_row + 8 * r, position = view.Position(row);
      log_sum_exp[r] = row < work_tile.end ? args.log_sum_exp[statistics + position] : 0;
      if (launch.first) {
        if (row < work_tile.end && args.log_sum_exp_grad) delta[r] -= args.log_sum_exp_grad[statistics + position];
        if (row < work_tile.existing && threadIdx.x % 4 == 0) args.delta[statistics + position] = delta[r];
      } else {
        delta[r] = row < work_tile.end ? args.delta[statistics + position] : 0;
      }
    }
    float sum[kKeyDepth / 8][4];
    Clear(sum);
    ClearOwn<Tile, kKeyDepth, kValueDepth>(args, work_tile, pipeline.Own(own.stage), warpgroup_row);
    const uint32_t queries = Uniform(pipeline.Own(own.stage) + warpgroup_row * SharedTile<kKeyDepth, Tile::kRows>::kRowBytes);
    const uint32_t grads =
        Uniform(pipeline.Own(own.stage) + Tile::kOwnKeyBytes + warpgroup_row * SharedTile<kValueDepth, Tile::kRows>::kRowBytes);
    WarpgroupMask<false, kGeneral> mask;
    int component = -1;
    Consume(pipeline, &state, [&](const StageInfo& info, uint32_t stage) {
      if (info.component != component) {
        component = info.component;
        mask.Find(head.components + component, view, warpgroup_begin, work_tile.end);
      }
      const WarpgroupSegment segment = {mask.component, info.begin, info.count};
      const uint32_t keys = Uniform(pipeline.Stage(stage));
      ClearUnused<Tile, kKeyDepth, kValueDepth>(info, keys);
      if (!mask.Reaches(segment)) return;
      WarpgroupAddQueryGrad<T, kKeyDepth, kValueDepth, Tile::kRows, kStageRows>(context, mask, segment, warpgroup_begin, work_tile.end,
                                                                                queries, grads, keys, keys + Tile::kStageKeyBytes,
                                                                                log_sum_exp, delta, sum);
    });
    if (threadIdx.x % 32 == 0) Arrive(pipeline.OwnEmpty(own.stage));
    own.Next();
    T* rows[2];
    float* partial[2];
#pragma unroll
    for (int r = 0; r < 2; r++) {
      const int row = work_tile.first + lane_row + 8 * r, position = view.Position(row);
      rows[r] = row < work_tile.existing ? RowOf<T>(args.query_grad, work_tile.batch, work_tile.head, position) : nullptr;
      partial[r] = row < work_tile.existing ? RowOf<float>(args.query_partial, work_tile.batch, work_tile.head, position) : nullptr;
    }
    Scale(sum, args.scale);
    StoreGradient<T, kKeyDepth>(sum, rows, partial, args.key_depth, true, launch.first, launch.last, launch.last);
  }
#endif
}

template <typename T, int kKeyDepth, int kValueDepth, bool kGeneral>
__global__ __launch_bounds__(
    (KernelTile<kKeyGrad, kKeyDepth, kValueDepth>::kThreads),
    (KernelTile<kKeyGrad, kKeyDepth, kValueDepth>::kBlocks)) void Sm90KeyGradKernel(const __grid_constant__ Arguments args,
                                                                                    const __grid_constant__ Launch launch,
                                                                                    const __grid_constant__ Maps maps) {
#if STF_HAS_WGMMA
  using Tile = KernelTile<kKeyGrad, kKeyDepth, kValueDepth>;
  extern __shared__ __align__(kTileAlignment) char shared[];
  const Pipeline<Tile> pipeline(shared);
  pipeline.Start(1 + 32);
  if (threadIdx.x >= Tile::kConsumers) {
    DeallocateRegisters<Tile::kProducerRegisters>();
    if (threadIdx.x >= Tile::kConsumers + 32) return;
    auto copy_own = [&](const WorkTile& work_tile, uint32_t tile, uint32_t full) {
      const Component numbering = work_tile.Numbering(launch);
      const bool summary = numbering.kind == STF_SUMMARY;
      const int sequence = summary ? 0 : work_tile.sequence, variant = summary ? 0 : Variant(maps, sequence);
      auto index = [&](int row) {
        return summary ? KeyPosition(numbering, work_tile.ViewOf(launch), work_tile.first + row) : work_tile.first + row;
      };
      CopyRows<kKeyDepth, Tile::kRows>(tile, maps.own[0][variant], maps.own_rows, full, work_tile.batch, work_tile.head, sequence, index);
      CopyRows<kValueDepth, Tile::kRows>(tile + Tile::kOwnKeyBytes, maps.own[1][variant], maps.own_rows, full, work_tile.batch,
                                         work_tile.head, sequence, index);
    };
    auto copy = [&](const WorkTile& work_tile, const WarpgroupSegment& segment, uint32_t tile, uint32_t full) {
      const int sequence = work_tile.sequence, variant = Variant(maps, sequence);
      auto index = [&](int row) { return segment.begin + row; };
      CopyRows<kKeyDepth, kStageRows>(tile, maps.streamed[0][variant], 64, full, work_tile.batch, work_tile.head, sequence, index);
      CopyRows<kValueDepth, kStageRows>(tile + Tile::kStageKeyBytes, maps.streamed[1][variant], 64, full, work_tile.batch, work_tile.head,
                                        sequence, index);
    };
    auto copy_statistics = [&](const WorkTile& work_tile, const WarpgroupSegment& segment, uint32_t stage, uint32_t full) {
      const int64_t base = StatisticsBase(args, work_tile.batch, work_tile.head);
#pragma unroll
      for (int i = threadIdx.x % 32; i < 2 * kStageRows; i += 32) {
        const int row = i % kStageRows;
        const float* const from = i < kStageRows ? args.log_sum_exp : args.delta;
        CopyAsync<4>(pipeline.Statistics(stage) + i,
                     from + base + (row < segment.count ? work_tile.ViewOf(launch).Position(segment.begin + row) : 0), row < segment.count);
      }
      ArriveAfterCopies(full);
    };
    Produce<Tile, true, kGeneral>(pipeline, args, launch, copy_own, copy, copy_statistics);
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
    const View view = work_tile.ViewOf(launch);
    const Head head = work_tile.HeadOf(launch);
    const Context context = {args, head, view};
    const int warpgroup_begin = work_tile.first + warpgroup_row;
    float key_sum[kKeyDepth / 8][4], value_sum[kValueDepth / 8][4];
    Clear(key_sum);
    Clear(value_sum);
    ClearOwn<Tile, kKeyDepth, kValueDepth>(args, work_tile, pipeline.Own(own.stage), warpgroup_row);
    const uint32_t keys = Uniform(pipeline.Own(own.stage) + warpgroup_row * SharedTile<kKeyDepth, Tile::kRows>::kRowBytes);
    const uint32_t values =
        Uniform(pipeline.Own(own.stage) + Tile::kOwnKeyBytes + warpgroup_row * SharedTile<kValueDepth, Tile::kRows>::kRowBytes);
    WarpgroupMask<true, kGeneral> mask;
    int component = -1;
    Consume(pipeline, &state, [&](const StageInfo& info, uint32_t stage) {
      if (info.component != component) {
        component = info.component;
        mask.Find(head.components + component, view, warpgroup_begin, work_tile.end);
      }
      const WarpgroupSegment segment = {mask.component, info.begin, info.count};
      const uint32_t queries = Uniform(pipeline.Stage(stage));
      ClearUnused<Tile, kKeyDepth, kValueDepth>(info, queries);
      if (!mask.Reaches(segment)) return;
      const float* const statistics = pipeline.Statistics(stage);
      WarpgroupAddKeyGrads<T, kKeyDepth, kValueDepth, Tile::kRows, kStageRows>(context, mask, segment, warpgroup_begin, work_tile.end, keys,
                                                                               values, queries, queries + Tile::kStageKeyBytes, statistics,
                                                                               statistics + kStageRows, key_sum, value_sum);
    });
    if (threadIdx.x % 32 == 0) Arrive(pipeline.OwnEmpty(own.stage));
    own.Next();
    const Component numbering = work_tile.Numbering(launch);
    T* rows[2];
    float* partial[2];
    auto find_rows = [&](const stf_tensor& grads, const stf_tensor& partials) {
#pragma unroll
      for (int r = 0; r < 2; r++) {
        const int row = work_tile.first + lane_row + 8 * r, position = KeyPosition(numbering, view, row);
        rows[r] = row < work_tile.end ? RowOf<T>(grads, work_tile.batch, work_tile.head, position) : nullptr;
        partial[r] = row < work_tile.end ? RowOf<float>(partials, work_tile.batch, work_tile.head, position) : nullptr;
      }
    };
    Scale(key_sum, args.scale);
    find_rows(args.key_grad, args.key_partial);
    StoreGradient<T, kKeyDepth>(key_sum, rows, partial, args.key_depth, true, launch.key_first, launch.key_last, launch.key_write);
    find_rows(args.value_grad, args.value_partial);
    StoreGradient<T, kValueDepth>(value_sum, rows, partial, args.value_depth, true, launch.key_first, launch.key_last, launch.key_write);
  }
#endif
}

}  // namespace cuda
}  // namespace stf

#endif  // STF_CUSTOM_OPS_ATTENTION_CUDA_SM90_KERNELS_CUH_
