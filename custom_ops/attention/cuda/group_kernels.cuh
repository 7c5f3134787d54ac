// The kernels of forward.cuh and backward.cuh for warpgroups: the same walk over segments, products by wgmma. For halves whose rows may be
// read 16 bytes at a time, on Hopper. Elsewhere their bodies are empty.
#ifndef STF_CUSTOM_OPS_ATTENTION_CUDA_GROUP_KERNELS_CUH_
#define STF_CUSTOM_OPS_ATTENTION_CUDA_GROUP_KERNELS_CUH_

#include "custom_ops/attention/cuda/group_matrix.cuh"
#include "custom_ops/attention/cuda/kernels.h"
#include "custom_ops/attention/cuda/tile.cuh"
#include "custom_ops/attention/cuda/work.cuh"

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define STF_HAS_WGMMA 1
#else
#define STF_HAS_WGMMA 0
#endif

namespace stf {
namespace cuda {

constexpr int kGroupColumns = 64;  // of a segment: what a tile visits at once

// A piece of one component's walk, as Segment, the component where it lies.
struct GroupSegment {
  const Component* component;
  int begin, count;
};

// What a thread's two rows, and its group's 64, need of one component: intervals of its numbering of columns. Found once for all segments
// of the component.
template <bool kByKey, bool kExtra>
struct GroupMask {
  const Component* component = nullptr;
  Interval rows[2], reach, common;  // the thread's rows' own; what any row of the group needs; what all do

  // Rows group_begin ... group_begin + 63; those from row_end on are not in use.
  __device__ void Find(const Component* of, const View& view, int group_begin, int row_end) {
    component = of;
    const Component& c = *of;
    const int last = min(group_begin + 63, row_end - 1);
    reach = common = {0, 0};
    rows[0] = rows[1] = {0, 0};
    if (last < group_begin) return;
    const Interval top = Of(c, group_begin, view), bottom = Of(c, last, view);
    reach = {top.low, bottom.high};
    if (last == group_begin + 63) common = {bottom.low, top.high};
#pragma unroll
    for (int r = 0; r < 2; r++) {
      const int row = group_begin + threadIdx.x / 32 % 4 * 16 + threadIdx.x % 32 / 4 + 8 * r;
      if (row <= last) rows[r] = Of(c, row, view);
    }
  }

  __device__ bool Reaches(const GroupSegment& segment) const {
    return segment.begin < reach.high && segment.begin + segment.count > reach.low;
  }

  // Calls leave_out(block, e) for each element of the thread's accumulators that may not stand.
  template <typename LeaveOutElement>
  __device__ void Apply(const Context& context, const GroupSegment& segment, int group_begin, int row_end,
                        LeaveOutElement leave_out) const {
    const Component& c = *component;
    const int end = segment.begin + segment.count, last = min(group_begin + 63, row_end - 1);
    const bool extra = kExtra && (c.exclude || c.kind == STF_BLOCKS) &&
                       (kByKey ? NeedsExtra(context.head, c, context.view, segment.begin, end - 1, group_begin, last)
                               : NeedsExtra(context.head, c, context.view, group_begin, last, segment.begin, end - 1));
    if (!extra && segment.begin >= common.low && segment.begin + kGroupColumns <= common.high) return;
    const int lane_column = segment.begin + threadIdx.x % 4 * 2;
    if (!kExtra || !extra) {
#pragma unroll
      for (int r = 0; r < 2; r++) {
        const int low = rows[r].low - lane_column, high = min(rows[r].high, end) - lane_column;
#pragma unroll
        for (int b = 0; b < kGroupColumns / 8; b++) {
#pragma unroll
          for (int e = 0; e < 2; e++) {
            if (8 * b + e < low || 8 * b + e >= high) leave_out(b, 2 * r + e);
          }
        }
      }
      return;
    }
#pragma unroll
    for (int unit = 0; unit < kGroupColumns / kUnit; unit++) {
      uint32_t bits = 0;
#pragma unroll
      for (int x = 0; x < kUnit / 2; x++) {
        const int column = lane_column + unit * kUnit + x / 4 * 8 + x % 2;
        const Interval& row = rows[x / 2 % 2];
        if (column >= row.low && column < min(row.high, end)) bits |= 1u << x;
      }
      bits = LeaveOut<kByKey>(context.args, context.head, context.view, c, group_begin + threadIdx.x / 32 % 4 * 16,
                              segment.begin + unit * kUnit, bits);
#pragma unroll
      for (int x = 0; x < kUnit / 2; x++) {
        if (!(bits >> x & 1)) leave_out(unit * kUnit / 8 + x / 4, x % 4);
      }
    }
  }

