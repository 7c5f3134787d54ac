// sm80/packed.cuh for a warpgroup: short sequences, as many to a block as its tile has rows for, one after another. Each tensor's rows come
// to shared memory once and serve as queries and as keys, and backward needs one pass. One warpgroup a block, which takes the tile's rows
// 64 at a time. A launch has a single component of kind STF_STRIDED that leaves nothing out.
#ifndef STF_CUSTOM_OPS_ATTENTION_CUDA_SM90_PACKED_CUH_
#define STF_CUSTOM_OPS_ATTENTION_CUDA_SM90_PACKED_CUH_

#include "custom_ops/attention/cuda/sm90/passes.cuh"

namespace stf {
namespace cuda {

constexpr int kPackedThreads = 128;

template <int kKeyDepth, int kValueDepth, int kRows>
struct Sm90PackedTile {
  static constexpr int kKeyBytes = SharedTile<kKeyDepth, kRows>::kBytes, kValueBytes = SharedTile<kValueDepth, kRows>::kBytes;
  static constexpr int kForwardBytes = Sm90PackedBytes(kPackedForward, {kKeyDepth, kValueDepth}, kRows);
  static constexpr int kScoreGrads = 2 * (kKeyBytes + kValueBytes), kStatistics = kScoreGrads + kRows / 64 * kScoreGradBytes;
  static constexpr int kBackwardBytes = Sm90PackedBytes(kPackedBackward, {kKeyDepth, kValueDepth}, kRows);
  static_assert(kForwardBytes == 2 * kKeyBytes + kValueBytes, "as planned");
  static_assert(kBackwardBytes == kStatistics + 2 * kRows * sizeof(float), "as planned");
};

// The sequences of a tile: each takes launch.packed_rows rows, those from `rows` on are nobody's.
struct Packs {
  int length, rows, sequence, reciprocal;

  __device__ Packs(const Launch& launch, const TileIndex& work, int tile_rows)
      : length(launch.packed_rows), sequence(work.sequence * (tile_rows / length)), reciprocal((65535 + length) / length) {
    rows = min(tile_rows / length, launch.sequences - sequence) * length;
  }
  __device__ int Pack(int row) const { return row * reciprocal >> 16; }  // row / length, for row <= 128

  // Position of a row; positions from `end` on, and rows of nobody, give -1.
  __device__ int Position(const Launch& launch, int row, int end) const {
    const int pack = Pack(row), position = (sequence + pack) * launch.sequence_stride + (row - pack * length) * launch.stride;
    return row < rows && position < end ? position : -1;
  }

  // Rows of the tile where a row's sequence begins, and where its positions in use end.
  __device__ Interval Of(const Launch& launch, int row, int end) const {
    const int pack = Pack(row), start = (sequence + pack) * launch.sequence_stride;
    const int count = end <= start ? 0 : min(length, (end - start - 1) / launch.stride + 1);
    return {pack * length, pack * length + count};
  }

