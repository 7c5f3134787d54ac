// The pipeline: a producer warp has Hopper's copy engine (TMA) fill a ring of stages ahead of the consumers, which are warpgroups, and
// barriers in shared memory say when a stage is full and when it is empty again. Blocks of a persistent launch stay for several tiles of
// rows, and the ring does not stop between them.
#ifndef STF_CUSTOM_OPS_ATTENTION_CUDA_SM90_PIPELINE_CUH_
#define STF_CUSTOM_OPS_ATTENTION_CUDA_SM90_PIPELINE_CUH_

#include "custom_ops/attention/cuda/sm90/mask.cuh"
#include "custom_ops/attention/cuda/sm90/wgmma.cuh"

namespace stf {
namespace cuda {

// Barriers, 8 bytes of shared memory each.
__device__ inline void InitBarrier(uint32_t barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

__device__ inline void Arrive(uint32_t barrier) { asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory"); }

// A warp arrives, by one lane once all are here; where STF_RACECHECK is defined each does: compute-sanitizer's racecheck knows of what the
// arriving thread alone has read.
#ifdef STF_RACECHECK
constexpr int kWarpArrivals = 32;
#else
constexpr int kWarpArrivals = 1;
#endif
__device__ inline void ArriveWarp(uint32_t barrier) {
  if (kWarpArrivals > 1 || threadIdx.x % 32 == 0) Arrive(barrier);
}

// Arrives, and has the barrier wait for so many bytes of the copy engine.
__device__ inline void ArriveAndExpect(uint32_t barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

// Arrives once this thread's copies (CopyAsync) so far are there.
__device__ inline void ArriveAfterCopies(uint32_t barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(barrier) : "memory");
}

__device__ inline void WaitBarrier(uint32_t barrier, uint32_t phase) {
  asm volatile(
      "{\n.reg .pred done;\nWAIT:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n@done bra DONE;\nbra WAIT;\nDONE:\n}\n" ::"r"(
          barrier),
      "r"(phase)
      : "memory");
}

// A stage of a ring; the phase changes with every round.
template <int kStages>
struct PipelineState {
  uint32_t stage = 0, phase = 0;
  __device__ void Next() {
    if (++stage == kStages) {
      stage = 0;
      phase ^= 1;
    }
  }
};

// Copies rows of one head to a tile: kRows of them, `box` at a time (what the map was made for), each time from index(row) on, of the
// numbering that the map has. For one thread.
template <int kDepth, int kRows, typename Index>
__device__ inline void CopyRows(uint32_t tile, const TensorMap& map, int box, uint32_t barrier, int batch, int head, int sequence,
                                Index index) {
  using Tile = SharedTile<kDepth, kRows>;
  constexpr int kPanels = Tile::kBytes / Tile::kPanel;
  for (int row = 0; row < kRows; row += box) {
    const int at = index(row);
#pragma unroll
    for (int panel = 0; panel < kPanels; panel++) {
      asm volatile(
          "cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6, %7}], [%2];" ::"r"(
              tile + panel * Tile::kPanel + row * Tile::kRowBytes),
          "l"(&map), "r"(barrier), "r"(panel * Tile::kRowBytes / 2), "r"(sequence), "r"(at), "r"(head), "r"(batch)
          : "memory");
    }
  }
}

// 16 bytes of shared memory.
__device__ inline uint4 LoadShared(uint32_t address) {
  uint4 x;
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];" : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w) : "r"(address) : "memory");
  return x;
}

// Rows of a tile from `begin` on become zeros. For a warpgroup, whose tensor cores may read them after that.
template <int kDepth, int kRows>
__device__ inline void ClearRows(uint32_t tile, int begin, int end) {
  using Tile = SharedTile<kDepth, kRows>;
  for (int i = threadIdx.x % 128; i < (end - begin) * Tile::kChunks; i += 128) {
    const uint32_t at = tile + Tile::Offset(begin + i / Tile::kChunks, i % Tile::kChunks);
    asm volatile("st.shared.v4.b32 [%0], {%1, %1, %1, %1};" ::"r"(at), "r"(0) : "memory");
  }
}

// The warpgroup's threads wait for one another.
__device__ inline void WaitForWarpgroup() { asm volatile("bar.sync %0, 128;" ::"r"(1 + threadIdx.x / 128) : "memory"); }

// The same; what they wrote to shared memory may then be read by its tensor cores.
__device__ inline void SyncWarpgroup() {
  FenceShared();
  WaitForWarpgroup();
}

// What the producer says of a stage.
struct __align__(16) StageInfo {
  int component, begin, count, flags;  // component: of the head's; count 0: nothing to do
};
enum StageFlag { kLastStage = 1, kClearUnused = 2 };  // of a tile's notes; whether rows of the stage are to become zeros

// A tile of rows: queries, or keys where kByKey. As the producer finds it.
struct __align__(16) WorkTile {
  int batch, head, program;   // batch -1: there are no more
  int existing, used, first;  // rows of the sequence, and those in use; the tile's first
  int start, count;           // of the view
  int end;                    // of the tile's rows; by queries: of those in use
  int sequence, key_head;
  int cut;  // whether documents leave out keys (by keys: queries) of its rows

  // False where there is nothing to do.
  template <bool kByKey>
  __device__ bool Find(const Arguments& args, const Launch& launch, int unit, int rows) {
    TileIndex work;
    if (!FindTile(args, launch, unit, launch.sequences, !kByKey, &work)) return false;
    batch = work.batch;
    head = work.head;
    key_head = work.key_head;
    program = work.program;
    sequence = work.sequence;
    const View view = FindView(args, launch, sequence, batch);
    start = view.start;
    count = used = view.count;
    first = work.tile * rows;
    if (kByKey) {
      const Component numbering = Numbering(launch);
      existing = CountKeys(launch, numbering, sequence, args.positions);
      used = CountKeys(launch, numbering, sequence, Length(args, batch));
    } else {
      existing = CountBelow(launch, sequence, args.positions);
    }
    end = min(first + rows, kByKey ? existing : used);
    return first < existing;
  }

  __device__ View ViewOf(const Launch& launch) const { return {start, launch.stride, count}; }
  // The same with documents, where those matter.
  template <bool kDocuments>
  __device__ View ViewOf(const Arguments& args, const Launch& launch) const {
    return {start, launch.stride, count, kDocuments && cut ? DocumentsOf(args, batch) : nullptr};
  }
  template <bool kByKey>
  __device__ void FindCut(const Arguments& args, const Launch& launch) {
    const View view = {start, launch.stride, count, DocumentsOf(args, batch)};
    const Head of = HeadOf(launch);
    cut = 0;
    for (uint64_t left = first < end ? of.members : 0; left; left &= left - 1) {
      const Component& c = of.components[__ffsll(left) - 1];
      cut |= kByKey ? !KeepsQueries(c, view, first, end - 1) : !KeepsKeys(c, view, first, end - 1);
      // What it leaves out may count from the document though it does not, and belong to another launch.
      for (uint64_t out = c.exclude; out; out &= out - 1) cut |= Restarts(of.components[__ffsll(out) - 1]);
    }
  }
  __device__ Head HeadOf(const Launch& launch) const { return {launch.components + launch.begin[program], launch.members[program]}; }

  // The component whose numbering of keys a launch by keys has.
  __device__ Component Numbering(const Launch& launch) const {
    const Head of = HeadOf(launch);
    return of.members ? of.components[__ffsll(of.members) - 1] : Component{STF_CAUSAL};
  }
};

// Shared memory of a block and registers of its threads: an Sm90Tile.
template <Pass kPass, int kKeyDepth, int kValueDepth>
struct KernelTile {
  static constexpr Sm90Tile kTile = FindSm90Tile(kPass, {kKeyDepth, kValueDepth});
  static constexpr int kWarpgroups = kTile.warpgroups, kBlocks = kTile.blocks;
  static constexpr int kConsumers = 128 * kWarpgroups, kThreads = kConsumers + 128, kRows = kTile.rows();
  // Registers of a thread: at the start, of the producer, of the consumers. A multiprocessor has 512 for each thread of a warpgroup.
  static constexpr int kStartRegisters = 512 / (kBlocks * (kWarpgroups + 1)) / 8 * 8, kProducerRegisters = 32;
  static constexpr int kLeft = (kStartRegisters * (kWarpgroups + 1) - kProducerRegisters) / kWarpgroups / 8 * 8,
                       kConsumerRegisters = kLeft < 240 ? kLeft : 240;
  static constexpr int kOwnKeyBytes = kTile.own_key_bytes, kOwnBytes = kTile.own_bytes;
  static constexpr int kStageKeyBytes = kTile.stage_key_bytes, kStageBytes = kTile.stage_bytes;
  static constexpr int kOwnStages = kTile.own_stages, kStages = kTile.stages;
  static constexpr int kRing = kTile.ring(), kStatistics = kTile.statistics(), kStageInfos = kTile.stage_infos(),
                       kWorkTiles = kTile.work_tiles();
  static constexpr int kBarriers = kTile.barriers(), kBytes = kTile.bytes();
  static_assert(sizeof(StageInfo) == kStageInfoBytes && sizeof(WorkTile) == kWorkTileBytes, "as planned");
};

// The addresses of all that.
template <typename Tile>
struct Pipeline {
  char* shared;
  uint32_t base;

  __device__ explicit Pipeline(char* memory) : shared(memory), base(SharedAddress(memory)) {}
  __device__ uint32_t Own(uint32_t stage) const { return base + stage * Tile::kOwnBytes; }
  __device__ uint32_t Stage(uint32_t stage) const { return base + Tile::kRing + stage * Tile::kStageBytes; }
  __device__ float* Statistics(uint32_t stage) const {
    return reinterpret_cast<float*>(shared + Tile::kStatistics) + stage * 2 * kStageRows;
  }
  __device__ StageInfo* InfoOf(uint32_t stage) const { return reinterpret_cast<StageInfo*>(shared + Tile::kStageInfos) + stage; }
  __device__ WorkTile* WorkTileOf(uint32_t own) const { return reinterpret_cast<WorkTile*>(shared + Tile::kWorkTiles) + own; }
  __device__ uint32_t Full(uint32_t stage) const { return base + Tile::kBarriers + 8 * stage; }
  __device__ uint32_t Empty(uint32_t stage) const { return Full(Tile::kStages + stage); }
  __device__ uint32_t OwnFull(uint32_t stage) const { return Full(2 * Tile::kStages + stage); }
  __device__ uint32_t OwnEmpty(uint32_t stage) const { return Full(2 * Tile::kStages + Tile::kOwnStages + stage); }

  // `fills`: arrivals that make a stage full.
  __device__ void Start(int fills) const {
    if (threadIdx.x == 0) {
      for (int stage = 0; stage < Tile::kStages; stage++) {
        InitBarrier(Full(stage), fills);
        InitBarrier(Empty(stage), Tile::kConsumers / 32 * kWarpArrivals);
      }
      for (int stage = 0; stage < Tile::kOwnStages; stage++) {
        InitBarrier(OwnFull(stage), 1);
        InitBarrier(OwnEmpty(stage), Tile::kConsumers / 32 * kWarpArrivals);
      }
      asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
      FenceShared();
    }
    __syncthreads();
  }
};

// Registers are handed from the producer's warpgroup to the consumers.
template <int kRegisters>
__device__ inline void DeallocateRegisters() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ inline void AllocateRegisters() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// The producer warp. copy_own(work_tile, tile, barrier) and copy(work_tile, segment, tile, full) are called by lane 0, and by all lanes
// copy_more(work_tile, segment, stage, full), which arrives 32 times if at all.
template <typename Tile, bool kByKey, bool kGeneral, bool kDocuments, typename CopyOwn, typename Copy, typename CopyMore>
__device__ inline void Produce(const Pipeline<Tile>& pipeline, const Arguments& args, const Launch& launch, CopyOwn copy_own, Copy copy,
                               CopyMore copy_more) {
  const bool first_lane = threadIdx.x % 32 == 0;
  PipelineState<Tile::kOwnStages> own;
  PipelineState<Tile::kStages> state;
  WorkTile work_tile;
  for (int unit = blockIdx.x; unit < launch.work_tiles; unit += gridDim.x) {
    if (!work_tile.Find<kByKey>(args, launch, unit, Tile::kRows)) continue;
    if (kDocuments) work_tile.FindCut<kByKey>(args, launch);
    WaitBarrier(pipeline.OwnEmpty(own.stage), own.phase ^ 1);
    if (first_lane) {
      *pipeline.WorkTileOf(own.stage) = work_tile;
      ArriveAndExpect(pipeline.OwnFull(own.stage), Tile::kOwnBytes);
      copy_own(work_tile, pipeline.Own(own.stage), pipeline.OwnFull(own.stage));
    }
    own.Next();
    const View view = work_tile.ViewOf<kDocuments>(args, launch);
    const Head head = work_tile.HeadOf(launch);
    const Context context = {args, head, view};
    WarpgroupWalk<kByKey, kGeneral> walk(context, work_tile.first, work_tile.end - 1);
    WarpgroupSegment next = {};
    bool more = walk.Next(&next);
    do {
      const bool any = more;
      const WarpgroupSegment segment = any ? next : WarpgroupSegment{};
      more = any && walk.Next(&next);
      WaitBarrier(pipeline.Empty(state.stage), state.phase ^ 1);
      const uint32_t full = pipeline.Full(state.stage);
      copy_more(work_tile, segment, state.stage, full);
      if (first_lane) {
        const int component = any ? static_cast<int>(segment.component - head.components) : 0;
        const int flags = (more ? 0 : kLastStage) | (args.lengths && segment.count < kStageRows ? kClearUnused : 0);
        *pipeline.InfoOf(state.stage) = {component, segment.begin, segment.count, flags};
        if (any) {
          ArriveAndExpect(full, Tile::kStageBytes);
          copy(work_tile, segment, pipeline.Stage(state.stage), full);
        } else {
          Arrive(full);
        }
      }
      state.Next();
    } while (more);
  }
  WaitBarrier(pipeline.OwnEmpty(own.stage), own.phase ^ 1);
  if (first_lane) {
    pipeline.WorkTileOf(own.stage)->batch = -1;
    Arrive(pipeline.OwnFull(own.stage));
  }
}

// A warpgroup's turns through the segments of one job: use(note, stage).
template <typename Tile, typename Use>
__device__ inline void Consume(const Pipeline<Tile>& pipeline, PipelineState<Tile::kStages>* state, Use use) {
  while (true) {
    WaitBarrier(pipeline.Full(state->stage), state->phase);
    const StageInfo info = *pipeline.InfoOf(state->stage);
    if (info.count) use(info, state->stage);
    __syncwarp();
    ArriveWarp(pipeline.Empty(state->stage));
    state->Next();
    if (info.flags & kLastStage) return;
  }
}

}  // namespace cuda
}  // namespace stf

#endif  // STF_CUSTOM_OPS_ATTENTION_CUDA_SM90_PIPELINE_CUH_