 private:
  __device__ static Interval Of(const Component& c, int row, const View& view) {
    return kByKey ? QueriesOf(c, row, view.count) : KeysOf(c, row);
  }
};

// Walk (mask.cuh) for a block: segments of kGroupColumns.
template <bool kByKey, bool kExtra>
class GroupWalk {
 public:
  __device__ GroupWalk(const Context& context, int first, int last)
      : context_(context), first_(first), last_(last), left_(last < first ? 0 : context.head.members) {}

  __device__ bool Next(GroupSegment* segment) {
    while (true) {
      while (next_ >= end_) {
        if (!left_) return false;
        component_ = context_.head.components + (__ffsll(left_) - 1);
        left_ &= left_ - 1;
        const Component& c = *component_;
        const int count = context_.view.count;
        next_ = (kByKey ? QueriesOf(c, first_, count) : KeysOf(c, first_)).low;
        end_ = kByKey ? min(QueriesOf(c, last_, count).high, count) : KeysOf(c, last_).high;
      }
      *segment = {component_, next_, min(kGroupColumns, end_ - next_)};
      next_ += kGroupColumns;
      if (!kExtra || component_->kind != STF_BLOCKS || AnyBlock(segment->begin, segment->begin + segment->count - 1)) return true;
    }
  }

 private:
  __device__ bool AnyBlock(int begin, int last) const {
    return AnyBit(context_.args.layouts, *component_, kByKey ? begin : first_, kByKey ? last : last_, kByKey ? first_ : begin,
                  kByKey ? last_ : last);
  }

