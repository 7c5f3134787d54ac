// Backward in one pass, five products, for sequences in which a key reaches the queries of a few tiles alone: local windows, strided
// sequences, own blocks. A block of threads walks a run of keys, kBackwardKeys at a time, and of each the tiles of 64 queries that they
// reach. Gradients of keys and values stay in the registers of two warpgroups, a half of the keys each. The scores' gradients leave
// registers for shared memory, where the query gradients' product reads them the other way around. Query gradients wait in shared memory,
// each thread's part for itself, until the last of their keys has passed.
//
// A run has query gradients of the positions that it has keys of: so it begins with keys of the run before, as far back as those queries
// reach, and visits queries of the run after. Nothing is added to memory, and the order of every sum is fixed.
#ifndef STF_CUSTOM_OPS_ATTENTION_CUDA_SM90_BACKWARD_CUH_
#define STF_CUSTOM_OPS_ATTENTION_CUDA_SM90_BACKWARD_CUH_

#include "custom_ops/attention/cuda/sm90/key_blocks.cuh"
#include "custom_ops/attention/cuda/sm90/passes.cuh"

namespace stf {
namespace cuda {

// An Sm90BackwardTile, and the addresses of its parts.
template <int kKeyDepth, int kValueDepth>
struct BackwardPipeline {
  static constexpr Sm90BackwardTile kTile = FindSm90BackwardTile({kKeyDepth, kValueDepth});
  static constexpr int kStages = kTile.stages, kSlots = kTile.slots(), kConsumers = 256, kThreads = kConsumers + 128;
  static constexpr int kRing = kTile.ring(), kScoreGrads = kTile.score_grads(), kSums = kTile.sums(), kStatistics = kTile.statistics();
  static constexpr int kOutput = kTile.output(), kKeyBlocks = kTile.key_blocks(), kBarriers = kTile.barriers();
  static constexpr int kProducerRegisters = 40, kConsumerRegisters = 232;
  static_assert(128 * kProducerRegisters + kConsumers * kConsumerRegisters <= 168 * kThreads, "what the block starts with");
  static_assert(sizeof(KeyBlock) == kKeyBlockBytes, "as planned");

  char* shared;
  uint32_t base;

  __device__ explicit BackwardPipeline(char* memory) : shared(memory), base(SharedAddress(memory)) {}
  __device__ uint32_t Own(uint32_t stage) const { return base + stage * kTile.own_bytes; }
  __device__ uint32_t Stage(uint32_t stage) const { return base + kRing + stage * kTile.stage_bytes; }
  __device__ uint32_t Output() const { return base + kOutput; }
  __device__ uint32_t ScoreGrads(int half) const { return base + kScoreGrads + half * kScoreGradBytes; }
  __device__ float4* Accumulators(int tile) const {
    return reinterpret_cast<float4*>(shared + kSums + tile % kTile.accumulators * kTile.accumulator_bytes);
  }
  __device__ float* Statistics(int slot) const { return reinterpret_cast<float*>(shared + kStatistics) + slot * 2 * 64; }
  __device__ KeyBlock* BlockOf(uint32_t own) const { return reinterpret_cast<KeyBlock*>(shared + kKeyBlocks) + own; }
  __device__ uint32_t Full(uint32_t stage) const { return base + kBarriers + 8 * stage; }
  __device__ uint32_t Empty(uint32_t stage) const { return Full(kStages + stage); }
  __device__ uint32_t OwnFull(uint32_t stage) const { return Full(2 * kStages + stage); }
  __device__ uint32_t OwnEmpty(uint32_t stage) const { return Full(2 * kStages + 2 + stage); }
  __device__ uint32_t OutputFull() const { return Full(2 * kStages + 4); }
  __device__ uint32_t OutputEmpty() const { return Full(2 * kStages + 5); }
  __device__ uint32_t Added(int warpgroup) const { return Full(2 * kStages + 6 + warpgroup); }
  __device__ uint32_t SumsFull(uint32_t slot) const { return Full(2 * kStages + 8 + slot); }
  __device__ uint32_t DeltasFull(uint32_t slot) const { return SumsFull(kSlots + slot); }

