// The kernels of forward.cuh and backward.cuh for warpgroups: the same walk over segments, copied by the copy engine, products by wgmma.
// For halves whose rows may be read 16 bytes at a time, on Hopper. Elsewhere their bodies are empty.
#ifndef STF_CUSTOM_OPS_ATTENTION_CUDA_GROUP_KERNELS_CUH_
#define STF_CUSTOM_OPS_ATTENTION_CUDA_GROUP_KERNELS_CUH_

#include "custom_ops/attention/cuda/epilogue.cuh"
#include "custom_ops/attention/cuda/group_stream.cuh"
#include "custom_ops/attention/cuda/group_tile.cuh"
#include "custom_ops/attention/cuda/kernels.h"

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define STF_HAS_WGMMA 1
#else
#define STF_HAS_WGMMA 0
#endif

namespace stf {
namespace cuda {

// Which of a map's two variants has a sequence of this launch.
__device__ inline int Variant(const Maps& maps, int sequence) { return sequence < maps.longer ? 1 : 0; }

// The filling warp of a launch by queries: own rows are the queries' (kGrads: and the output gradients'); keys and
// values stream.
template <typename Tile, int kKeyDepth, int kValueDepth, bool kGrads, bool kExtra>
__device__ inline void FillByQuery(const Stream<Tile>& stream, const Arguments& args, const Launch& launch, const Maps& maps) {
  auto copy_own = [&](const Job& job, uint32_t tile, uint32_t full) {
    const int sequence = job.sequence, variant = Variant(maps, sequence);
    auto index = [&](int row) { return job.first + row; };
    CopyRows<kKeyDepth, Tile::kRows>(tile, maps.own[0][variant], 64, full, job.batch, job.head, sequence, index);
    if constexpr (kGrads) {
      CopyRows<kValueDepth, Tile::kRows>(tile + Tile::kOwnKeyBytes, maps.own[1][variant], 64, full, job.batch, job.head, sequence, index);
    }
  };
  auto copy = [&](const Job& job, const GroupSegment& segment, uint32_t tile, uint32_t full) {
    if (segment.component->kind == STF_SUMMARY) {
      auto index = [&](int row) { return KeyPosition(*segment.component, job.ViewOf(launch), segment.begin + row); };
      CopyRows<kKeyDepth, kGroupColumns>(tile, maps.summary[0], maps.summary_rows, full, job.batch, job.head, 0, index);
      CopyRows<kValueDepth, kGroupColumns>(tile + Tile::kStageKeyBytes, maps.summary[1], maps.summary_rows, full, job.batch, job.head, 0,
                                           index);
      return;
    }
    const int sequence = job.sequence, variant = Variant(maps, sequence);
    auto index = [&](int row) { return segment.begin + row; };
    CopyRows<kKeyDepth, kGroupColumns>(tile, maps.streamed[0][variant], 64, full, job.batch, job.head, sequence, index);
    CopyRows<kValueDepth, kGroupColumns>(tile + Tile::kStageKeyBytes, maps.streamed[1][variant], 64, full, job.batch, job.head, sequence,
                                         index);
  };
  Fill<Tile, false, kExtra>(stream, args, launch, copy_own, copy, [](const Job&, const GroupSegment&, uint32_t, uint32_t) {});
}

// Rows that are not in use may hold anything, even what times zero is not zero.
template <typename Tile, int kKeyDepth, int kValueDepth>
__device__ inline void ClearUnused(const Note& note, uint32_t tile) {
  if (!(note.flags & kClearUnused)) return;
  ClearRows<kKeyDepth, kGroupColumns>(tile, note.count, kGroupColumns);
  ClearRows<kValueDepth, kGroupColumns>(tile + Tile::kStageKeyBytes, note.count, kGroupColumns);
  JoinGroup();
}

// The same of a warpgroup's own rows.
template <typename Tile, int kKeyDepth, int kValueDepth>
__device__ inline void ClearOwn(const Arguments& args, const Job& job, uint32_t tile, int group_row) {
  const int begin = max(group_row, job.used - job.first);
  if (!args.lengths || begin >= group_row + 64) return;
  ClearRows<kKeyDepth, Tile::kRows>(tile, begin, group_row + 64);
  if constexpr (kValueDepth > 0) ClearRows<kValueDepth, Tile::kRows>(tile + Tile::kOwnKeyBytes, begin, group_row + 64);
  JoinGroup();
}

template <typename T, int kKeyDepth, int kValueDepth, bool kExtra, bool kPartial>
__global__ __launch_bounds__(
    (StreamTile<kForward, kKeyDepth, kValueDepth>::kThreads),
    (StreamTile<kForward, kKeyDepth, kValueDepth>::kBlocks)) void GroupForwardKernel(const __grid_constant__ Arguments args,
                                                                                     const __grid_constant__ Launch launch,
                                                                                     const __grid_constant__ Maps maps) {
#if STF_HAS_WGMMA
  using Tile = StreamTile<kForward, kKeyDepth, kValueDepth>;
  extern __shared__ __align__(kGroupAlignment) char shared[];
  const Stream<Tile> stream(shared);
  stream.Start(1);
  if (threadIdx.x >= Tile::kConsumers) {
    GiveRegisters<Tile::kFillRegisters>();
    if (threadIdx.x >= Tile::kConsumers + 32) return;
    FillByQuery<Tile, kKeyDepth, kValueDepth, false, kExtra>(stream, args, launch, maps);
    return;
  }
  TakeRegisters<Tile::kRegisters>();
  const int group_row = Uniform(threadIdx.x / 128 * 64), lane_row = threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4;
  Turn<Tile::kOwnStages> own;
  Turn<Tile::kStages> turn;
  while (true) {
    WaitForPhase(stream.OwnFull(own.stage), own.phase);
    const Job job = *stream.JobOf(own.stage);
    if (job.batch < 0) return;
    const View view = job.ViewOf(launch);
    const Head head = job.HeadOf(launch);
    const Context context = {args, head, view};
    const int group_begin = job.first + group_row;
    auto position = [&](int row) { return row < job.existing ? view.Position(row) : -1; };
    auto find_rows = [&]() {  // anew where they are needed: registers are few between
      const int row = job.first + lane_row;
      return OutputRows<T, kValueDepth, kPartial>(args, job.batch, job.head, {position(row), position(row + 8)});
    };
    Softmax<T, kKeyDepth, kValueDepth> softmax;
    bool settled = false;
    find_rows().Begin(&softmax, args, launch, true);
    ClearOwn<Tile, kKeyDepth, 0>(args, job, stream.Own(own.stage), group_row);
    const uint32_t queries = Uniform(stream.Own(own.stage) + group_row * GroupTile<kKeyDepth, Tile::kRows>::kRowBytes);
    GroupMask<false, kExtra> mask;
    int component = -1;
    Drain(stream, &turn, [&](const Note& note, uint32_t stage) {
      if (note.component != component) {
        component = note.component;
        mask.Find(head.components + component, view, group_begin, job.end);
      }
      const GroupSegment segment = {mask.component, note.begin, note.count};
      const uint32_t keys = Uniform(stream.Stage(stage));
      ClearUnused<Tile, kKeyDepth, kValueDepth>(note, keys);
      if (!mask.Reaches(segment)) return;
      GroupAttend<T, kKeyDepth, kValueDepth, Tile::kRows, kGroupColumns>(softmax, &settled, context, mask, segment, group_begin, job.end,
                                                                         queries, keys, keys + Tile::kStageKeyBytes);
    });
    if (threadIdx.x % 32 == 0) Arrive(stream.OwnEmpty(own.stage));
    own.Next();
    softmax.Finish();
    find_rows().Store(&softmax, args, launch, true);
  }
#endif
}

template <typename T, int kKeyDepth, int kValueDepth, bool kExtra>
__global__ __launch_bounds__(
    (StreamTile<kQueryGrad, kKeyDepth, kValueDepth>::kThreads),
    (StreamTile<kQueryGrad, kKeyDepth, kValueDepth>::kBlocks)) void GroupQueryGradKernel(const __grid_constant__ Arguments args,
                                                                                         const __grid_constant__ Launch launch,
                                                                                         const __grid_constant__ Maps maps) {
#if STF_HAS_WGMMA
  using Tile = StreamTile<kQueryGrad, kKeyDepth, kValueDepth>;
  extern __shared__ __align__(kGroupAlignment) char shared[];
  const Stream<Tile> stream(shared);
  stream.Start(1);
  if (threadIdx.x >= Tile::kConsumers) {
    GiveRegisters<Tile::kFillRegisters>();
    if (threadIdx.x >= Tile::kConsumers + 32) return;
    FillByQuery<Tile, kKeyDepth, kValueDepth, true, kExtra>(stream, args, launch, maps);
    return;
  }
  TakeRegisters<Tile::kRegisters>();
  const int group_row = Uniform(threadIdx.x / 128 * 64), lane_row = threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4;
  Turn<Tile::kOwnStages> own;
  Turn<Tile::kStages> turn;
  while (true) {
    WaitForPhase(stream.OwnFull(own.stage), own.phase);
    const Job job = *stream.JobOf(own.stage);
    if (job.batch < 0) return;
    const View view = job.ViewOf(launch);
    const Head head = job.HeadOf(launch);
    const Context context = {args, head, view};
    const int group_begin = job.first + group_row;
    const int64_t statistics = StatisticsBase(args, job.batch, job.head);
    float log_sum_exp[2], delta[2];
    if (launch.first) {
      const T* const output = Base<const T>(args.output, job.batch, job.head);
      const T* const grad = Base<const T>(args.output_grad, job.batch, job.head);
      GroupSumProducts<T, kValueDepth>(delta, output, args.output.position_stride, grad, args.output_grad.position_stride, args.value_depth,
                                       [&](int r) {
                                         const int row = job.first + lane_row + 8 * r;
                                         return row < job.end ? view.Position(row) : -1;
                                       });
    }
#pragma unroll
    for (int r = 0; r < 2; r++) {
      const int row = job.first + lane_row + 8 * r, position = view.Position(row);
      log_sum_exp[r] = row < job.end ? args.log_sum_exp[statistics + position] : 0;
      if (launch.first) {
        if (row < job.end && args.log_sum_exp_grad) delta[r] -= args.log_sum_exp_grad[statistics + position];
        if (row < job.existing && threadIdx.x % 4 == 0) args.delta[statistics + position] = delta[r];
      } else {
        delta[r] = row < job.end ? args.delta[statistics + position] : 0;
      }
    }
    float sum[kKeyDepth / 8][4];
    Clear(sum);
    ClearOwn<Tile, kKeyDepth, kValueDepth>(args, job, stream.Own(own.stage), group_row);
    const uint32_t queries = Uniform(stream.Own(own.stage) + group_row * GroupTile<kKeyDepth, Tile::kRows>::kRowBytes);
    const uint32_t grads = Uniform(stream.Own(own.stage) + Tile::kOwnKeyBytes + group_row * GroupTile<kValueDepth, Tile::kRows>::kRowBytes);
    GroupMask<false, kExtra> mask;
    int component = -1;
    Drain(stream, &turn, [&](const Note& note, uint32_t stage) {
      if (note.component != component) {
        component = note.component;
        mask.Find(head.components + component, view, group_begin, job.end);
      }
      const GroupSegment segment = {mask.component, note.begin, note.count};
      const uint32_t keys = Uniform(stream.Stage(stage));
      ClearUnused<Tile, kKeyDepth, kValueDepth>(note, keys);
      if (!mask.Reaches(segment)) return;
      GroupAddQueryGrad<T, kKeyDepth, kValueDepth, Tile::kRows, kGroupColumns>(context, mask, segment, group_begin, job.end, queries, grads,
                                                                               keys, keys + Tile::kStageKeyBytes, log_sum_exp, delta, sum);
    });
    if (threadIdx.x % 32 == 0) Arrive(stream.OwnEmpty(own.stage));
    own.Next();
    T* rows[2];
    float* partial[2];
#pragma unroll
    for (int r = 0; r < 2; r++) {
      const int row = job.first + lane_row + 8 * r, position = view.Position(row);
      rows[r] = row < job.existing ? RowOf<T>(args.query_grad, job.batch, job.head, position) : nullptr;
      partial[r] = row < job.existing ? RowOf<float>(args.query_partial, job.batch, job.head, position) : nullptr;
    }
    Scale(sum, args.scale);
    Deliver<T, kKeyDepth>(sum, rows, partial, args.key_depth, true, launch.first, launch.last, launch.last);
  }
#endif
}

template <typename T, int kKeyDepth, int kValueDepth, bool kExtra>
__global__ __launch_bounds__(
    (StreamTile<kKeyGrad, kKeyDepth, kValueDepth>::kThreads),
    (StreamTile<kKeyGrad, kKeyDepth, kValueDepth>::kBlocks)) void GroupKeyGradKernel(const __grid_constant__ Arguments args,
                                                                                     const __grid_constant__ Launch launch,
                                                                                     const __grid_constant__ Maps maps) {
#if STF_HAS_WGMMA
  using Tile = StreamTile<kKeyGrad, kKeyDepth, kValueDepth>;
  extern __shared__ __align__(kGroupAlignment) char shared[];
  const Stream<Tile> stream(shared);
  stream.Start(1 + 32);
  if (threadIdx.x >= Tile::kConsumers) {
    GiveRegisters<Tile::kFillRegisters>();
    if (threadIdx.x >= Tile::kConsumers + 32) return;
    auto copy_own = [&](const Job& job, uint32_t tile, uint32_t full) {
      const Component numbering = job.Numbering(launch);
      const bool summary = numbering.kind == STF_SUMMARY;
      const int sequence = summary ? 0 : job.sequence, variant = summary ? 0 : Variant(maps, sequence);
      auto index = [&](int row) { return summary ? KeyPosition(numbering, job.ViewOf(launch), job.first + row) : job.first + row; };
      CopyRows<kKeyDepth, Tile::kRows>(tile, maps.own[0][variant], maps.own_rows, full, job.batch, job.head, sequence, index);
      CopyRows<kValueDepth, Tile::kRows>(tile + Tile::kOwnKeyBytes, maps.own[1][variant], maps.own_rows, full, job.batch, job.head,
                                         sequence, index);
    };
    auto copy = [&](const Job& job, const GroupSegment& segment, uint32_t tile, uint32_t full) {
      const int sequence = job.sequence, variant = Variant(maps, sequence);
      auto index = [&](int row) { return segment.begin + row; };
      CopyRows<kKeyDepth, kGroupColumns>(tile, maps.streamed[0][variant], 64, full, job.batch, job.head, sequence, index);
      CopyRows<kValueDepth, kGroupColumns>(tile + Tile::kStageKeyBytes, maps.streamed[1][variant], 64, full, job.batch, job.head, sequence,
                                           index);
    };
    auto copy_statistics = [&](const Job& job, const GroupSegment& segment, uint32_t stage, uint32_t full) {
      const int64_t base = StatisticsBase(args, job.batch, job.head);
#pragma unroll
      for (int i = threadIdx.x % 32; i < 2 * kGroupColumns; i += 32) {
        const int row = i % kGroupColumns;
        const float* const from = i < kGroupColumns ? args.log_sum_exp : args.delta;
        CopyAsync<4>(stream.Statistics(stage) + i,
                     from + base + (row < segment.count ? job.ViewOf(launch).Position(segment.begin + row) : 0), row < segment.count);
      }
      ArriveAfterCopies(full);
    };
    Fill<Tile, true, kExtra>(stream, args, launch, copy_own, copy, copy_statistics);
    return;
  }
  TakeRegisters<Tile::kRegisters>();
  const int group_row = Uniform(threadIdx.x / 128 * 64), lane_row = threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4;
  Turn<Tile::kOwnStages> own;
  Turn<Tile::kStages> turn;
  while (true) {
    WaitForPhase(stream.OwnFull(own.stage), own.phase);
    const Job job = *stream.JobOf(own.stage);
    if (job.batch < 0) return;
    const View view = job.ViewOf(launch);
    const Head head = job.HeadOf(launch);
    const Context context = {args, head, view};
    const int group_begin = job.first + group_row;
    float key_sum[kKeyDepth / 8][4], value_sum[kValueDepth / 8][4];
    Clear(key_sum);
    Clear(value_sum);
    ClearOwn<Tile, kKeyDepth, kValueDepth>(args, job, stream.Own(own.stage), group_row);
    const uint32_t keys = Uniform(stream.Own(own.stage) + group_row * GroupTile<kKeyDepth, Tile::kRows>::kRowBytes);
    const uint32_t values =
        Uniform(stream.Own(own.stage) + Tile::kOwnKeyBytes + group_row * GroupTile<kValueDepth, Tile::kRows>::kRowBytes);
    GroupMask<true, kExtra> mask;
    int component = -1;
    Drain(stream, &turn, [&](const Note& note, uint32_t stage) {
      if (note.component != component) {
        component = note.component;
        mask.Find(head.components + component, view, group_begin, job.end);
      }
      const GroupSegment segment = {mask.component, note.begin, note.count};
      const uint32_t queries = Uniform(stream.Stage(stage));
      ClearUnused<Tile, kKeyDepth, kValueDepth>(note, queries);
      if (!mask.Reaches(segment)) return;
      const float* const statistics = stream.Statistics(stage);
      GroupAddKeyGrads<T, kKeyDepth, kValueDepth, Tile::kRows, kGroupColumns>(context, mask, segment, group_begin, job.end, keys, values,
                                                                              queries, queries + Tile::kStageKeyBytes, statistics,
                                                                              statistics + kGroupColumns, key_sum, value_sum);
    });
    if (threadIdx.x % 32 == 0) Arrive(stream.OwnEmpty(own.stage));
    own.Next();
    const Component numbering = job.Numbering(launch);
    T* rows[2];
    float* partial[2];
    auto find_rows = [&](const stf_tensor& grads, const stf_tensor& partials) {
#pragma unroll
      for (int r = 0; r < 2; r++) {
        const int row = job.first + lane_row + 8 * r, position = KeyPosition(numbering, view, row);
        rows[r] = row < job.end ? RowOf<T>(grads, job.batch, job.head, position) : nullptr;
        partial[r] = row < job.end ? RowOf<float>(partials, job.batch, job.head, position) : nullptr;
      }
    };
    Scale(key_sum, args.scale);
    find_rows(args.key_grad, args.key_partial);
    Deliver<T, kKeyDepth>(key_sum, rows, partial, args.key_depth, true, launch.key_first, launch.key_last, launch.key_write);
    find_rows(args.value_grad, args.value_partial);
    Deliver<T, kValueDepth>(value_sum, rows, partial, args.value_depth, true, launch.key_first, launch.key_last, launch.key_write);
  }
#endif
}

}  // namespace cuda
}  // namespace stf

#endif  // STF_CUSTOM_OPS_ATTENTION_CUDA_GROUP_KERNELS_CUH_
