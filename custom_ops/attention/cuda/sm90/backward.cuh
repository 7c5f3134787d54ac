// Backward in one pass, five products, for sequences in which a key reaches the queries of a few tiles alone: local windows, strided
// sequences, own blocks. A block of threads walks a run of keys, kBackwardKeys at a time, and of each the tiles of 64 queries that they
// reach. Gradients of keys and values stay in the registers of two warpgroups, a half of the keys each. The scores' gradients go to shared
// memory, where one of the two, in turn, finds there what both halves add to the query gradients of the tile; until the last of its keys
// has passed these wait in shared memory, each thread's part for itself.
//
// A run has query gradients of the positions that it has keys of: so it begins with keys of the run before, as far back as those queries
// reach, and visits queries of the run after. Nothing is added to memory, and the order of every sum is fixed.
#ifndef STF_CUSTOM_OPS_ATTENTION_CUDA_SM90_BACKWARD_CUH_
#define STF_CUSTOM_OPS_ATTENTION_CUDA_SM90_BACKWARD_CUH_

#include "custom_ops/attention/cuda/sm90/passes.cuh"

namespace stf {
namespace cuda {

// kBackwardKeys keys, and the tiles of queries that they visit.
struct __align__(16) KeyBlock {
  int batch, head, program, sequence;  // batch -1: there are no more
  int start, count, existing;          // of the view; rows of the sequence, in use or not
  int first, end;                      // keys: the first, and behind the last that exists
  int tile_begin, tile_end;            // tiles of queries
  int tile_new;                        // from here on, tiles that the run has not visited before
  int tile_stop;                       // from here on, tiles whose query gradients are another run's
  int keys;                            // whether the keys' gradients are this run's
  int slot;                            // plus a tile: which of the tiles that the block of threads visits, counted from 0
  int padding;

  __device__ View ViewOf(const Launch& launch) const { return {start, launch.stride, count}; }
  __device__ Head HeadOf(const Launch& launch) const { return {launch.components + launch.begin[program], launch.members[program]}; }
};

// The key blocks of a block of threads, one after another.
class KeyBlockWalk {
 public:
  __device__ KeyBlockWalk(const Arguments& args, const Launch& launch) : args_(args), launch_(launch), unit_(blockIdx.x) {}

  __device__ bool Next(KeyBlock* block) {
    while (true) {
      while (next_ >= end_) {
        if (unit_ >= launch_.work_tiles) return false;
        NextRun(block);
      }
      const Component& component = launch_.components[launch_.begin[block->program] + component_];
      const int index = next_++, last = min((index + 1) * kBackwardKeys, block->existing) - 1;
      const int reached = min(QueriesOf(component, last, block->count).high, block->count);
      block->first = index * kBackwardKeys;
      block->end = last + 1;
      block->tile_begin = max(index, run_) * (kBackwardKeys / 64);
      block->tile_end = max((reached + 63) / 64, (last + 64) / 64);  // the keys' own positions always: those are written here
      if (block->tile_end <= block->tile_begin) continue;
      block->tile_new = seen_;
      block->keys = index >= run_;
      seen_ = max(seen_, block->tile_end);
      return true;
    }
  }

 private:
  __device__ void NextRun(KeyBlock* block) {
    TileIndex work;
    const int tiles = seen_ - run_ * (kBackwardKeys / 64);  // of the run before
    visited_ += tiles;
    seen_ = run_ = next_ = end_ = 0;
    const bool exists = FindTile(args_, launch_, unit_, launch_.sequences, false, &work);
    unit_ += gridDim.x;
    if (!exists) return;
    const View view = FindView(args_, launch_, work.sequence, work.batch);
    block->batch = work.batch;
    block->head = work.head;
    block->program = work.program;
    block->sequence = work.sequence;
    block->start = view.start;
    block->count = view.count;
    block->existing = CountBelow(launch_, work.sequence, args_.positions);
    const int run = work.tile * launch_.run;
    if (run * kBackwardKeys >= block->existing) return;
    component_ = __ffsll(launch_.members[work.program]) - 1;
    run_ = run;
    end_ = min(run + launch_.run, (block->existing + kBackwardKeys - 1) / kBackwardKeys);
    next_ = min(run, KeysOf(work.components.components[component_], run * kBackwardKeys).low / kBackwardKeys);
    seen_ = run * (kBackwardKeys / 64);
    block->tile_stop = end_ * (kBackwardKeys / 64);
    block->slot = visited_ - seen_;
  }

