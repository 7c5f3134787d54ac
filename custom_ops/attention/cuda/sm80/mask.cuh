// The part of the sets that a warp works on: its walk over tiles, and the mask of 16 rows by a segment.
#ifndef STF_CUSTOM_OPS_ATTENTION_CUDA_SM80_MASK_CUH_
#define STF_CUSTOM_OPS_ATTENTION_CUDA_SM80_MASK_CUH_

#include "custom_ops/attention/cuda/common/sets.cuh"

namespace stf {
namespace cuda {

// A piece of one component's walk: keys (or queries) [begin, begin + count).
struct Segment {
  Component component;  // a copy, so that it lives in registers
  int begin, count;
};

// Walks the segments of all of a head's components that meet queries [first, last] (kByKey: that meet keys [first, last]), in order.
// Every warp walks for itself and finds the same.
template <bool kByKey, int kWidth>
class Walk {
 public:
  __device__ Walk(const Arguments& args, const Head& head, const View& view, int first, int last)
      : args_(args), head_(head), view_(view), first_(first), last_(last), left_(last < first ? 0 : head.members), next_(0), end_(0) {}

  __device__ bool Next(Segment* segment) {
    while (true) {
      while (next_ >= end_) {
        if (!left_) return false;
        component_ = head_.components[__ffsll(left_) - 1];
        left_ &= left_ - 1;
        if (kByKey) {
          next_ = QueriesOf(component_, view_, first_).low;
          end_ = min(QueriesOf(component_, view_, last_).high, view_.count);
        } else {
          next_ = KeysOf(component_, view_, first_).low;
          end_ = KeysOf(component_, view_, last_).high;
        }
      }
      *segment = {component_, next_, min(kWidth, end_ - next_)};
      next_ += kWidth;
      if (!Irregular(component_) || Any(segment->begin, segment->begin + segment->count - 1)) return true;
    }
  }

 private:
  __device__ bool Any(int begin, int last) const {
    return AnyPair(args_.layouts, component_, view_, kByKey ? begin : first_, kByKey ? last : last_, kByKey ? first_ : begin,
                   kByKey ? last_ : last);
  }

  const Arguments& args_;
  const Head& head_;
  const View& view_;
  int first_, last_;
  uint64_t left_;
  Component component_;
  int next_, end_;
};

// The mask of a warp's 16 rows by a segment's columns; in a thread, rows lane / 4 and lane / 4 + 8. Rows are queries and columns keys, or,
// kByKey, rows are keys and columns queries.
template <bool kByKey>
struct WarpMask {
  int reach_low, reach_high;    // columns that any row needs, counted from the segment's begin
  int common_low, common_high;  // columns that all rows need
  Interval rows[2];
  bool general;  // whether `Extra` has a say
  bool partial;  // whether some rows are not in use

  // Rows row_begin ... row_begin + 15; those from row_end on are not in use.
  __device__ WarpMask(const Head& head, const View& view, const Segment& segment, int row_begin, int row_end) {
    const Component& c = segment.component;
    const int last = min(row_begin + 15, row_end - 1);
    general = false;
    partial = row_begin + 15 >= row_end;
    reach_low = reach_high = 0;
    if (last < row_begin) return;
    const Interval top = Of(c, row_begin, view), bottom = Of(c, last, view);
    reach_low = max(0, top.low - segment.begin);
    reach_high = min(segment.count, bottom.high - segment.begin);
    if (reach_low >= reach_high) {
      reach_low = reach_high = 0;
      return;
    }
    common_low = bottom.low - segment.begin;
    common_high = min(segment.count, top.high - segment.begin);
    const int end = segment.begin + segment.count - 1;
    general = kByKey ? NeedsExtra(head, c, view, segment.begin, end, row_begin, last)
                     : NeedsExtra(head, c, view, row_begin, last, segment.begin, end);
    for (int r = 0; r < 2; r++) {
      const int row = row_begin + threadIdx.x % 32 / 4 + 8 * r;
      rows[r] = row <= last ? Of(c, row, view) : Interval{0, 0};
      rows[r] = {rows[r].low - segment.begin, min(segment.count, rows[r].high - segment.begin)};
    }
  }

  __device__ bool Reaches(int begin, int end) const { return begin < reach_high && end > reach_low; }
  __device__ bool Cuts(int begin, int end) const { return general || partial || begin < common_low || end > common_high; }

  // Of the thread's kBlocks * 4 elements of an accumulator (see mma.cuh) whose columns begin at `begin`, a bit for each that may stand.
  template <int kBlocks>
  __device__ uint32_t Allowed(const Arguments& args, const Head& head, const View& view, const Segment& segment, int row_begin,
                              int begin) const {
    uint32_t bits = 0;
#pragma unroll
    for (int x = 0; x < kBlocks * 4; x++) {
      const int column = begin + x / 4 * 8 + threadIdx.x % 4 * 2 + x % 2;
      const Interval& row = rows[x / 2 % 2];
      if (column >= row.low && column < row.high) bits |= 1u << x;
    }
    return general ? LeaveOut<kByKey>(args, head, view, segment.component, row_begin, segment.begin + begin, bits) : bits;
  }

 private:
  __device__ static Interval Of(const Component& c, int row, const View& view) {
    return kByKey ? QueriesOf(c, view, row) : KeysOf(c, view, row);
  }
};

}  // namespace cuda
}  // namespace stf

#endif  // STF_CUSTOM_OPS_ATTENTION_CUDA_SM80_MASK_CUH_
