// Short sequences, packed several to a block: each tensor's rows come to shared memory once and serve as queries and as keys, and backward
// needs one pass. A launch has a single component of kind STF_STRIDED (own blocks come as such too, in views of step 1).
#ifndef STF_CUSTOM_OPS_ATTENTION_CUDA_SM80_PACKED_CUH_
#define STF_CUSTOM_OPS_ATTENTION_CUDA_SM80_PACKED_CUH_

#include "custom_ops/attention/cuda/common/epilogue.cuh"
#include "custom_ops/attention/cuda/common/scheduler.cuh"
#include "custom_ops/attention/cuda/sm80/mainloop.cuh"

namespace stf {
namespace cuda {

template <typename T, int kKeyDepth, int kValueDepth, int kWarps>
struct Sm80PackedTile {
  static constexpr int kThreads = 32 * kWarps, kRows = 16 * kWarps;
  static constexpr int kKeyElements = kRows * kPitch<T, kKeyDepth>, kValueElements = kRows * kPitch<T, kValueDepth>;
  static constexpr int kForwardBytes = Sm80PackedBytes(kPackedForward, sizeof(T), {kKeyDepth, kValueDepth}, kRows);
  static constexpr int kBackwardBytes = Sm80PackedBytes(kPackedBackward, sizeof(T), {kKeyDepth, kValueDepth}, kRows);
  static_assert(kForwardBytes == sizeof(T) * (2 * kKeyElements + kValueElements), "as planned");
  static_assert(kBackwardBytes == 2 * sizeof(T) * (kKeyElements + kValueElements) + 2 * kRows * sizeof(float), "as planned");
};

// A warp's place: 16 rows, from `row` on, of one sequence.
struct PackedWarp {
  View view;
  int existing;  // positions that the sequence has; view.count of them are in use
  int row;       // of the sequence
  int tile_row;  // of the tile, where the sequence begins
};

// The sequence of a tile's row, and the row in it; -1 where there is none.
__device__ inline int PackedSequence(const Launch& launch, const TileIndex& work, int row, int* sequence_row) {
  const int packs = 1 + (launch.packed_rows <= 32), pack = packs == 2 ? row / 32 : 0;
  const int sequence = work.sequence * packs + pack;
  *sequence_row = row - pack * 32;
  return pack < packs && *sequence_row < launch.longest && sequence < launch.sequences ? sequence : -1;
}

// Position of a tile's row, or -1 where there is none.
__device__ inline int PackedPosition(const Launch& launch, const TileIndex& work, int length, int row) {
  int sequence_row;
  const int sequence = PackedSequence(launch, work, row, &sequence_row);
  const int position = sequence * launch.sequence_stride + sequence_row * launch.stride;
  return sequence >= 0 && position < length ? position : -1;
}

__device__ inline PackedWarp FindPackedWarp(const Arguments& args, const Launch& launch, const TileIndex& work) {
  const int warp_row = threadIdx.x / 32 * 16;
  PackedWarp warp = {{0, 1, 0}, 0, 0, 0};
  const int sequence = PackedSequence(launch, work, warp_row, &warp.row);
  if (sequence < 0) return warp;
  warp.view = FindView(args, launch, sequence, work.batch);
  warp.existing = CountBelow(launch, sequence, args.positions);
  warp.tile_row = warp_row - warp.row;
  return warp;
}

// The thread's two rows of a tensor; null where there is none.
template <typename T>
__device__ void PackedRows(T* (&rows)[2], const stf_tensor& tensor, const TileIndex& work, const PackedWarp& warp) {
#pragma unroll
  for (int r = 0; r < 2; r++) {
    const int row = warp.row + threadIdx.x % 32 / 4 + 8 * r;
    rows[r] = row < warp.existing ? Base<T>(tensor, work.batch, work.head) + warp.view.Position(row) * tensor.position_stride : nullptr;
  }
}

template <typename T, int kKeyDepth, int kValueDepth, int kWarps, bool kPartial>
__global__ __launch_bounds__(32 * kWarps) void Sm80PackedForwardKernel(const __grid_constant__ Arguments args,
                                                                       const __grid_constant__ Launch launch) {
  using Tile = Sm80PackedTile<T, kKeyDepth, kValueDepth, kWarps>;
  extern __shared__ __align__(1024) char shared[];
  T* const queries = reinterpret_cast<T*>(shared);
  T* const keys = queries + Tile::kKeyElements;
  T* const values = keys + Tile::kKeyElements;

  TileIndex work;
  if (!FindTile(args, launch, blockIdx.x, launch.tiles, false, &work)) return;
  const Head& head = work.components;
  const int length = Length(args, work.batch);
  auto place = [&](int row) { return PackedPosition(launch, work, length, row); };
  LoadHead<T, kKeyDepth, Tile::kRows, Tile::kThreads>(queries, args.query, args, work.batch, work.head, args.key_depth, place);
  LoadHead<T, kKeyDepth, Tile::kRows, Tile::kThreads>(keys, args.key, args, work.batch, work.key_head, args.key_depth, place);
  LoadHead<T, kValueDepth, Tile::kRows, Tile::kThreads>(values, args.value, args, work.batch, work.key_head, args.value_depth, place);
  CommitCopies();

  const PackedWarp warp = FindPackedWarp(args, launch, work);
  const Context context = {args, head, warp.view};
  auto position = [&](int row) { return row < warp.existing ? warp.view.Position(row) : -1; };
  const int lane_row = warp.row + threadIdx.x % 32 / 4;
  auto find_rows = [&]() {  // anew where they are needed: registers are few between
    return OutputRows<T, kValueDepth, kPartial>(args, work.batch, work.head, {position(lane_row), position(lane_row + 8)});
  };
  Softmax<T, kKeyDepth, kValueDepth> softmax;
  if (launch.first) {
    softmax.Start(args.sinks, work.head);
  } else {
    find_rows().Continue(&softmax, args, args.vector);
  }
  WaitForCopies<0>();
  __syncthreads();
  if (warp.row >= warp.existing) return;
  const Component component = head.components[__ffsll(head.members) - 1];
  const int rows = min(warp.row + 16, warp.view.count);
  constexpr int kKeys = kWarps == 4 ? 64 : 32;
  for (int begin = 0; begin < rows; begin += kKeys) {
    const Segment segment = {component, begin, min(kKeys, rows - begin)};
    Attend<kKeys>(&softmax, context, segment, warp.row, rows, queries + (warp.tile_row + warp.row) * kPitch<T, kKeyDepth>,
                  keys + (warp.tile_row + begin) * kPitch<T, kKeyDepth>, values + (warp.tile_row + begin) * kPitch<T, kValueDepth>);
  }
  softmax.Finish();
  find_rows().Store(&softmax, args, launch, args.vector);
}

template <typename T, int kKeyDepth, int kValueDepth, int kWarps>
__global__ __launch_bounds__(32 * kWarps) void Sm80PackedBackwardKernel(const __grid_constant__ Arguments args,
                                                                        const __grid_constant__ Launch launch) {
  using Tile = Sm80PackedTile<T, kKeyDepth, kValueDepth, kWarps>;
  extern __shared__ __align__(1024) char shared[];
  T* const queries = reinterpret_cast<T*>(shared);
  T* const keys = queries + Tile::kKeyElements;
  T* const values = keys + Tile::kKeyElements;
  T* const grads = values + Tile::kValueElements;
  float* const log_sum_exps = reinterpret_cast<float*>(grads + Tile::kValueElements);
  float* const deltas = log_sum_exps + Tile::kRows;

  TileIndex work;
  if (!FindTile(args, launch, blockIdx.x, launch.tiles, false, &work)) return;
  const Head& head = work.components;
  const int length = Length(args, work.batch);
  auto place = [&](int row) { return PackedPosition(launch, work, length, row); };
  LoadHead<T, kValueDepth, Tile::kRows, Tile::kThreads>(grads, args.output_grad, args, work.batch, work.head, args.value_depth, place);
  CommitCopies();
  LoadHead<T, kKeyDepth, Tile::kRows, Tile::kThreads>(queries, args.query, args, work.batch, work.head, args.key_depth, place);
  LoadHead<T, kKeyDepth, Tile::kRows, Tile::kThreads>(keys, args.key, args, work.batch, work.key_head, args.key_depth, place);
  LoadHead<T, kValueDepth, Tile::kRows, Tile::kThreads>(values, args.value, args, work.batch, work.key_head, args.value_depth, place);
  CommitCopies();

  const int64_t statistics = StatisticsBase(args, work.batch, work.head);
  const int warp_row = threadIdx.x / 32 * 16;
  for (int row = threadIdx.x; row < Tile::kRows; row += Tile::kThreads) {
    const int position = place(row);
    log_sum_exps[row] = position < 0 ? 0 : args.log_sum_exp[statistics + position];
  }
  WaitForCopies<1>();
  __syncthreads();
  if (launch.first) {
    SumProducts<T, kValueDepth>(deltas + warp_row, grads + warp_row * kPitch<T, kValueDepth>,
                                Base<const T>(args.output, work.batch, work.head), args.output.position_stride, args.value_depth,
                                args.vector, [&](int row) { return place(warp_row + row); });
    __syncwarp();
  }
  if (threadIdx.x % 32 < 16) {
    const int row = warp_row + threadIdx.x % 32, position = place(row);
    if (!launch.first) {
      deltas[row] = position < 0 ? 0 : args.delta[statistics + position];
    } else if (position >= 0) {
      if (args.log_sum_exp_grad) deltas[row] -= args.log_sum_exp_grad[statistics + position];
      args.delta[statistics + position] = deltas[row];
    }
  }
  WaitForCopies<0>();
  __syncthreads();

  const PackedWarp warp = FindPackedWarp(args, launch, work);
  if (warp.row >= warp.existing) return;
  const Context context = {args, head, warp.view};
  const Component component = head.components[__ffsll(head.members) - 1];
  const int rows = min(warp.row + 16, warp.view.count), base = warp.tile_row, own = warp.tile_row + warp.row;
  constexpr int kColumns = 32;
  T* targets[2];
  float* partial[2];
  {
    float sum[kKeyDepth / 8][4], log_sum_exp[2], delta[2];
    Clear(sum);
#pragma unroll
    for (int r = 0; r < 2; r++) {
      log_sum_exp[r] = log_sum_exps[own + threadIdx.x % 32 / 4 + 8 * r];
      delta[r] = deltas[own + threadIdx.x % 32 / 4 + 8 * r];
    }
    for (int begin = 0; begin < rows; begin += kColumns) {
      const Segment segment = {component, begin, min(kColumns, rows - begin)};
      AddQueryGrad<T, kKeyDepth, kValueDepth, kColumns>(context, segment, warp.row, rows, queries + own * kPitch<T, kKeyDepth>,
                                                        grads + own * kPitch<T, kValueDepth>, keys + (base + begin) * kPitch<T, kKeyDepth>,
                                                        values + (base + begin) * kPitch<T, kValueDepth>, log_sum_exp, delta, sum);
    }
    Scale(sum, args.scale);
    PackedRows(targets, args.query_grad, work, warp);
    PackedRows(partial, args.query_partial, work, warp);
    StoreGradient<T, kKeyDepth>(sum, targets, partial, args.key_depth, args.vector, launch.first, launch.last, launch.last);
  }
  float key_sum[kKeyDepth / 8][4], value_sum[kValueDepth / 8][4];
  Clear(key_sum);
  Clear(value_sum);
  for (int begin = warp.row / kColumns * kColumns; begin < warp.view.count; begin += kColumns) {
    const Segment segment = {component, begin, min(kColumns, warp.view.count - begin)};
    AddKeyGrads<T, kKeyDepth, kValueDepth, kColumns, kBoth>(
        context, segment, warp.row, rows, keys + own * kPitch<T, kKeyDepth>, values + own * kPitch<T, kValueDepth>,
        queries + (base + begin) * kPitch<T, kKeyDepth>, grads + (base + begin) * kPitch<T, kValueDepth>, log_sum_exps + base + begin,
        deltas + base + begin, key_sum, value_sum);
  }
  Scale(key_sum, args.scale);
  PackedRows(targets, args.key_grad, work, warp);
  PackedRows(partial, args.key_partial, work, warp);
  StoreGradient<T, kKeyDepth>(key_sum, targets, partial, args.key_depth, args.vector, launch.key_first, launch.key_last, launch.key_write);
  PackedRows(targets, args.value_grad, work, warp);
  PackedRows(partial, args.value_partial, work, warp);
  StoreGradient<T, kValueDepth>(value_sum, targets, partial, args.value_depth, args.vector, launch.key_first, launch.key_last,
                                launch.key_write);
}

}  // namespace cuda
}  // namespace stf

#endif  // STF_CUSTOM_OPS_ATTENTION_CUDA_SM80_PACKED_CUH_