  __device__ void Start() const {
    if (threadIdx.x == 0) {
      for (int stage = 0; stage < kStages; stage++) {
        InitBarrier(Full(stage), 1);
        InitBarrier(Empty(stage), kConsumers / 32 * kWarpArrivals);
      }
      for (int stage = 0; stage < 2; stage++) {
        InitBarrier(OwnFull(stage), 1);
        InitBarrier(OwnEmpty(stage), (kConsumers / 32 + 3) * kWarpArrivals);  // the statistics' warps leave a block, too
      }
      InitBarrier(OutputFull(), 1);
      InitBarrier(OutputEmpty(), 3 * kWarpArrivals);
      for (int warpgroup = 0; warpgroup < 2; warpgroup++) InitBarrier(Added(warpgroup), 4 * kWarpArrivals);
      for (int slot = 0; slot < kSlots; slot++) {
        InitBarrier(SumsFull(slot), 3 * kWarpArrivals);
        InitBarrier(DeltasFull(slot), 3 * kWarpArrivals);
      }
      asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
      FenceShared();
    }
    __syncthreads();
  }
};

// One warp: keys and values of the key blocks, queries and output gradients of the tiles, and where delta is to be found the outputs of
// those that are new.
template <bool kDocuments, int kKeyDepth, int kValueDepth>
__device__ inline void ProduceTiles(const BackwardPipeline<kKeyDepth, kValueDepth>& pipeline, const Arguments& args, const Launch& launch,
                                    const Maps& maps) {
  using Pipeline = BackwardPipeline<kKeyDepth, kValueDepth>;
  const bool first_lane = threadIdx.x % 32 == 0;
  PipelineState<2> own;
  PipelineState<1> output;
  PipelineState<Pipeline::kStages> state;
  KeyBlockWalk<kDocuments> walk(args, launch);
  KeyBlock block = {};
  while (walk.Next(&block)) {
    const int variant = Variant(maps, block.sequence);
    WaitBarrier(pipeline.OwnEmpty(own.stage), own.phase ^ 1);
    if (first_lane) {
      const uint32_t tile = pipeline.Own(own.stage), full = pipeline.OwnFull(own.stage);
      auto index = [&](int row) { return block.first + row; };
      *pipeline.BlockOf(own.stage) = block;
      ArriveAndExpect(full, Pipeline::kTile.own_bytes);
      CopyRows<kKeyDepth, kBackwardKeys>(tile, maps.own[0][variant], 64, full, block.batch, block.key_head, block.sequence, index);
      CopyRows<kValueDepth, kBackwardKeys>(tile + Pipeline::kTile.own_key_bytes, maps.own[1][variant], 64, full, block.batch,
                                           block.key_head, block.sequence, index);
    }
    own.Next();
    for (int t = block.tile_begin; t < block.tile_end; t++) {
      WaitBarrier(pipeline.Empty(state.stage), state.phase ^ 1);
      if (first_lane) {
        const uint32_t tile = pipeline.Stage(state.stage), full = pipeline.Full(state.stage);
        auto index = [&](int row) { return 64 * t + row; };
        ArriveAndExpect(full, Pipeline::kTile.stage_bytes);
        CopyRows<kKeyDepth, 64>(tile, maps.streamed[0][variant], 64, full, block.batch, block.head, block.sequence, index);
        CopyRows<kValueDepth, 64>(tile + Pipeline::kTile.stage_key_bytes, maps.streamed[1][variant], 64, full, block.batch, block.head,
                                  block.sequence, index);
      }
      state.Next();
      if (!launch.first || t < block.tile_new) continue;
      WaitBarrier(pipeline.OutputEmpty(), output.phase ^ 1);
      if (first_lane) {
        auto index = [&](int row) { return 64 * t + row; };
        ArriveAndExpect(pipeline.OutputFull(), 64 * kValueDepth * 2);
        CopyRows<kValueDepth, 64>(pipeline.Output(), maps.output[variant], 64, pipeline.OutputFull(), block.batch, block.head,
                                  block.sequence, index);
      }
      output.Next();
    }
  }
  WaitBarrier(pipeline.OwnEmpty(own.stage), own.phase ^ 1);
  if (first_lane) {
    pipeline.BlockOf(own.stage)->batch = -1;
    Arrive(pipeline.OwnFull(own.stage));
  }
}

// Three warps: log-sum-exp and delta of each tile that is new. The first launch of a call finds delta, in shared memory, and leaves it for
// the others.
template <typename T, bool kDocuments, int kKeyDepth, int kValueDepth>
__device__ inline void ProduceStatistics(const BackwardPipeline<kKeyDepth, kValueDepth>& pipeline, const Arguments& args,
                                         const Launch& launch) {
  using Pipeline = BackwardPipeline<kKeyDepth, kValueDepth>;
  using ValueTile = SharedTile<kValueDepth, 64>;
  const int warp = threadIdx.x / 32 - Pipeline::kConsumers / 32 - 1;
  PipelineState<2> own;
  PipelineState<1> output;
  PipelineState<Pipeline::kStages> state;
  KeyBlockWalk<kDocuments> walk(args, launch);
  KeyBlock block = {};
  while (walk.Next(&block)) {
    const View view = block.template ViewOf<kDocuments>(args, launch);
    const int64_t statistics = StatisticsBase(args, block.batch, block.head);
    // Whoever read what is written over here has left the key block before the last one. These warps wait at every block, and all wait for
    // them: so nobody is ever a phase and more away from the one that is waited for.
    WaitBarrier(pipeline.OwnEmpty(own.stage), own.phase ^ 1);
    for (int t = block.tile_begin; t < block.tile_end; t++, state.Next()) {
      if (t < block.tile_new) continue;
      const int slot = (block.slot + t) % Pipeline::kSlots;
      float* const to = pipeline.Statistics(slot);
      const uint32_t outputs = pipeline.Output(), grads = pipeline.Stage(state.stage) + Pipeline::kTile.stage_key_bytes;
      for (int row = threadIdx.x % 32 + 32 * warp; row < 64; row += 96) {
        const bool used = 64 * t + row < block.count;
        const int64_t at = statistics + view.Position(64 * t + row);
        to[row] = used ? args.log_sum_exp[at] : 0;
        if (!launch.first) to[64 + row] = used ? args.delta[at] : 0;
      }
      __syncwarp();
      ArriveWarp(pipeline.SumsFull(slot));
      if (!launch.first) {
        ArriveWarp(pipeline.DeltasFull(slot));
        continue;
      }
      WaitBarrier(pipeline.OutputFull(), output.phase);
      WaitBarrier(pipeline.Full(state.stage), state.phase);
#pragma unroll 1
      for (int begin = 8 * warp; begin < 64; begin += 24) {
        const int row = begin + threadIdx.x % 32 / 4;
        const bool used = 64 * t + row < block.count;
        const int64_t at = statistics + view.Position(64 * t + row);
        float delta = used && args.log_sum_exp_grad ? -args.log_sum_exp_grad[at] : 0, sum = 0;
        if (64 * t < block.count) {
#pragma unroll
          for (int i = 0; i < kValueDepth / 32; i++) {
            const int offset = ValueTile::Offset(used ? row : 0, threadIdx.x % 4 + 4 * i);
            const uint4 x = LoadShared(outputs + offset), y = LoadShared(grads + offset);
            const uint32_t u[4] = {x.x, x.y, x.z, x.w}, v[4] = {y.x, y.y, y.z, y.w};
#pragma unroll
            for (int e = 0; e < 4; e++) {
              const float2 left = Unpack(u[e], T()), right = Unpack(v[e], T());
              sum = fmaf(left.x, right.x, fmaf(left.y, right.y, sum));
            }
          }
          sum += __shfl_xor_sync(~0u, sum, 1);
          sum += __shfl_xor_sync(~0u, sum, 2);
        }
        if (threadIdx.x % 4 != 0) continue;
        delta = used ? delta + sum : 0;  // what is not in use may be anything
        if (t < block.tile_stop && 64 * t + row < block.existing) args.delta[at] = delta;
        to[64 + row] = delta;
      }
      __syncwarp();
      ArriveWarp(pipeline.DeltasFull(slot));
      ArriveWarp(pipeline.OutputEmpty());
      output.Next();
    }
    __syncwarp();
    ArriveWarp(pipeline.OwnEmpty(own.stage));
    own.Next();
  }
}

// The mainloop of a warpgroup, a half of the keys. A step is a tile of queries. The two warpgroups go their own ways, but for adding to the
// query gradients: first half first.
template <typename T, int kKeyDepth, int kValueDepth, bool kDocuments>
class BackwardMainloop {
 public:
  using Pipeline = BackwardPipeline<kKeyDepth, kValueDepth>;