  const Arguments& args_;
  const Launch& launch_;
  int unit_;
  int component_ = 0;                // of the program's
  int run_ = 0, next_ = 0, end_ = 0;  // key blocks: the first of the run, the next to visit, and behind the last
  int seen_ = 0;                     // behind the last tile that the run has visited
  int visited_ = 0;                  // tiles of the runs before
};

// An Sm90BackwardTile, and the addresses of its parts.
template <int kKeyDepth, int kValueDepth>
struct BackwardPipeline {
  static constexpr Sm90BackwardTile kTile = FindSm90BackwardTile({kKeyDepth, kValueDepth});
  static constexpr int kStages = kTile.stages, kSlots = kTile.slots(), kConsumers = 256, kThreads = kConsumers + 128;
  static constexpr int kRing = kTile.ring(), kScoreGrads = kTile.score_grads(), kSums = kTile.sums(), kStatistics = kTile.statistics();
  static constexpr int kKeyBlocks = kTile.key_blocks(), kBarriers = kTile.barriers();
  static constexpr int kProducerRegisters = 56, kConsumerRegisters = 224;
  static_assert(128 * kProducerRegisters + kConsumers * kConsumerRegisters <= 168 * kThreads, "what the block starts with");
  static_assert(sizeof(KeyBlock) == kKeyBlockBytes, "as planned");

  char* shared;
  uint32_t base;

  __device__ explicit BackwardPipeline(char* memory) : shared(memory), base(SharedAddress(memory)) {}
  __device__ uint32_t Own(uint32_t stage) const { return base + stage * kTile.own_bytes; }
  __device__ uint32_t Stage(uint32_t stage) const { return base + kRing + stage * kTile.stage_bytes; }
  __device__ uint32_t ScoreGrads(uint32_t buffer, int half) const {
    return base + kScoreGrads + (2 * buffer + half) * kScoreGradBytes;
  }
  __device__ float4* Accumulators(int tile) const {
    return reinterpret_cast<float4*>(shared + kSums + tile % kTile.accumulators * kTile.accumulator_bytes);
  }
  __device__ float* Statistics(int slot) const { return reinterpret_cast<float*>(shared + kStatistics) + slot * 2 * 64; }
  __device__ KeyBlock* BlockOf(uint32_t own) const { return reinterpret_cast<KeyBlock*>(shared + kKeyBlocks) + own; }
  __device__ uint32_t Full(uint32_t stage) const { return base + kBarriers + 8 * stage; }
  __device__ uint32_t Empty(uint32_t stage) const { return Full(kStages + stage); }
  __device__ uint32_t OwnFull(uint32_t stage) const { return Full(2 * kStages + stage); }
  __device__ uint32_t OwnEmpty(uint32_t stage) const { return Full(2 * kStages + 2 + stage); }
  __device__ uint32_t StatisticsFull(uint32_t slot) const { return Full(2 * kStages + 4 + slot); }