  const Context& context_;
  const int first_, last_;
  uint64_t left_;
  const Component* component_ = nullptr;
  int next_ = 0, end_ = 0;
};

// The block's copies so far are there, and may be read by the tensor cores; what they read before may be overwritten. The fence waits for
// all copies under way: the next ones are started after it.
__device__ inline void FinishCopies() {
  WaitForCopies<0>();
  FenceShared();
  __syncthreads();
}

// Loads a segment's keys and values to a stage.
template <typename T, int kKeyDepth, int kValueDepth, int kThreads>
__device__ inline void LoadSegment(const Context& context, const GroupSegment& segment, uint32_t to, const T* key, const T* value) {
  const Arguments& args = context.args;
  const uint32_t to_value = to + GroupTile<kKeyDepth, kGroupColumns>::kBytes;
  const Component& c = *segment.component;
  if (c.kind == STF_SUMMARY) {
    auto place = [&](int row) { return row < segment.count ? KeyPosition(c, context.view, segment.begin + row) : -1; };
    LoadGroupRows<T, kKeyDepth, kGroupColumns, kThreads>(to, key, args.key.position_stride, args.key_depth, place);
    LoadGroupRows<T, kValueDepth, kGroupColumns, kThreads>(to_value, value, args.value.position_stride, args.value_depth, place);
    return;
  }
  const bool strided = c.kind == STF_STRIDED;
  const int first = strided ? context.view.Position(segment.begin) : segment.begin;
  const int64_t step = (strided ? context.view.step : 1) * sizeof(T);
  LoadGroupRun<T, kKeyDepth, kGroupColumns, kThreads>(to, key + first * args.key.position_stride, step * args.key.position_stride,
                                                      args.key_depth, segment.count);
  LoadGroupRun<T, kValueDepth, kGroupColumns, kThreads>(to_value, value + first * args.value.position_stride,
                                                        step * args.value.position_stride, args.value_depth, segment.count);
}

template <typename T, int kKeyDepth, int kValueDepth>
struct GroupForwardTile {
  static constexpr int kGroups = GroupShape<kKeyDepth, kValueDepth>::kForwardGroups, kThreads = 128 * kGroups, kRows = 64 * kGroups;
  static constexpr int kKeyBytes = GroupTile<kKeyDepth, kGroupColumns>::kBytes;
  static constexpr int kStage = kKeyBytes + GroupTile<kValueDepth, kGroupColumns>::kBytes;
  static constexpr int kBytes = GroupTile<kKeyDepth, kRows>::kBytes + 2 * kStage;
};

template <typename T, int kKeyDepth, int kValueDepth, int kRows, int kVisited, typename Mask>
__device__ inline void GroupAttend(Softmax<T, kKeyDepth, kValueDepth>& softmax, const Context& context, const Mask& mask,
                                   const GroupSegment& segment, int group_begin, int row_end, uint32_t query, uint32_t key,
                                   uint32_t value) {
  float x[kGroupColumns / 8][4];
  BeginProducts();
  GroupScores<T, kKeyDepth, kRows, kVisited>(x, query, key);
  CommitProducts();
  const float scale = context.args.scale, factor = (scale == 0 ? 1 : fabsf(scale)) * kLog2e;
  WaitForProducts();
  Pin(x);
  if (scale <= 0) {
#pragma unroll
    for (auto& block : x) {
#pragma unroll
      for (float& each : block) each = scale < 0 ? -each : 0;
    }
  }
  mask.Apply(context, segment, group_begin, row_end, [&](int b, int e) { x[b][e] = -INFINITY; });
  float largest[2] = {-INFINITY, -INFINITY}, base[2];
  softmax.Largest(largest, x);
  softmax.Raise(largest, factor, base);
  softmax.Exponentiate(x, factor, base);
  uint32_t p[kGroupColumns / 16][4];
  PackWeights<T>(p, x);
  Pin(softmax.sum);
  BeginProducts();
  GroupWeighted<T, kValueDepth, kVisited>(softmax.sum, p, value);
  CommitProducts();
  WaitForProducts();
  Pin(softmax.sum);
}

template <typename T, int kKeyDepth, int kValueDepth, bool kExtra>
__global__ __launch_bounds__(
    GroupForwardTile<T, kKeyDepth, kValueDepth>::kThreads,
    (GroupShape<kKeyDepth, kValueDepth>::kForwardBlocks)) void GroupForwardKernel(const __grid_constant__ Arguments args,
                                                                                  const __grid_constant__ Launch launch) {
#if STF_HAS_WGMMA
  using Tile = GroupForwardTile<T, kKeyDepth, kValueDepth>;
  extern __shared__ __align__(kGroupAlignment) char shared[];
  const uint32_t queries = SharedAddress(shared), stages = queries + GroupTile<kKeyDepth, Tile::kRows>::kBytes;

  Work work;
  if (!FindWork(args, launch, launch.sequences, true, &work)) return;
  const View view = FindView(args, launch, work.sequence, work.batch);
  const int existing = CountBelow(launch, work.sequence, args.positions);
  const int first = work.tile * Tile::kRows;
  if (first >= existing) return;
  const int end = min(first + Tile::kRows, view.count);
  const Head& head = work.components;
  const Context context = {args, head, view};

  const T* query = Base<const T>(args.query, work.batch, work.head);
  const T* key = Base<const T>(args.key, work.batch, work.head);
  const T* value = Base<const T>(args.value, work.batch, work.head);
  LoadGroupRows<T, kKeyDepth, Tile::kRows, Tile::kThreads>(queries, query, args.query.position_stride, args.key_depth,
                                                           [&](int row) { return first + row < end ? view.Position(first + row) : -1; });
  const int group_row = threadIdx.x / 128 * 64, lane_row = threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4;
  T* outputs[2];
  float* sums[2];
#pragma unroll
  for (int r = 0; r < 2; r++) {
    const int row = first + lane_row + 8 * r, position = view.Position(row);
    outputs[r] = row < existing ? RowOf<T>(args.output, work.batch, work.head, position) : nullptr;
    sums[r] = row < existing ? args.log_sum_exp + StatisticsBase(args, work.batch, work.head) + position : nullptr;
  }
  Softmax<T, kKeyDepth, kValueDepth> softmax;
  if (launch.first) {
    softmax.Start();
  } else {
    const float log_sum_exp[2] = {sums[0] ? *sums[0] : -INFINITY, sums[1] ? *sums[1] : -INFINITY};
    softmax.Continue(outputs, log_sum_exp, args.value_depth, true);
  }

  GroupWalk<false, kExtra> walk(context, first, end - 1);
  GroupMask<false, kExtra> mask;
  GroupSegment segment, next;
  bool loaded = false;
  for (int stage = 0;; stage = 1 - stage) {
    if (loaded) FinishCopies();
    const bool more = walk.Next(&next);
    if (more) LoadSegment<T, kKeyDepth, kValueDepth, Tile::kThreads>(context, next, stages + stage * Tile::kStage, key, value);
    CommitCopies();
    if (loaded) {
      if (segment.component != mask.component) mask.Find(segment.component, view, first + group_row, end);
      const uint32_t keys = stages + (1 - stage) * Tile::kStage;
      if (mask.Reaches(segment)) {
        GroupAttend<T, kKeyDepth, kValueDepth, Tile::kRows, kGroupColumns>(
            softmax, context, mask, segment, first + group_row, end, queries + group_row * GroupTile<kKeyDepth, Tile::kRows>::kRowBytes,
            keys, keys + Tile::kKeyBytes);
      }
    }
    if (!more) break;
    segment = next;
    loaded = true;
  }
  softmax.Finish();
  Sums<T, kValueDepth>::Store(softmax.sum, outputs, args.value_depth, true);
#pragma unroll
  for (int r = 0; r < 2; r++) {
    if (sums[r] && threadIdx.x % 4 == 0) *sums[r] = softmax.most[r];
  }
#endif
}

template <int kKeyDepth, int kValueDepth, int kGroups>
struct GroupBackwardTile {
  static constexpr int kThreads = 128 * kGroups, kRows = 64 * kGroups;
  static constexpr int kKeyBytes = GroupTile<kKeyDepth, kRows>::kBytes, kOwn = kKeyBytes + GroupTile<kValueDepth, kRows>::kBytes;
  static constexpr int kStageKeyBytes = GroupTile<kKeyDepth, kGroupColumns>::kBytes;
  static constexpr int kStage = kStageKeyBytes + GroupTile<kValueDepth, kGroupColumns>::kBytes;
  static constexpr int kStatistics = kOwn + 2 * kStage;  // floats: of a stage's rows, or of the block's own
  static constexpr int kBytes = kStatistics + (4 * kGroupColumns > kRows ? 4 * kGroupColumns : kRows) * sizeof(float);
};

// Adds a segment's keys to the query gradients of 64 queries, but for the factor scale.
template <typename T, int kKeyDepth, int kValueDepth, int kRows, int kVisited, typename Mask>
__device__ inline void GroupAddQueryGrad(const Context& context, const Mask& mask, const GroupSegment& segment, int group_begin,
                                         int row_end, uint32_t query, uint32_t output_grad, uint32_t key, uint32_t value,
                                         const float (&log_sum_exp)[2], const float (&delta)[2], float (&sum)[kKeyDepth / 8][4]) {
  float x[kGroupColumns / 8][4], y[kGroupColumns / 8][4];
  BeginProducts();
  GroupScores<T, kKeyDepth, kRows, kVisited>(x, query, key);
  CommitProducts();
  GroupScores<T, kValueDepth, kRows, kVisited>(y, output_grad, value);
  CommitProducts();
  WaitForProducts<1>();
  Pin(x);
#pragma unroll
  for (int b = 0; b < kGroupColumns / 8; b++) {
#pragma unroll
    for (int e = 0; e < 4; e++) x[b][e] = Weight<T>(x[b][e], context.args.scale, log_sum_exp[e / 2]);
  }
  mask.Apply(context, segment, group_begin, row_end, [&](int b, int e) { x[b][e] = 0; });
  WaitForProducts();
  Pin(y);
#pragma unroll
  for (int b = 0; b < kGroupColumns / 8; b++) {
#pragma unroll
    for (int e = 0; e < 4; e++) x[b][e] *= y[b][e] - delta[e / 2];
  }
  uint32_t p[kGroupColumns / 16][4];
  PackWeights<T>(p, x);
  Pin(sum);
  BeginProducts();
  GroupWeighted<T, kKeyDepth, kVisited>(sum, p, key);
  CommitProducts();
  WaitForProducts();
  Pin(sum);
}

// Adds a segment's queries to the key and value gradients of 64 keys, the former but for the factor scale. log_sum_exp and delta are the
// queries', in shared memory.
template <typename T, int kKeyDepth, int kValueDepth, int kRows, int kVisited, typename Mask>
__device__ inline void GroupAddKeyGrads(const Context& context, const Mask& mask, const GroupSegment& segment, int group_begin, int row_end,
                                        uint32_t key, uint32_t value, uint32_t query, uint32_t output_grad, const float* log_sum_exp,
                                        const float* delta, float (&key_sum)[kKeyDepth / 8][4], float (&value_sum)[kValueDepth / 8][4]) {
  float x[kGroupColumns / 8][4], y[kGroupColumns / 8][4];
  BeginProducts();
  GroupScores<T, kKeyDepth, kRows, kVisited>(x, key, query);
  CommitProducts();
  GroupScores<T, kValueDepth, kRows, kVisited>(y, value, output_grad);
  CommitProducts();
  WaitForProducts<1>();
  Pin(x);
#pragma unroll
  for (int b = 0; b < kGroupColumns / 8; b++) {
    const float2 sums = *reinterpret_cast<const float2*>(log_sum_exp + 8 * b + 2 * (threadIdx.x % 4));
#pragma unroll
    for (int e = 0; e < 4; e++) x[b][e] = Weight<T>(x[b][e], context.args.scale, e % 2 ? sums.y : sums.x);
  }
  mask.Apply(context, segment, group_begin, row_end, [&](int b, int e) { x[b][e] = 0; });
  uint32_t p[kGroupColumns / 16][4];
  PackWeights<T>(p, x);
  WaitForProducts();
  Pin(y);
  Pin(value_sum);
  BeginProducts();
  GroupWeighted<T, kValueDepth, kVisited>(value_sum, p, output_grad);
  CommitProducts();
#pragma unroll
  for (int b = 0; b < kGroupColumns / 8; b++) {
    const float2 deltas = *reinterpret_cast<const float2*>(delta + 8 * b + 2 * (threadIdx.x % 4));
#pragma unroll
    for (int e = 0; e < 4; e++) y[b][e] = x[b][e] * (y[b][e] - (e % 2 ? deltas.y : deltas.x));
  }
  uint32_t q[kGroupColumns / 16][4];
  PackWeights<T>(q, y);
  Pin(key_sum);
  BeginProducts();
  GroupWeighted<T, kKeyDepth, kVisited>(key_sum, q, query);
  CommitProducts();
  WaitForProducts();
  Pin(key_sum);
  Pin(value_sum);
}

// delta[row] = sum over depth of output * output_grad, for a warp's 16 rows.
template <typename T, int kDepth, typename Place>
__device__ void GroupSumProducts(float* delta, const T* output, int64_t output_stride, const T* grad, int64_t grad_stride, int depth,
                                 Place place) {
  constexpr int kLanes = kDepth / 8;
  const int lane = threadIdx.x % 32, column = lane % kLanes * 8;
#pragma unroll
  for (int row = lane / kLanes; row < 16; row += 32 / kLanes) {
    const int position = place(row);
    float sum = 0;
    if (position >= 0 && column < depth) {
      const uint4 a = *reinterpret_cast<const uint4*>(output + position * output_stride + column);
      const uint4 b = *reinterpret_cast<const uint4*>(grad + position * grad_stride + column);
      const uint32_t x[4] = {a.x, a.y, a.z, a.w}, y[4] = {b.x, b.y, b.z, b.w};
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const float2 left = Unpack(x[i], T()), right = Unpack(y[i], T());
        sum = fmaf(left.x, right.x, fmaf(left.y, right.y, sum));
      }
    }
#pragma unroll
    for (int other = kLanes / 2; other > 0; other /= 2) sum += __shfl_xor_sync(~0u, sum, other);
    if (lane % kLanes == 0) delta[row] = sum;
  }
}

template <typename T, int kKeyDepth, int kValueDepth, bool kExtra>
__global__ __launch_bounds__(
    128 * GroupShape<kKeyDepth, kValueDepth>::kQueryGroups,
    (GroupShape<kKeyDepth, kValueDepth>::kQueryBlocks)) void GroupQueryGradKernel(const __grid_constant__ Arguments args,
                                                                                  const __grid_constant__ Launch launch) {
#if STF_HAS_WGMMA
  using Tile = GroupBackwardTile<kKeyDepth, kValueDepth, GroupShape<kKeyDepth, kValueDepth>::kQueryGroups>;
  extern __shared__ __align__(kGroupAlignment) char shared[];
  const uint32_t queries = SharedAddress(shared), grads = queries + Tile::kKeyBytes, stages = queries + Tile::kOwn;

  Work work;
  if (!FindWork(args, launch, launch.sequences, true, &work)) return;
  const View view = FindView(args, launch, work.sequence, work.batch);
  const int existing = CountBelow(launch, work.sequence, args.positions);
  const int first = work.tile * Tile::kRows;
  if (first >= existing) return;
  const int end = min(first + Tile::kRows, view.count);
  const Head& head = work.components;
  const Context context = {args, head, view};

  const T* key = Base<const T>(args.key, work.batch, work.head);
  const T* value = Base<const T>(args.value, work.batch, work.head);
  auto own = [&](int row) { return first + row < end ? view.Position(first + row) : -1; };
  LoadGroupRows<T, kKeyDepth, Tile::kRows, Tile::kThreads>(queries, Base<const T>(args.query, work.batch, work.head),
                                                           args.query.position_stride, args.key_depth, own);
  LoadGroupRows<T, kValueDepth, Tile::kRows, Tile::kThreads>(grads, Base<const T>(args.output_grad, work.batch, work.head),
                                                             args.output_grad.position_stride, args.value_depth, own);
  GroupWalk<false, kExtra> walk(context, first, end - 1);
  GroupMask<false, kExtra> mask;
  CommitCopies();

  const int group_row = threadIdx.x / 128 * 64, warp_row = threadIdx.x / 32 * 16, lane_row = warp_row + threadIdx.x % 32 / 4;
  const int64_t statistics = StatisticsBase(args, work.batch, work.head);
  float* const deltas = reinterpret_cast<float*>(shared + Tile::kStatistics);
  if (launch.first) {
    GroupSumProducts<T, kValueDepth>(deltas + warp_row, Base<const T>(args.output, work.batch, work.head), args.output.position_stride,
                                     Base<const T>(args.output_grad, work.batch, work.head), args.output_grad.position_stride,
                                     args.value_depth, [&](int row) { return own(warp_row + row); });
    __syncwarp();
  }
  T* grad_rows[2];
  float* partial[2];
  float log_sum_exp[2], delta[2];
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

  float sum[kKeyDepth / 8][4];
  Clear(sum);
  GroupSegment segment, next;
  bool loaded = false;
  for (int stage = 0;; stage = 1 - stage) {
    if (loaded) FinishCopies();
    const bool more = walk.Next(&next);
    if (more) LoadSegment<T, kKeyDepth, kValueDepth, Tile::kThreads>(context, next, stages + stage * Tile::kStage, key, value);
    CommitCopies();
    if (loaded) {
      if (segment.component != mask.component) mask.Find(segment.component, view, first + group_row, end);
      const uint32_t keys = stages + (1 - stage) * Tile::kStage;
      if (mask.Reaches(segment)) {
        GroupAddQueryGrad<T, kKeyDepth, kValueDepth, Tile::kRows, kGroupColumns>(
            context, mask, segment, first + group_row, end, queries + group_row * GroupTile<kKeyDepth, Tile::kRows>::kRowBytes,
            grads + group_row * GroupTile<kValueDepth, Tile::kRows>::kRowBytes, keys, keys + Tile::kStageKeyBytes, log_sum_exp, delta, sum);
      }
    }
    if (!more) break;
    segment = next;
    loaded = true;
  }
  Scale(sum, args.scale);
  Deliver<T, kKeyDepth>(sum, grad_rows, partial, args.key_depth, true, launch.first, launch.last, launch.last);
#endif
}

template <typename T, int kKeyDepth, int kValueDepth, bool kExtra>
__global__ __launch_bounds__(
    128 * GroupShape<kKeyDepth, kValueDepth>::kKeyGroups,
    (GroupShape<kKeyDepth, kValueDepth>::kKeyBlocks)) void GroupKeyGradKernel(const __grid_constant__ Arguments args,
                                                                              const __grid_constant__ Launch launch) {
#if STF_HAS_WGMMA
  using Tile = GroupBackwardTile<kKeyDepth, kValueDepth, GroupShape<kKeyDepth, kValueDepth>::kKeyGroups>;
  extern __shared__ __align__(kGroupAlignment) char shared[];
  const uint32_t keys = SharedAddress(shared), values = keys + Tile::kKeyBytes, stages = keys + Tile::kOwn;

  Work work;
  if (!FindWork(args, launch, launch.sequences, false, &work)) return;
  const View view = FindView(args, launch, work.sequence, work.batch);
  const Head& head = work.components;
  const Component plain = {STF_CAUSAL, 0, 0, 0, 0, 0, 0};
  const Component& numbering = head.members ? head.components[__ffsll(head.members) - 1] : plain;
  const int existing = CountKeys(args, launch, numbering, work.sequence);
  const int first = work.tile * Tile::kRows;
  if (first >= existing) return;
  const int end = min(first + Tile::kRows, existing);
  const Context context = {args, head, view};

  const T* query = Base<const T>(args.query, work.batch, work.head);
  const T* grad = Base<const T>(args.output_grad, work.batch, work.head);
  const float* log_sum_exp = args.log_sum_exp + StatisticsBase(args, work.batch, work.head);
  const float* delta = args.delta + StatisticsBase(args, work.batch, work.head);
  auto own = [&](int row) { return first + row < end ? KeyPosition(numbering, view, first + row) : -1; };
  LoadGroupRows<T, kKeyDepth, Tile::kRows, Tile::kThreads>(keys, Base<const T>(args.key, work.batch, work.head), args.key.position_stride,
                                                           args.key_depth, own);
  LoadGroupRows<T, kValueDepth, Tile::kRows, Tile::kThreads>(values, Base<const T>(args.value, work.batch, work.head),
                                                             args.value.position_stride, args.value_depth, own);
  auto load = [&](const GroupSegment& segment, int stage) {
    const uint32_t to = stages + stage * Tile::kStage;
    const int start = view.Position(segment.begin);
    const int64_t step = view.step * sizeof(T);
    LoadGroupRun<T, kKeyDepth, kGroupColumns, Tile::kThreads>(to, query + start * args.query.position_stride,
                                                              step * args.query.position_stride, args.key_depth, segment.count);
    LoadGroupRun<T, kValueDepth, kGroupColumns, Tile::kThreads>(to + Tile::kStageKeyBytes, grad + start * args.output_grad.position_stride,
                                                                step * args.output_grad.position_stride, args.value_depth, segment.count);
    float* const statistics = reinterpret_cast<float*>(shared + Tile::kStatistics) + stage * 2 * kGroupColumns;
    if (threadIdx.x < 2 * kGroupColumns) {
      const int row = threadIdx.x % kGroupColumns;
      const float* from = threadIdx.x < kGroupColumns ? log_sum_exp : delta;
      CopyAsync<4>(statistics + threadIdx.x, from + (row < segment.count ? start + row * view.step : 0), row < segment.count);
    }
  };

  const int group_row = threadIdx.x / 128 * 64, lane_row = threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4;
  float key_sum[kKeyDepth / 8][4], value_sum[kValueDepth / 8][4];
  Clear(key_sum);
  Clear(value_sum);
  GroupWalk<true, kExtra> walk(context, first, end - 1);
  GroupMask<true, kExtra> mask;
  GroupSegment segment, next;
  bool loaded = false;
  for (int stage = 0;; stage = 1 - stage) {
    if (loaded) FinishCopies();
    const bool more = walk.Next(&next);
    if (more) load(next, stage);
    CommitCopies();
    if (loaded) {
      if (segment.component != mask.component) mask.Find(segment.component, view, first + group_row, end);
      const uint32_t queries = stages + (1 - stage) * Tile::kStage;
      const float* statistics = reinterpret_cast<const float*>(shared + Tile::kStatistics) + (1 - stage) * 2 * kGroupColumns;
      if (mask.Reaches(segment)) {
        GroupAddKeyGrads<T, kKeyDepth, kValueDepth, Tile::kRows, kGroupColumns>(
            context, mask, segment, first + group_row, end, keys + group_row * GroupTile<kKeyDepth, Tile::kRows>::kRowBytes,
            values + group_row * GroupTile<kValueDepth, Tile::kRows>::kRowBytes, queries, queries + Tile::kStageKeyBytes, statistics,
            statistics + kGroupColumns, key_sum, value_sum);
      }
    }
    if (!more) break;
    segment = next;
    loaded = true;
  }
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
  Scale(key_sum, args.scale);
  find_rows(args.key_grad, args.key_partial);
  Deliver<T, kKeyDepth>(key_sum, grad_rows, partial, args.key_depth, true, launch.key_first, launch.key_last, launch.key_write);
  find_rows(args.value_grad, args.value_partial);
  Deliver<T, kValueDepth>(value_sum, grad_rows, partial, args.value_depth, true, launch.key_first, launch.key_last, launch.key_write);
#endif
}

}  // namespace cuda
}  // namespace stf

#endif  // STF_CUSTOM_OPS_ATTENTION_CUDA_GROUP_KERNELS_CUH_
