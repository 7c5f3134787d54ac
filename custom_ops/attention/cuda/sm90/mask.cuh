// Which pairs of a warpgroup's 64 rows and a segment's columns stand: found once for all segments of a component.
#ifndef STF_CUSTOM_OPS_ATTENTION_CUDA_SM90_MASK_CUH_
#define STF_CUSTOM_OPS_ATTENTION_CUDA_SM90_MASK_CUH_

#include "custom_ops/attention/cuda/common/scheduler.cuh"
#include "custom_ops/attention/cuda/common/softmax.cuh"

namespace stf {
namespace cuda {

// A piece of one component's walk, as Segment, the component where it lies.
struct WarpgroupSegment {
  const Component* component;
  int begin, count;
  __device__ bool Meets(const Interval& interval) const { return begin < interval.high && begin + count > interval.low; }
};

constexpr Interval kNothing = {INT32_MAX, 0};

// What a thread's two rows, and its warpgroup's 64, need of one component: intervals of its numbering of columns. Found once for all
// segments of the component.
template <bool kByKey, bool kGeneral>
struct WarpgroupMask {
  const Component* component = nullptr;
  Interval rows[2], reach, common;  // the thread's rows' own; what any row of the warpgroup needs; what all do

  // Rows warpgroup_begin ... warpgroup_begin + 63; those from row_end on are not in use.
  __device__ void Find(const Component* of, const View& view, int warpgroup_begin, int row_end) {
    component = of;
    const int last = min(warpgroup_begin + 63, row_end - 1), row = warpgroup_begin + threadIdx.x / 32 % 4 * 16 + threadIdx.x % 32 / 4;
    reach = {0, 0};
    common = kNothing;
    rows[0] = rows[1] = {0, 0};
    if (last < warpgroup_begin) return;
    const int of_rows[4] = {warpgroup_begin, last, min(row, last), min(row + 8, last)};
    Interval found[4];
    if constexpr (kByKey) {
      QueriesOf(*of, view, of_rows, found);
    } else {
      KeysOf(*of, view, of_rows, found);
    }
    reach = {found[0].low, found[1].high};
    if (last == warpgroup_begin + 63) common = {found[1].low, found[0].high};
    if (row <= last) rows[0] = found[2];
    if (row + 8 <= last) rows[1] = found[3];
  }

  __device__ bool Reaches(const WarpgroupSegment& segment) const { return segment.Meets(reach); }

  // Calls leave_out(block, e) for each element of the thread's accumulators that may not stand. Returns whether there may be any, the same
  // for the whole warpgroup.
  template <typename LeaveOutElement>
  __device__ bool Apply(const Context& context, const WarpgroupSegment& segment, int warpgroup_begin, int row_end,
                        LeaveOutElement leave_out) const {
    const Component& c = *component;
    const int end = segment.begin + segment.count, last = min(warpgroup_begin + 63, row_end - 1);
    const bool general = kGeneral && (c.exclude || Irregular(c)) &&
                         (kByKey ? NeedsExtra(context.head, c, context.view, segment.begin, end - 1, warpgroup_begin, last)
                                 : NeedsExtra(context.head, c, context.view, warpgroup_begin, last, segment.begin, end - 1));
    const bool low_cuts = segment.begin<common.low, high_cuts = segment.begin + kStageRows> common.high;
    if (!general && !low_cuts && !high_cuts) return false;
    const int lane_column = segment.begin + threadIdx.x % 4 * 2;
    if (!kGeneral || !general) {
      int low[2], high[2];
#pragma unroll
      for (int r = 0; r < 2; r++) {
        low[r] = rows[r].low - lane_column;
        high[r] = min(rows[r].high, end) - lane_column;
      }
      const auto each = [&](auto cut) {
#pragma unroll
        for (int b = 0; b < kStageRows / 8; b++) {
#pragma unroll
          for (int e = 0; e < 4; e++) {
            if (cut(8 * b + e % 2, e / 2)) leave_out(b, e);
          }
        }
      };
      if (!low_cuts) {
        each([&](int column, int r) { return column >= high[r]; });
      } else if (!high_cuts) {
        each([&](int column, int r) { return column < low[r]; });
      } else {
        each([&](int column, int r) { return column < low[r] || column >= high[r]; });
      }
      return true;
    }
#pragma unroll
    for (int unit = 0; unit < kStageRows / kUnit; unit++) {
      uint32_t bits = 0;
#pragma unroll
      for (int x = 0; x < kUnit / 2; x++) {
        const int column = lane_column + unit * kUnit + x / 4 * 8 + x % 2;
        const Interval& row = rows[x / 2 % 2];
        if (column >= row.low && column < min(row.high, end)) bits |= 1u << x;
      }
      bits = LeaveOut<kByKey>(context.args, context.head, context.view, c, warpgroup_begin + threadIdx.x / 32 % 4 * 16,
                              segment.begin + unit * kUnit, bits);
#pragma unroll
      for (int x = 0; x < kUnit / 2; x++) {
        if (!(bits >> x & 1)) leave_out(unit * kUnit / 8 + x / 4, x % 4);
      }
    }
    return true;
  }
};

// Walk (sm80/mask.cuh) for a block: segments of kStageRows.
template <bool kByKey, bool kGeneral>
class WarpgroupWalk {
 public:
  __device__ WarpgroupWalk(const Context& context, int first, int last)
      : context_(context), first_(first), last_(last), left_(last < first ? 0 : context.head.members) {}

  __device__ bool Next(WarpgroupSegment* segment) {
    while (true) {
      while (next_ >= end_) {
        if (!left_) return false;
        component_ = context_.head.components + (__ffsll(left_) - 1);
        left_ &= left_ - 1;
        const Component& c = *component_;
        const View& view = context_.view;
        next_ = (kByKey ? QueriesOf(c, view, first_) : KeysOf(c, view, first_)).low;
        end_ = kByKey ? min(QueriesOf(c, view, last_).high, view.count) : KeysOf(c, view, last_).high;
        // Columns of a summary are copied some at a time, from a block's first on.
        if (!kByKey && view.documents && c.kind == STF_SUMMARY) next_ = static_cast<int>(SummaryBlock(c, next_)) * (c.c - c.b);
      }
      *segment = {component_, next_, min(kStageRows, end_ - next_)};
      next_ += kStageRows;
      if (!kGeneral || !Irregular(*component_) || Any(segment->begin, segment->begin + segment->count - 1)) return true;
    }
  }

 private:
  __device__ bool Any(int begin, int last) const {
    return AnyPair(context_.args.layouts, *component_, context_.view, kByKey ? begin : first_, kByKey ? last : last_,
                   kByKey ? first_ : begin, kByKey ? last_ : last);
  }

  const Context& context_;
  const int first_, last_;
  uint64_t left_;
  const Component* component_ = nullptr;
  int next_ = 0, end_ = 0;
};

}  // namespace cuda
}  // namespace stf

#endif  // STF_CUSTOM_OPS_ATTENTION_CUDA_SM90_MASK_CUH_
