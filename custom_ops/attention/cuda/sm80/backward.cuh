// Backward, in two passes without atomics, so that the same call gives the same bits: one by tiles of queries for the query gradients (it
// also leaves delta for the other), one by tiles of keys for the key and value gradients. A later launch adds to what an earlier one wrote.
#ifndef STF_CUSTOM_OPS_ATTENTION_CUDA_SM80_BACKWARD_CUH_
#define STF_CUSTOM_OPS_ATTENTION_CUDA_SM80_BACKWARD_CUH_

#include "custom_ops/attention/cuda/common/epilogue.cuh"
#include "custom_ops/attention/cuda/common/scheduler.cuh"
#include "custom_ops/attention/cuda/sm80/mainloop.cuh"

namespace stf {
namespace cuda {

// Shared memory of both passes: rows of the block's own tile, then stages of the rows that it visits.
template <typename T, int kKeyDepth, int kValueDepth, int kWarps, int kTileVisited, int kTileStages>
struct Sm80BackwardTile {
  static constexpr int kThreads = 32 * kWarps, kRows = 16 * kWarps, kVisited = kTileVisited, kStages = kTileStages;
  static constexpr int kOwn = kRows * (kPitch<T, kKeyDepth> + kPitch<T, kValueDepth>);  // elements
  static constexpr int kStage = kVisited * (kPitch<T, kKeyDepth> + kPitch<T, kValueDepth>)+2 * kVisited * sizeof(float) / sizeof(T);
  static constexpr int kBytes = sizeof(T) * (kOwn + kStages * kStage) + kRows * sizeof(float);
  static_assert(kBytes == Sm80Bytes(kKeyGrad, sizeof(T), {kKeyDepth, kValueDepth}, {kWarps, kVisited, kStages}), "as planned");
};

template <typename T, int kKeyDepth, int kValueDepth, int kWarps, int kVisited, int kStages>
__global__ __launch_bounds__(128, (kValueDepth <= 128 ? 3 : 1)) void Sm80QueryGradKernel(const __grid_constant__ Arguments args,
                                                                                         const __grid_constant__ Launch launch) {
  using Tile = Sm80BackwardTile<T, kKeyDepth, kValueDepth, kWarps, kVisited, kStages>;
  extern __shared__ __align__(1024) char shared[];
  T* const queries = reinterpret_cast<T*>(shared);
  T* const grads = queries + Tile::kRows * kPitch<T, kKeyDepth>;
  T* const stages = queries + Tile::kOwn;
  float* const deltas = reinterpret_cast<float*>(stages + Tile::kStages * Tile::kStage);

  TileIndex work;
  if (!FindTile(args, launch, blockIdx.x, launch.sequences, true, &work)) return;
  const View view = FindView(args, launch, work.sequence, work.batch);
  const int existing = CountBelow(launch, work.sequence, args.positions);
  const int first = work.tile * Tile::kRows;
  if (first >= existing) return;
  const int end = min(first + Tile::kRows, view.count);
  const Head& head = work.components;
  const Context context = {args, head, view};

  const T* key = Base<const T>(args.key, work.batch, work.key_head);
  const T* value = Base<const T>(args.value, work.batch, work.key_head);
  auto own = [&](int row) { return first + row < end ? view.Position(first + row) : -1; };
  LoadHead<T, kKeyDepth, Tile::kRows, Tile::kThreads>(queries, args.query, args, work.batch, work.head, args.key_depth, own);
  LoadHead<T, kValueDepth, Tile::kRows, Tile::kThreads>(grads, args.output_grad, args, work.batch, work.head, args.value_depth, own);
  CommitCopies();
  auto load = [&](const Segment& segment, int stage) {
    auto place = [&](int row) { return row < segment.count ? KeyPosition(segment.component, view, segment.begin + row) : -1; };
    T* const to = stages + stage * Tile::kStage;
    LoadRows<T, kKeyDepth, Tile::kVisited, Tile::kThreads>(to, key, args.key.position_stride, args.key_depth, args.vector, place);
    LoadRows<T, kValueDepth, Tile::kVisited, Tile::kThreads>(to + Tile::kVisited * kPitch<T, kKeyDepth>, value, args.value.position_stride,
                                                             args.value_depth, args.vector, place);
  };
  const int warp_row = threadIdx.x / 32 * 16, lane_row = warp_row + threadIdx.x % 32 / 4;
  const int64_t statistics = StatisticsBase(args, work.batch, work.head);
  T* grad_rows[2];
  float* partial[2];
  float log_sum_exp[2], delta[2];
  float sum[kKeyDepth / 8][4];
  const auto prologue = [&]() {
    WaitForCopies<1>();
    __syncthreads();
    if (launch.first) {
      SumProducts<T, kValueDepth>(deltas + warp_row, grads + warp_row * kPitch<T, kValueDepth>,
                                  Base<const T>(args.output, work.batch, work.head), args.output.position_stride, args.value_depth,
                                  args.vector, [&](int row) { return own(warp_row + row); });
      __syncwarp();
    }
#pragma unroll
    for (int r = 0; r < 2; r++) {
      const int row = first + lane_row + 8 * r, position = view.Position(row);
      grad_rows[r] = row < existing ? RowOf<T>(args.query_grad, work.batch, work.head, position) : nullptr;
      partial[r] = row < existing ? RowOf<float>(args.query_partial, work.batch, work.head, position) : nullptr;
      log_sum_exp[r] = row < end ? args.log_sum_exp[statistics + position] : 0;
      if (launch.first) {
        delta[r] = deltas[lane_row + 8 * r];
        if (row < end && args.log_sum_exp_grad) delta[r] -= args.log_sum_exp_grad[statistics + position];
        if (row < existing && threadIdx.x % 4 == 0) args.delta[statistics + position] = delta[r];
      } else {
        delta[r] = row < end ? args.delta[statistics + position] : 0;
      }
    }
    Clear(sum);
  };
  ForEachSegment<Tile::kStages>(
      Walk<false, Tile::kVisited>(args, head, view, first, end - 1), load, prologue, [&](const Segment& segment, int stage) {
        const T* keys = stages + stage * Tile::kStage;
        AddQueryGrad<T, kKeyDepth, kValueDepth, Tile::kVisited>(
            context, segment, first + warp_row, end, queries + warp_row * kPitch<T, kKeyDepth>, grads + warp_row * kPitch<T, kValueDepth>,
            keys, keys + Tile::kVisited * kPitch<T, kKeyDepth>, log_sum_exp, delta, sum);
      });
  Scale(sum, args.scale);
  StoreGradient<T, kKeyDepth>(sum, grad_rows, partial, args.key_depth, args.vector, launch.first, launch.last, launch.last);
}

// The launch's members number their keys alike: all by position, or one summary or strided component in its own way.
template <typename T, int kKeyDepth, int kValueDepth, int kWarps, int kVisited, int kStages, Part kPart>
__global__ __launch_bounds__(128, (kKeyDepth <= 64 && kValueDepth <= 128 ? 3 : 1)) void Sm80KeyGradKernel(
    const __grid_constant__ Arguments args, const __grid_constant__ Launch launch) {
  using Tile = Sm80BackwardTile<T, kKeyDepth, kValueDepth, kWarps, kVisited, kStages>;
  extern __shared__ __align__(1024) char shared[];
  T* const keys = reinterpret_cast<T*>(shared);
  T* const values = keys + Tile::kRows * kPitch<T, kKeyDepth>;
  T* const stages = keys + Tile::kOwn;

  TileIndex work;
  if (!FindTile(args, launch, blockIdx.x, launch.sequences, false, &work)) return;
  const View view = FindView(args, launch, work.sequence, work.batch);
  const Head& head = work.components;
  const Component plain = {STF_CAUSAL, 0, 0, 0, 0, 0, 0};
  const Component& numbering = head.members ? head.components[__ffsll(head.members) - 1] : plain;
  const int existing = CountKeys(launch, numbering, work.sequence, args.positions);
  const int first = work.tile * Tile::kRows;
  if (first >= existing) return;
  const int end = min(first + Tile::kRows, existing);
  const Context context = {args, head, view};

  const T* query = Base<const T>(args.query, work.batch, work.head);
  const T* grad = Base<const T>(args.output_grad, work.batch, work.head);
  const float* log_sum_exp = args.log_sum_exp + StatisticsBase(args, work.batch, work.head);
  const float* delta = args.delta + StatisticsBase(args, work.batch, work.head);
  auto own = [&](int row) { return first + row < end ? KeyPosition(numbering, view, first + row) : -1; };
  const int length = Length(args, work.batch);
  auto in_use = [&](int row) { return own(row) < length ? own(row) : -1; };  // the others may hold anything
  LoadHead<T, kKeyDepth, Tile::kRows, Tile::kThreads>(keys, args.key, args, work.batch, work.key_head, args.key_depth, in_use);
  LoadHead<T, kValueDepth, Tile::kRows, Tile::kThreads>(values, args.value, args, work.batch, work.key_head, args.value_depth, in_use);
  auto load = [&](const Segment& segment, int stage) {
    auto place = [&](int row) { return row < segment.count ? view.Position(segment.begin + row) : -1; };
    T* const to = stages + stage * Tile::kStage;
    T* const grads = to + Tile::kVisited * kPitch<T, kKeyDepth>;
    float* const statistics = reinterpret_cast<float*>(grads + Tile::kVisited * kPitch<T, kValueDepth>);
    LoadRows<T, kKeyDepth, Tile::kVisited, Tile::kThreads>(to, query, args.query.position_stride, args.key_depth, args.vector, place);
    LoadRows<T, kValueDepth, Tile::kVisited, Tile::kThreads>(grads, grad, args.output_grad.position_stride, args.value_depth, args.vector,
                                                             place);
    for (int i = threadIdx.x; i < 2 * Tile::kVisited; i += Tile::kThreads) {
      const int position = place(i % Tile::kVisited);
      const float* from = i < Tile::kVisited ? log_sum_exp : delta;
      CopyAsync<4>(statistics + i, position < 0 ? from : from + position, position >= 0);
    }
  };

  const int warp_row = threadIdx.x / 32 * 16, lane_row = warp_row + threadIdx.x % 32 / 4;
  float key_sum[kKeyDepth / 8][4], value_sum[kValueDepth / 8][4];
  Clear(key_sum);
  Clear(value_sum);
  ForEachSegment<Tile::kStages>(
      Walk<true, Tile::kVisited>(args, head, view, first, end - 1), load, []() {},
      [&](const Segment& segment, int stage) {
        const T* queries = stages + stage * Tile::kStage;
        const T* grads = queries + Tile::kVisited * kPitch<T, kKeyDepth>;
        const float* statistics = reinterpret_cast<const float*>(grads + Tile::kVisited * kPitch<T, kValueDepth>);
        AddKeyGrads<T, kKeyDepth, kValueDepth, Tile::kVisited, kPart>(
            context, segment, first + warp_row, end, keys + warp_row * kPitch<T, kKeyDepth>, values + warp_row * kPitch<T, kValueDepth>,
            queries, grads, statistics, statistics + Tile::kVisited, key_sum, value_sum);
      });
  T* grad_rows[2];
  float* partial[2];
  auto find_rows = [&](const stf_tensor& grads, const stf_tensor& partials) {
#pragma unroll
    for (int r = 0; r < 2; r++) {
      const int position = own(lane_row + 8 * r);
      grad_rows[r] = position < 0 ? nullptr : RowOf<T>(grads, work.batch, work.head, position);
      partial[r] = position < 0 ? nullptr : RowOf<float>(partials, work.batch, work.head, position);
    }
  };
  if (kPart != kValuePart) {
    Scale(key_sum, args.scale);
    find_rows(args.key_grad, args.key_partial);
    StoreGradient<T, kKeyDepth>(key_sum, grad_rows, partial, args.key_depth, args.vector, launch.key_first, launch.key_last,
                                launch.key_write);
  }
  if (kPart != kKeyPart) {
    find_rows(args.value_grad, args.value_partial);
    StoreGradient<T, kValueDepth>(value_sum, grad_rows, partial, args.value_depth, args.vector, launch.key_first, launch.key_last,
                                  launch.key_write);
  }
}

}  // namespace cuda
}  // namespace stf

#endif  // STF_CUSTOM_OPS_ATTENTION_CUDA_SM80_BACKWARD_CUH_