  // Cuts a row's interval, of the sequence that begins at row `begin` of the tile, to its document.
  template <bool kByKey>
  __device__ void Cut(const Launch& launch, const int32_t* documents, int row, int begin, Interval* interval) const {
    const View view = {(sequence + Pack(row)) * launch.sequence_stride, launch.stride, length, documents};
    const int position = view.Position(row - begin);
    if (kByKey) {
      interval->high = min(interval->high, begin + view.Before(view.EndOfQueries(position)));
    } else {
      interval->low = max(interval->low, begin + view.Before(view.FirstKey(position)));
    }
  }
};

// WarpgroupMask of packed rows [warpgroup_begin, warpgroup_begin + 64): queries see keys of their own sequence, `distance` or more before
// them.
template <bool kByKey, bool kDocuments>
__device__ inline void FindPackedMask(WarpgroupMask<kByKey, false>* mask, const Component* component, const Arguments& args,
                                      const Launch& launch, int batch, const Packs& packs, int warpgroup_begin, int end) {
  mask->component = component;
  mask->common = kNothing;
  const int last = min(warpgroup_begin + 63, packs.rows - 1), distance = component->b;
  mask->reach = {0, 0};
  if (last >= warpgroup_begin) {
    mask->reach = kByKey ? Interval{warpgroup_begin, packs.Of(launch, last, end).high}
                         : Interval{packs.Of(launch, warpgroup_begin, end).low, last + 1};
  }
#pragma unroll
  for (int r = 0; r < 2; r++) {
    const int row = warpgroup_begin + threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4 + 8 * r;
    const Interval sequence = packs.Of(launch, row, end);
    const bool used = row < packs.rows && row < sequence.high;
    mask->rows[r] = !used ? Interval{0, 0} : kByKey ? Interval{row + distance, sequence.high} : Interval{sequence.low, row + 1 - distance};
    if (kDocuments && args.documents && used) packs.Cut<kByKey>(launch, DocumentsOf(args, batch), row, sequence.low, &mask->rows[r]);
  }
}

template <typename T, int kKeyDepth, int kValueDepth, int kRows, bool kDocuments, bool kPartial>
__global__ __launch_bounds__(kPackedThreads,
                             (kKeyDepth <= 32 ? 4 : 3)) void Sm90PackedForwardKernel(const __grid_constant__ Arguments args,
                                                                                     const __grid_constant__ Launch launch) {
#if STF_HAS_WGMMA
  using Tile = Sm90PackedTile<kKeyDepth, kValueDepth, kRows>;
  using KeyTile = SharedTile<kKeyDepth, kRows>;
  using ValueTile = SharedTile<kValueDepth, kRows>;
  extern __shared__ __align__(kTileAlignment) char shared[];
  const uint32_t queries = SharedAddress(shared), keys = queries + Tile::kKeyBytes, values = keys + Tile::kKeyBytes;

  TileIndex work;
  if (!FindTile(args, launch, blockIdx.x, launch.tiles, false, &work)) return;
  const Packs packs(launch, work, kRows);
  const int end = Length(args, work.batch);
  auto place = [&](int row) { return packs.Position(launch, row, end); };
  LoadSharedTile<T, kKeyDepth, kRows, kPackedThreads>(queries, Base<const T>(args.query, work.batch, work.head), args.query.position_stride,
                                                      args.key_depth, place);
  LoadSharedTile<T, kKeyDepth, kRows, kPackedThreads>(keys, Base<const T>(args.key, work.batch, work.key_head), args.key.position_stride,
                                                      args.key_depth, place);
  LoadSharedTile<T, kValueDepth, kRows, kPackedThreads>(values, Base<const T>(args.value, work.batch, work.key_head),
                                                        args.value.position_stride, args.value_depth, place);
  CommitCopies();
  const View view = {0, 1, packs.rows};
  const Context context = {args, work.components, view};
  const Component* const component = work.components.components + (__ffsll(work.components.members) - 1);
  bool waiting = true;
  for (int warpgroup_begin = 0; warpgroup_begin < packs.rows; warpgroup_begin += 64) {
    const int lane_row = warpgroup_begin + threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4;
    const OutputRows<T, kValueDepth, kPartial> outputs(
        args, work.batch, work.head,
        {packs.Position(launch, lane_row, args.positions), packs.Position(launch, lane_row + 8, args.positions)});
    Softmax<T, kKeyDepth, kValueDepth> softmax;
    bool settled = false;
    if (launch.first) {
      softmax.Start(args.sinks, work.head);
    } else {
      outputs.Continue(&softmax, args, true);
    }
    WarpgroupMask<false, false> mask;
    FindPackedMask<false, kDocuments>(&mask, component, args, launch, work.batch, packs, warpgroup_begin, end);
    if (waiting) FinishCopies();
    waiting = false;
    for (int begin = 0; begin <= warpgroup_begin; begin += kStageRows) {
      const WarpgroupSegment segment = {component, begin, kStageRows};
      if (!mask.Reaches(segment)) continue;
      WarpgroupAttend<T, kKeyDepth, kValueDepth, kRows, kRows>(softmax, &settled, context, mask, segment, warpgroup_begin, packs.rows,
                                                               queries + warpgroup_begin * KeyTile::kRowBytes,
                                                               keys + begin * KeyTile::kRowBytes, values + begin * ValueTile::kRowBytes);
    }
    softmax.Finish();
    outputs.Store(&softmax, args, launch, true);
  }
#endif
}

// Blocks of a multiprocessor, as registers allow.
constexpr int PackedBackwardBlocks(int key_depth, int value_depth, int rows) {
  if (rows == 64) return key_depth + value_depth <= 128 ? 4 : key_depth + value_depth <= 192 ? 3 : 2;
  return key_depth + value_depth <= 64 ? 3 : 2;
}

// A pass of five products: the scores' gradients leave registers for shared memory, where the query gradients' product reads them the other
// way around. Those of the second half's queries and the first half's keys wait there for the second half's.
template <typename T, int kKeyDepth, int kValueDepth, int kRows, bool kDocuments>
__global__ __launch_bounds__(kPackedThreads, (PackedBackwardBlocks(kKeyDepth, kValueDepth, kRows))) void Sm90PackedBackwardKernel(
    const __grid_constant__ Arguments args, const __grid_constant__ Launch launch) {
#if STF_HAS_WGMMA
  using Tile = Sm90PackedTile<kKeyDepth, kValueDepth, kRows>;
  using KeyTile = SharedTile<kKeyDepth, kRows>;
  using ValueTile = SharedTile<kValueDepth, kRows>;
  extern __shared__ __align__(kTileAlignment) char shared[];
  const uint32_t queries = SharedAddress(shared), keys = queries + Tile::kKeyBytes;
  const uint32_t values = keys + Tile::kKeyBytes, grads = values + Tile::kValueBytes;
  const uint32_t score_grads = queries + Tile::kScoreGrads;
  float* const log_sum_exps = reinterpret_cast<float*>(shared + Tile::kStatistics);
  float* const deltas = log_sum_exps + kRows;

  TileIndex work;
  if (!FindTile(args, launch, blockIdx.x, launch.tiles, false, &work)) return;
  const Packs packs(launch, work, kRows);
  const int end = Length(args, work.batch);
  auto place = [&](int row) { return packs.Position(launch, row, end); };
  LoadSharedTile<T, kKeyDepth, kRows, kPackedThreads>(queries, Base<const T>(args.query, work.batch, work.head), args.query.position_stride,
                                                      args.key_depth, place);
  LoadSharedTile<T, kKeyDepth, kRows, kPackedThreads>(keys, Base<const T>(args.key, work.batch, work.key_head), args.key.position_stride,
                                                      args.key_depth, place);
  LoadSharedTile<T, kValueDepth, kRows, kPackedThreads>(values, Base<const T>(args.value, work.batch, work.key_head),
                                                        args.value.position_stride, args.value_depth, place);
  LoadSharedTile<T, kValueDepth, kRows, kPackedThreads>(grads, Base<const T>(args.output_grad, work.batch, work.head),
                                                        args.output_grad.position_stride, args.value_depth, place);
  CommitCopies();

  const int64_t statistics = StatisticsBase(args, work.batch, work.head);
  const int position = threadIdx.x < kRows ? place(threadIdx.x) : -1;
  float log_sum_exp = 0, log_sum_exp_grad = 0, left_delta = 0;  // asked for early
  if (position >= 0) {
    log_sum_exp = args.log_sum_exp[statistics + position];
    if (launch.first && args.log_sum_exp_grad) log_sum_exp_grad = args.log_sum_exp_grad[statistics + position];
    if (!launch.first) left_delta = args.delta[statistics + position];
  }
  for (int row = threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4; row < kRows && launch.first; row += 64) {
    float delta[2];
    WarpgroupSumProducts<T, kValueDepth>(delta, Base<const T>(args.output, work.batch, work.head), args.output.position_stride,
                                         Base<const T>(args.output_grad, work.batch, work.head), args.output_grad.position_stride,
                                         args.value_depth, [&](int r) { return place(row + 8 * r); });
    if (threadIdx.x % 4 == 0) {
      deltas[row] = delta[0];
      deltas[row + 8] = delta[1];
    }
  }
  __syncthreads();
  if (threadIdx.x < kRows) {
    const int row = threadIdx.x;
    log_sum_exps[row] = log_sum_exp;
    deltas[row] = launch.first ? deltas[row] - log_sum_exp_grad : left_delta;
    if (launch.first && position >= 0) args.delta[statistics + position] = deltas[row];
  }
  FinishCopies();

  const View view = {0, 1, packs.rows};
  const Context context = {args, work.components, view};
  const Component* const component = work.components.components + (__ffsll(work.components.members) - 1);
#pragma unroll
  for (int key_begin = 0; key_begin < kRows; key_begin += 64) {
    if (key_begin >= packs.rows) break;
    const int row = key_begin + threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4;
    const int positions[2] = {packs.Position(launch, row, args.positions), packs.Position(launch, row + 8, args.positions)};
    const uint32_t own_keys = keys + key_begin * KeyTile::kRowBytes, own_values = values + key_begin * ValueTile::kRowBytes;
    float key_sum[kKeyDepth / 8][4], value_sum[kValueDepth / 8][4];
    Clear(key_sum);
    Clear(value_sum);
    WarpgroupMask<true, false> mask;
    FindPackedMask<true, kDocuments>(&mask, component, args, launch, work.batch, packs, key_begin, end);
#pragma unroll
    for (int begin = kRows - 64; begin >= key_begin; begin -= 64) {
      const WarpgroupSegment segment = {component, begin, kStageRows};
      const uint32_t tile = score_grads + (begin > key_begin ? kScoreGradBytes : 0);
      if (begin >= packs.rows || !mask.Reaches(segment)) {
        StoreWeights(tile, {});
        continue;
      }
      WarpgroupAddKeyGrads<T, kKeyDepth, kValueDepth, kRows, kRows>(
          context, mask, segment, key_begin, packs.rows, own_keys, own_values, queries + begin * KeyTile::kRowBytes,
          grads + begin * ValueTile::kRowBytes, log_sum_exps + begin, deltas + begin, key_sum, value_sum, [] {}, [] {},
          [&](const auto& weights) { StoreWeights(tile, weights); });
    }
    SyncWarpgroup();
    float query_sum[kKeyDepth / 8][4];
    BeginProducts();
    MultiplyTransposed<T, kKeyDepth, kRows>(query_sum, score_grads, own_keys, false);
    if (key_begin > 0) MultiplyTransposed<T, kKeyDepth, kRows>(query_sum, score_grads + kScoreGradBytes, keys, true);
    CommitProducts();
    WaitForProducts();
    FenceRegisters(query_sum);
    if (kRows > 64) WaitForWarpgroup();  // before the next keys' come
    StoreQueryGradients<T, kKeyDepth>(query_sum, args, launch, work.batch, work.head, positions);
    StoreKeyGradients<T, kKeyDepth, kValueDepth>(key_sum, value_sum, args, launch, work.batch, work.head, positions);
  }
#endif
}

}  // namespace cuda
}  // namespace stf

#endif  // STF_CUSTOM_OPS_ATTENTION_CUDA_SM90_PACKED_CUH_