  __device__ void Start() const {
    if (threadIdx.x == 0) {
      for (int stage = 0; stage < kStages; stage++) {
        InitBarrier(Full(stage), 1);
        InitBarrier(Empty(stage), kConsumers / 32 * kWarpArrivals);
      }
      for (int stage = 0; stage < 2; stage++) {
        InitBarrier(OwnFull(stage), 1);
        InitBarrier(OwnEmpty(stage), kConsumers / 32 * kWarpArrivals);
      }
      for (int slot = 0; slot < kSlots; slot++) InitBarrier(StatisticsFull(slot), 3 * kWarpArrivals);
      asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
      FenceShared();
    }
    __syncthreads();
  }
};

// One warp: keys and values of the key blocks, queries and output gradients of the tiles.
template <int kKeyDepth, int kValueDepth>
__device__ inline void ProduceTiles(const BackwardPipeline<kKeyDepth, kValueDepth>& pipeline, const Arguments& args, const Launch& launch,
                                    const Maps& maps) {
  using Pipeline = BackwardPipeline<kKeyDepth, kValueDepth>;
  const bool first_lane = threadIdx.x % 32 == 0;
  PipelineState<2> own;
  PipelineState<Pipeline::kStages> state;
  KeyBlockWalk walk(args, launch);
  KeyBlock block = {};
  while (walk.Next(&block)) {
    const int variant = Variant(maps, block.sequence);
    WaitBarrier(pipeline.OwnEmpty(own.stage), own.phase ^ 1);
    if (first_lane) {
      const uint32_t tile = pipeline.Own(own.stage), full = pipeline.OwnFull(own.stage);
      auto index = [&](int row) { return block.first + row; };
      *pipeline.BlockOf(own.stage) = block;
      ArriveAndExpect(full, Pipeline::kTile.own_bytes);
      CopyRows<kKeyDepth, kBackwardKeys>(tile, maps.own[0][variant], 64, full, block.batch, block.head, block.sequence, index);
      CopyRows<kValueDepth, kBackwardKeys>(tile + Pipeline::kTile.own_key_bytes, maps.own[1][variant], 64, full, block.batch, block.head,
                                           block.sequence, index);
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
    }
  }
  WaitBarrier(pipeline.OwnEmpty(own.stage), own.phase ^ 1);
  if (first_lane) {
    pipeline.BlockOf(own.stage)->batch = -1;
    Arrive(pipeline.OwnFull(own.stage));
  }
}

// Three warps: log-sum-exp and delta of each tile that is new. The first launch of a call leaves delta for the others.
template <typename T, int kKeyDepth, int kValueDepth>
__device__ inline void ProduceStatistics(const BackwardPipeline<kKeyDepth, kValueDepth>& pipeline, const Arguments& args,
                                         const Launch& launch) {
  using Pipeline = BackwardPipeline<kKeyDepth, kValueDepth>;
  constexpr int kLanes = kValueDepth / 8, kRows = 32 / kLanes, kUnroll = 3;  // lanes of a row, rows of a warp at a time
  const int warp = threadIdx.x / 32 - Pipeline::kConsumers / 32 - 1, lane = threadIdx.x % 32;
  const int column = lane % kLanes * 8;
  PipelineState<2> own;
  KeyBlockWalk walk(args, launch);
  KeyBlock block = {};
  while (walk.Next(&block)) {
    const View view = block.ViewOf(launch);
    const int64_t statistics = StatisticsBase(args, block.batch, block.head);
    const T* const outputs = Base<const T>(args.output, block.batch, block.head) + column;
    const T* const grads = Base<const T>(args.output_grad, block.batch, block.head) + column;
    // Whoever read what is written over here has left the key block before the last one.
    WaitBarrier(pipeline.OwnEmpty(own.stage), own.phase ^ 1);
    own.Next();
    for (int t = max(block.tile_begin, block.tile_new); t < block.tile_end; t++) {
      const int slot = (block.slot + t) % Pipeline::kSlots;
      float* const sums = pipeline.Statistics(slot);
      for (int begin = warp * kRows; begin < 64; begin += 3 * kUnroll * kRows) {
        uint4 output[kUnroll], grad[kUnroll];
#pragma unroll
        for (int i = 0; i < kUnroll; i++) {
          const int row = begin + 3 * i * kRows + lane / kLanes, position = view.Position(64 * t + row);
          const bool used = launch.first && row < 64 && 64 * t + row < block.count && column < args.value_depth;
          output[i] = grad[i] = {};
          if (used) output[i] = *reinterpret_cast<const uint4*>(outputs + position * args.output.position_stride);
          if (used) grad[i] = *reinterpret_cast<const uint4*>(grads + position * args.output_grad.position_stride);
        }
#pragma unroll
        for (int i = 0; i < kUnroll; i++) {
          const int row = begin + 3 * i * kRows + lane / kLanes;
          const int64_t at = statistics + view.Position(64 * t + row);
          const bool used = row < 64 && 64 * t + row < block.count;
          const float sum = used ? args.log_sum_exp[at] : 0;
          const uint32_t x[4] = {output[i].x, output[i].y, output[i].z, output[i].w}, y[4] = {grad[i].x, grad[i].y, grad[i].z, grad[i].w};
          float delta = 0;
#pragma unroll
          for (int e = 0; e < 4; e++) {
            const float2 left = Unpack(x[e], T()), right = Unpack(y[e], T());
            delta = fmaf(left.x, right.x, fmaf(left.y, right.y, delta));
          }
#pragma unroll
          for (int other = kLanes / 2; other > 0; other /= 2) delta += __shfl_xor_sync(~0u, delta, other);
          if (lane % kLanes != 0 || row >= 64) continue;
          if (used && !launch.first) delta = args.delta[at];
          if (used && launch.first && args.log_sum_exp_grad) delta -= args.log_sum_exp_grad[at];
          if (launch.first && t < block.tile_stop && 64 * t + row < block.existing) args.delta[at] = delta;
          sums[row] = sum;
          sums[64 + row] = delta;
        }
      }
      __syncwarp();
      ArriveWarp(pipeline.StatisticsFull(slot));
    }
  }
}

// A warpgroup of the consumers.
template <typename T, int kKeyDepth, int kValueDepth>
__device__ inline void ConsumeKeyBlocks(const BackwardPipeline<kKeyDepth, kValueDepth>& pipeline, const Arguments& args,
                                        const Launch& launch) {
  using Pipeline = BackwardPipeline<kKeyDepth, kValueDepth>;
  using KeyTile = SharedTile<kKeyDepth, kBackwardKeys>;
  using ValueTile = SharedTile<kValueDepth, kBackwardKeys>;
  const int warpgroup = Uniform(threadIdx.x / 128), lane_row = threadIdx.x / 32 % 4 * 16 + threadIdx.x % 32 / 4;
  PipelineState<2> own;
  PipelineState<Pipeline::kStages> state;
  uint32_t buffer = 0;
  while (true) {
    WaitBarrier(pipeline.OwnFull(own.stage), own.phase);
    const KeyBlock block = *pipeline.BlockOf(own.stage);
    if (block.batch < 0) return;
    const View view = block.ViewOf(launch);
    const Head head = block.HeadOf(launch);
    const Context context = {args, head, view};
    const Component* const component = head.components + (__ffsll(head.members) - 1);
    const int begin = block.first + 64 * warpgroup;
    const uint32_t keys = Uniform(pipeline.Own(own.stage)), values = keys + Pipeline::kTile.own_key_bytes;
    if (args.lengths && block.count < begin + 64) {
      const int used = max(block.count - block.first, 64 * warpgroup);
      ClearRows<kKeyDepth, kBackwardKeys>(keys, used, 64 * warpgroup + 64);
      ClearRows<kValueDepth, kBackwardKeys>(values, used, 64 * warpgroup + 64);
      SyncWarpgroup();
    }
    WarpgroupMask<true, false> mask;
    mask.Find(component, view, begin, block.end);
    float key_sum[kKeyDepth / 8][4], value_sum[kValueDepth / 8][4];
    Clear(key_sum);
    Clear(value_sum);
    for (int t = block.tile_begin; t < block.tile_end; t++) {
      const int visit = block.slot + t;
      const uint32_t queries = Uniform(pipeline.Stage(state.stage)), grads = queries + Pipeline::kTile.stage_key_bytes;
      const float* const statistics = pipeline.Statistics(visit % Pipeline::kSlots);
      const WarpgroupSegment segment = {component, 64 * t, min(64, block.count - 64 * t)};
      // Whether query gradients of the tile are this run's, and this warpgroup's.
      const bool adds = t < block.tile_stop, mine = adds && t % 2 == warpgroup;
      WaitBarrier(pipeline.Full(state.stage), state.phase);
      WaitBarrier(pipeline.StatisticsFull(visit % Pipeline::kSlots), visit / Pipeline::kSlots & 1);
      if (args.lengths && segment.count < 64) {
        ClearRows<kKeyDepth, 64>(queries, max(segment.count, 0), 64);
        ClearRows<kValueDepth, 64>(grads, max(segment.count, 0), 64);
        SyncWarpgroup();
      }
      if (mask.Reaches(segment)) {
        WarpgroupAddKeyGrads<T, kKeyDepth, kValueDepth, kBackwardKeys, 64>(
            context, mask, segment, begin, block.end, keys + 64 * warpgroup * KeyTile::kRowBytes,
            values + 64 * warpgroup * ValueTile::kRowBytes, queries, grads, statistics, statistics + 64, key_sum, value_sum,
            [&](const auto& weights) {
              if (adds) StoreWeights(pipeline.ScoreGrads(buffer, warpgroup), weights);
            });
      } else if (adds) {
        StoreWeights(pipeline.ScoreGrads(buffer, warpgroup), {});
      }
      if (adds) {  // with two buffers: who is here has done with the one before this
        FenceShared();
        asm volatile("bar.sync %0, %1;" ::"n"(3), "n"(Pipeline::kConsumers) : "memory");
      }
      float query_sum[kKeyDepth / 8][4];
      if (mine) {
        Clear(query_sum);
        AddTransposed<T, kKeyDepth, kBackwardKeys, 2>(query_sum, pipeline.ScoreGrads(buffer, 0), keys);
      }
      if (adds) buffer ^= 1;
      __syncwarp();
      ArriveWarp(pipeline.Empty(state.stage));
      state.Next();
      if (!mine) continue;
      float4* const kept = pipeline.Accumulators(t) + threadIdx.x % 128;
      if (t < block.tile_new) {
#pragma unroll
        for (int b = 0; b < kKeyDepth / 8; b++) {
          const float4 before = kept[128 * b];
          query_sum[b][0] += before.x;
          query_sum[b][1] += before.y;
          query_sum[b][2] += before.z;
          query_sum[b][3] += before.w;
        }
      }
      if (t / 2 > block.first / kBackwardKeys) {  // further keys follow
#pragma unroll
        for (int b = 0; b < kKeyDepth / 8; b++) {
          kept[128 * b] = {query_sum[b][0], query_sum[b][1], query_sum[b][2], query_sum[b][3]};
        }
        continue;
      }
      T* rows[2];
      float* partial[2];
#pragma unroll
      for (int r = 0; r < 2; r++) {
        const int row = 64 * t + lane_row + 8 * r, position = view.Position(row);
        rows[r] = row < block.existing ? RowOf<T>(args.query_grad, block.batch, block.head, position) : nullptr;
        partial[r] = row < block.existing ? RowOf<float>(args.query_partial, block.batch, block.head, position) : nullptr;
      }
      Scale(query_sum, args.scale);
      StoreGradient<T, kKeyDepth>(query_sum, rows, partial, args.key_depth, true, launch.first, launch.last, launch.last);
    }
    __syncwarp();
    ArriveWarp(pipeline.OwnEmpty(own.stage));
    own.Next();
    if (!block.keys) continue;
    T* rows[2];
    float* partial[2];
    auto find_rows = [&](const stf_tensor& tensor, const stf_tensor& partials) {
#pragma unroll
      for (int r = 0; r < 2; r++) {
        const int row = begin + lane_row + 8 * r, position = view.Position(row);
        rows[r] = row < block.end ? RowOf<T>(tensor, block.batch, block.head, position) : nullptr;
        partial[r] = row < block.end ? RowOf<float>(partials, block.batch, block.head, position) : nullptr;
      }
    };
    Scale(key_sum, args.scale);
    find_rows(args.key_grad, args.key_partial);
    StoreGradient<T, kKeyDepth>(key_sum, rows, partial, args.key_depth, true, launch.key_first, launch.key_last, launch.key_write);
    find_rows(args.value_grad, args.value_partial);
    StoreGradient<T, kValueDepth>(value_sum, rows, partial, args.value_depth, true, launch.key_first, launch.key_last, launch.key_write);
  }
}

template <typename T, int kKeyDepth, int kValueDepth>
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
      ProduceTiles(pipeline, args, launch, maps);
    } else {
      ProduceStatistics<T>(pipeline, args, launch);
    }
    return;
  }
  AllocateRegisters<Pipeline::kConsumerRegisters>();
  ConsumeKeyBlocks<T>(pipeline, args, launch);
#endif
}

}  // namespace cuda
}  // namespace stf

#endif  // STF_CUSTOM_OPS_ATTENTION_CUDA_SM90_BACKWARD_CUH_
