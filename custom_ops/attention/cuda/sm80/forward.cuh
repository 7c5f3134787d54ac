// Forward: a block takes a tile of queries and visits the tiles of keys that they may attend to, of all of the launch's components, with
// one online softmax. A later launch goes on from the output and log-sum-exp of an earlier one.
#ifndef STF_CUSTOM_OPS_ATTENTION_CUDA_SM80_FORWARD_CUH_
#define STF_CUSTOM_OPS_ATTENTION_CUDA_SM80_FORWARD_CUH_

#include "custom_ops/attention/cuda/common/epilogue.cuh"
#include "custom_ops/attention/cuda/common/scheduler.cuh"
#include "custom_ops/attention/cuda/sm80/mainloop.cuh"

namespace stf {
namespace cuda {

// Shared memory: the block's queries, then stages of keys and values.
template <typename T, int kKeyDepth, int kValueDepth, int kWarps, int kVisited, int kTileStages>
struct Sm80ForwardTile {
  static constexpr int kThreads = 32 * kWarps, kQueries = 16 * kWarps, kKeys = kVisited, kStages = kTileStages;
  static constexpr int kKeyElements = kKeys * kPitch<T, kKeyDepth>, kValueElements = kKeys * kPitch<T, kValueDepth>;
  static constexpr int kStage = kKeyElements + kValueElements;  // elements
  static constexpr int kQueryElements = kQueries * kPitch<T, kKeyDepth>;
  static constexpr int kBytes = sizeof(T) * (kQueryElements + kStages * kStage);
  static_assert(kBytes == Sm80Bytes(kForward, sizeof(T), {kKeyDepth, kValueDepth}, {kWarps, kVisited, kStages}), "as planned");
};

template <typename T, int kKeyDepth, int kValueDepth, int kWarps, int kVisited, int kStages, bool kPartial>
__global__ __launch_bounds__(128, (kValueDepth <= 64    ? 4
                                   : kValueDepth <= 128 ? 3
                                                        : 1)) void Sm80ForwardKernel(const __grid_constant__ Arguments args,
                                                                                     const __grid_constant__ Launch launch) {
  using Tile = Sm80ForwardTile<T, kKeyDepth, kValueDepth, kWarps, kVisited, kStages>;
  extern __shared__ __align__(1024) char shared[];
  T* const queries = reinterpret_cast<T*>(shared);
  T* const stages = queries + Tile::kQueryElements;

  TileIndex work;
  if (!FindTile(args, launch, blockIdx.x, launch.sequences, true, &work)) return;
  const View view = FindView(args, launch, work.sequence, work.batch);
  const int existing = CountBelow(launch, work.sequence, args.positions);
  const int first = work.tile * Tile::kQueries;
  if (first >= existing) return;
  const int end = min(first + Tile::kQueries, view.count);
  const Head& head = work.components;
  const Context context = {args, head, view};

  const T* query = Base<const T>(args.query, work.batch, work.head);
  const T* key = Base<const T>(args.key, work.batch, work.key_head);
  const T* value = Base<const T>(args.value, work.batch, work.key_head);
  LoadRows<T, kKeyDepth, Tile::kQueries, Tile::kThreads>(queries, query, args.query.position_stride, args.key_depth, args.vector,
                                                         [&](int row) { return first + row < end ? view.Position(first + row) : -1; });
  auto load = [&](const Segment& segment, int stage) {
    auto place = [&](int row) { return row < segment.count ? KeyPosition(segment.component, view, segment.begin + row) : -1; };
    T* const to = stages + stage * Tile::kStage;
    LoadRows<T, kKeyDepth, Tile::kKeys, Tile::kThreads>(to, key, args.key.position_stride, args.key_depth, args.vector, place);
    LoadRows<T, kValueDepth, Tile::kKeys, Tile::kThreads>(to + Tile::kKeyElements, value, args.value.position_stride, args.value_depth,
                                                          args.vector, place);
  };

  const int warp_row = threadIdx.x / 32 * 16, lane_row = warp_row + threadIdx.x % 32 / 4;
  auto position = [&](int row) { return row < existing ? view.Position(row) : -1; };
  auto find_rows = [&]() {  // anew where they are needed: registers are few between
    return OutputRows<T, kValueDepth, kPartial>(args, work.batch, work.head, {position(first + lane_row), position(first + lane_row + 8)});
  };
  Softmax<T, kKeyDepth, kValueDepth> softmax;
  if (launch.first) {
    softmax.Start(args.sinks, work.head);
  } else {
    find_rows().Continue(&softmax, args, args.vector);
  }

  ForEachSegment<Tile::kStages>(
      Walk<false, Tile::kKeys>(args, head, view, first, end - 1), load, []() {},
      [&](const Segment& segment, int stage) {
        const T* keys = stages + stage * Tile::kStage;
        Attend<Tile::kKeys>(&softmax, context, segment, first + warp_row, end, queries + warp_row * kPitch<T, kKeyDepth>, keys,
                            keys + Tile::kKeyElements);
      });
  softmax.Finish();
  find_rows().Store(&softmax, args, launch, args.vector);
}

}  // namespace cuda
}  // namespace stf

#endif  // STF_CUSTOM_OPS_ATTENTION_CUDA_SM80_FORWARD_CUH_