  __device__ BackwardMainloop(const Pipeline& pipeline, const Arguments& args, const Launch& launch)
      : pipeline_(pipeline), args_(args), launch_(launch), warpgroup_(Uniform(threadIdx.x / 128)) {}

  __device__ void Run() {
    while (true) {
      WaitBarrier(pipeline_.OwnFull(own_.stage), own_.phase);
      const KeyBlock block = *pipeline_.BlockOf(own_.stage);
      if (block.batch < 0) return;
      Visit(block);
      own_.Next();
    }
  }

 private:
  using KeyTile = SharedTile<kKeyDepth, kBackwardKeys>;
  using ValueTile = SharedTile<kValueDepth, kBackwardKeys>;

  __device__ void Visit(const KeyBlock& block) {
    const View view = block.template ViewOf<kDocuments>(args_, launch_);
    const Head head = block.HeadOf(launch_);
    const Context context = {args_, head, view};
    const Component* const component = head.components + (__ffsll(head.members) - 1);
    const int begin = block.first + 64 * warpgroup_;
    const uint32_t tile = Uniform(pipeline_.Own(own_.stage));
    const uint32_t keys = tile + 64 * warpgroup_ * KeyTile::kRowBytes;
    const uint32_t values = tile + Pipeline::kTile.own_key_bytes + 64 * warpgroup_ * ValueTile::kRowBytes;
    if (args_.lengths && block.count < begin + 64) {
      const int used = max(block.count - begin, 0);
      ClearRows<kKeyDepth, kBackwardKeys>(keys, used, 64);
      ClearRows<kValueDepth, kBackwardKeys>(values, used, 64);
      SyncWarpgroup();
    }
    WarpgroupMask<true, false> mask;
    mask.Find(component, view, begin, block.end);
    Interval first_half = {0, 0};  // queries of the first half's keys
    if (warpgroup_ > 0) {
      first_half = {QueriesOf(*component, view, block.first).low, QueriesOf(*component, view, min(begin, block.end) - 1).high};
    }
    float key_sum[kKeyDepth / 8][4], value_sum[kValueDepth / 8][4];
    Clear(key_sum);
    Clear(value_sum);
    for (int t = block.tile_begin; t < block.tile_end; t++) {
      const int visit = block.slot + t;
      const uint32_t queries = Uniform(pipeline_.Stage(state_.stage)), grads = queries + Pipeline::kTile.stage_key_bytes;
      const float* const statistics = pipeline_.Statistics(visit % Pipeline::kSlots);
      const WarpgroupSegment segment = {component, 64 * t, min(64, block.count - 64 * t)};
      const bool reached = mask.Reaches(segment);
      float query_sum[kKeyDepth / 8][4];
      WaitBarrier(pipeline_.Full(state_.stage), state_.phase);
      const uint32_t slot = visit % Pipeline::kSlots, slot_phase = visit / Pipeline::kSlots & 1;
      const auto wait_for_sums = [&] { WaitBarrier(pipeline_.SumsFull(slot), slot_phase); };
      const auto wait_for_deltas = [&] { WaitBarrier(pipeline_.DeltasFull(slot), slot_phase); };
      if (args_.lengths && segment.count < 64) {
        ClearRows<kKeyDepth, 64>(queries, max(segment.count, 0), 64);
        ClearRows<kValueDepth, 64>(grads, max(segment.count, 0), 64);
        SyncWarpgroup();
      }
      if (reached) {
        WarpgroupAddKeyGrads<T, kKeyDepth, kValueDepth, kBackwardKeys, 64>(
            context, mask, segment, begin, block.end, keys, values, queries, grads, statistics, statistics + 64, key_sum, value_sum,
            wait_for_sums, wait_for_deltas, [&](const auto& weights) {
              const uint32_t score_grads = Uniform(pipeline_.ScoreGrads(warpgroup_));
              WaitForWarpgroup();  // the last product with the tile is done
              StoreWeights(score_grads, weights);
              SyncWarpgroup();
              BeginProducts();
              MultiplyTransposed<T, kKeyDepth, kBackwardKeys>(query_sum, score_grads, keys, false);
              CommitProducts();
            });
        FenceRegisters(query_sum);
      } else {
        wait_for_deltas();  // whoever finds them has done with the stage
        Clear(query_sum);
      }
      __syncwarp();
      ArriveWarp(pipeline_.Empty(state_.stage));
      state_.Next();
      AddQueryGrads(block, view, t, reached, warpgroup_ > 0 && segment.Meets(first_half), query_sum);
    }
    __syncwarp();
    ArriveWarp(pipeline_.OwnEmpty(own_.stage));
    if (!block.keys) return;
    const auto position = [&](int row) { return row < block.end ? view.Position(row) : -1; };
    const int row = begin + LaneRow();
    StoreKeyGradients<T, kKeyDepth, kValueDepth>(key_sum, value_sum, args_, launch_, block.batch, block.head,
                                                 {position(row), position(row + 8)});
  }

  // Adds to what waits for further keys of a tile, or, with the last of them, writes what has come together.
  __device__ void AddQueryGrads(const KeyBlock& block, const View& view, int t, bool reached, bool met, float (&sum)[kKeyDepth / 8][4]) {
    const bool ours = t < block.tile_stop, fresh = t >= block.tile_new && !met;  // fresh: nothing waits yet
    const bool last = ours && t == block.first / 64 + warpgroup_, keep = ours && !last && (reached || (fresh && warpgroup_ > 0));
    float4* const kept = pipeline_.Accumulators(t) + threadIdx.x % 128;
    // The first half adds to a step's tile behind the second half's step before, the second half behind the first.
    WaitBarrier(pipeline_.Added(warpgroup_ ^ 1), warpgroup_ > 0 ? phase_ : phase_ ^ 1);
    if ((keep || last) && !fresh) {
#pragma unroll
      for (int b = 0; b < kKeyDepth / 8; b++) {
        const float4 before = kept[128 * b];
        sum[b][0] += before.x;
        sum[b][1] += before.y;
        sum[b][2] += before.z;
        sum[b][3] += before.w;
      }
    }
    if (keep) {
#pragma unroll
      for (int b = 0; b < kKeyDepth / 8; b++) kept[128 * b] = {sum[b][0], sum[b][1], sum[b][2], sum[b][3]};
    }
    __syncwarp();
    ArriveWarp(pipeline_.Added(warpgroup_));
    phase_ ^= 1;
    if (!last) return;
    const auto position = [&](int row) { return row < block.existing ? view.Position(row) : -1; };
    const int row = 64 * t + LaneRow();
    StoreQueryGradients<T, kKeyDepth>(sum, args_, launch_, block.batch, block.head, {position(row), position(row + 8)});
  }

  __device__ static int LaneRow() { return threadIdx.x / 32 % 4 * 16 + threadIdx.x % 32 / 4; }

  const Pipeline& pipeline_;
  const Arguments& args_;
  const Launch& launch_;
  const int warpgroup_;
  PipelineState<2> own_;
  PipelineState<Pipeline::kStages> state_;
  uint32_t phase_ = 0;  // of the steps
};

template <typename T, int kKeyDepth, int kValueDepth, bool kDocuments>
__global__ __launch_bounds__((BackwardPipeline<kKeyDepth, kValueDepth>::kThreads),
                             1) void Sm90BackwardKernel(const __grid_constant__ Arguments args, const __grid_constant__ Launch launch,
                                                        const __grid_constant__ Maps maps) {
#if STF_HAS_WGMMA
  using Pipeline = BackwardPipeline<kKeyDepth, kValueDepth>;
  extern __shared__ __align__(kTileAlignment) char shared[];
  const Pipeline pipeline(shared);
  pipeline.Start();
  if (threadIdx.x >= Pipeline::kConsumers) {
    DeallocateRegisters<Pipeline::kProducerRegisters>();
    if (threadIdx.x < Pipeline::kConsumers + 32) {
      ProduceTiles<kDocuments>(pipeline, args, launch, maps);
    } else {
      ProduceStatistics<T, kDocuments>(pipeline, args, launch);
    }
    return;
  }
  AllocateRegisters<Pipeline::kConsumerRegisters>();
  BackwardMainloop<T, kKeyDepth, kValueDepth, kDocuments>(pipeline, args, launch).Run();
#endif
}

}  // namespace cuda
}  // namespace stf

#endif  // STF_CUSTOM_OPS_ATTENTION_CUDA_SM90_BACKWARD_CUH_
