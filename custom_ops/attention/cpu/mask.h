// Which keys a query tile visits, and which of them each query may attend to.
//
// Within a component, the keys of a query are an interval [low, high) of key indices (for block layouts: of the keys of one column of
// blocks), and both ends grow with the query. So a tile's keys are a range, cut into segments; in a segment each lane has an interval; and
// a 16 x 16 corner that no lane reaches is not computed, one that every lane covers needs no mask.
#ifndef STF_CUSTOM_OPS_ATTENTION_CPU_MASK_H_
#define STF_CUSTOM_OPS_ATTENTION_CPU_MASK_H_

#include "custom_ops/attention/cpu/kernels.h"
#include "custom_ops/attention/cpu/simd.h"
#include "custom_ops/attention/sets.h"  // behind simd.h, which names the instruction set

namespace stf {
namespace cpu {
namespace STF_ISA {

using Interval = stf::Interval<int64_t>;
using View = stf::View<int64_t>;

inline int64_t Least(int64_t a, int64_t b) { return stf::Least(a, b); }
inline int64_t Most(int64_t a, int64_t b) { return stf::Most(a, b); }

// A tile's keys in one component, at most kKeys of them.
struct Segment {
  const stf_component* component;
  int64_t begin;
  int count;
};

// Walks the segments of one component for a query tile, keys ascending.
struct Cursor {
  const stf_component* component;
  int64_t next, end;  // key indices

  bool Done() const { return next >= end; }
};

// From where on the blocks of an irregular component are counted for queries first ... last; kNowhere where that is not one position: they
// are of several documents, or of none.
constexpr int64_t kNowhere = -1;
inline int64_t Origin(const View& view, const stf_component& c, int64_t first, int64_t last) {
  if (!view.documents || !Restarts(c)) return 0;
  const int64_t origin = view.FirstKey(first);
  return origin <= first && view.FirstKey(last) == origin ? origin : kNowhere;
}

inline bool SameColumn(const stf_problem& problem, const stf_component& c, int64_t row_begin, int64_t row_end, int64_t x, int64_t y) {
  for (int64_t row = row_begin; row <= row_end; row++) {
    if (LayoutBit(problem.layouts, c, row, x) != LayoutBit(problem.layouts, c, row, y)) return false;
  }
  return true;
}

// Whether a segment keeps to columns that the tile's queries use alike: columns of a layout's blocks, or those of a summary, where more
// than a few lie between them.
inline bool ByColumns(const stf_component& c, int64_t origin) {
  return origin != kNowhere && (c.kind == STF_BLOCKS || (c.kind == STF_COLUMNS && c.a - (c.c - c.b) >= kGranule));
}

// Moves an irregular component's cursor over columns that no row of the tile uses.
inline void SkipEmpty(const stf_problem& problem, const View& view, int64_t first, int64_t last, Cursor* cursor) {
  const stf_component& c = *cursor->component;
  const int64_t origin = Irregular(c) ? Origin(view, c, first, last) : kNowhere;
  if (!ByColumns(c, origin)) return;
  if (c.kind == STF_COLUMNS) {
    const int64_t column = (cursor->next - origin) % c.a;
    if (column < c.b) cursor->next += c.b - column;
    if (column >= c.c) cursor->next += c.a + c.b - column;
    return;
  }
  while (!cursor->Done()) {
    const int64_t column = (cursor->next - origin) / c.a;
    for (int64_t row = (first - origin) / c.a; row <= (last - origin) / c.a; row++) {
      if (LayoutBit(problem.layouts, c, row, column)) return;
    }
    cursor->next = origin + (column + 1) * c.a;
  }
}

// The cursor of queries first ... last (both in the sequence).
inline Cursor Begin(const stf_problem& problem, const View& view, const stf_component& c, int64_t first, int64_t last) {
  Cursor cursor = {&c, KeysOf(c, view, first).low, KeysOf(c, view, last).high};
  SkipEmpty(problem, view, first, last, &cursor);
  return cursor;
}

inline Segment Take(const stf_problem& problem, const View& view, int64_t first, int64_t last, Cursor* cursor) {
  const stf_component& c = *cursor->component;
  int64_t end = Least(cursor->next + kKeys, cursor->end);
  const int64_t origin = Irregular(c) ? Origin(view, c, first, last) : kNowhere;
  if (ByColumns(c, origin)) {
    const int64_t column = (cursor->next - origin) / c.a, row_begin = (first - origin) / c.a, row_end = (last - origin) / c.a;
    int64_t run = column + 1;  // as many columns of blocks as the tile's rows use alike
    while (c.kind == STF_BLOCKS && origin + run * c.a < end && SameColumn(problem, c, row_begin, row_end, column, run)) run++;
    end = Least(end, origin + (c.kind == STF_BLOCKS ? run * c.a : column * c.a + c.c));
  }
  const Segment segment = {&c, cursor->next, static_cast<int>(end - cursor->next)};
  cursor->next = end;
  SkipEmpty(problem, view, first, last, cursor);
  return segment;
}

// Keys [begin, end) of a segment by granules of lanes [granule_begin, granule_end): what a matrix product computes at once.
struct Strip {
  int begin, end, granule_begin, granule_end;
};

struct SegmentMask {
  Strip strips[kKeys / kGranule];
  int strip_count;
  bool cut[kKeys / kGranule];         // whether the 16 keys need the mask
  int32_t low[kLanes], high[kLanes];  // each lane's interval, counted from the segment's begin
  bool excludes;                      // whether `left_out` matters
  uint64_t left_out[kKeys];           // a bit for each lane: pairs of an earlier component, or not of this one's set
};

// Leaves out the pairs of a segment that component `of` covers, or, where `inverted`, those that it does not.
inline void LeaveOut(const stf_problem& problem, const View& view, int64_t first, int lanes, const Segment& segment,
                     const stf_component& of, bool inverted, SegmentMask* mask) {
  const stf_component& c = *segment.component;
  if (!mask->excludes) {
    for (int t = 0; t < kKeys; t++) mask->left_out[t] = 0;
  }
  mask->excludes = true;
  for (int t = 0; t < segment.count; t++) {
    const int64_t j = KeyPosition(c, view, segment.begin + t);
    for (int lane = 0; lane < lanes; lane++) {
      const int64_t i = view.Position(first + lane), origin = view.Origin(i);
      if (j > i || j < origin) continue;  // no pair anyway
      if (Covers(problem.layouts, of, i, j, origin) != inverted) mask->left_out[t] |= uint64_t{1} << lane;
    }
  }
}

// Whether an irregular component has all of a segment's pairs that are in the queries' intervals; of a layout, in those of rows that use
// it.
inline bool Whole(const View& view, int64_t first, int64_t last, const Segment& segment) {
  const stf_component& c = *segment.component;
  const int64_t origin = Origin(view, c, first, last);
  if (!ByColumns(c, origin) || c.kind == STF_BLOCKS) return ByColumns(c, origin);
  const int64_t i = first - origin, j = segment.begin + segment.count - 1 - origin;
  return c.d == 1 || j / c.a < i / c.a || (c.d && i - j >= c.d - 1);
}

inline void FindLeftOut(const stf_problem& problem, const Pass& pass, const View& view, int64_t first, int lanes, const Segment& segment,
                        SegmentMask* mask) {
  const stf_component& c = *segment.component;
  mask->excludes = false;
  if (Irregular(c) && !Whole(view, first, first + lanes - 1, segment)) LeaveOut(problem, view, first, lanes, segment, c, true, mask);
  if (c.exclude == 0) return;
  const int64_t i0 = view.Position(first), i1 = view.Position(first + lanes - 1);
  const int64_t j0 = KeyPosition(c, view, segment.begin), j1 = KeyPosition(c, view, segment.begin + segment.count - 1);
  for (int e = 0; e < 63 && (c.exclude >> e) != 0; e++) {
    if (!((c.exclude >> e) & 1) || !MayCover(pass.program[e], i0, i1, j0, j1)) continue;
    LeaveOut(problem, view, first, lanes, segment, pass.program[e], false, mask);
  }
}

// The mask of queries first ... first + lanes - 1 in a segment. Lanes past the last repeat it, so that they never widen anything.
inline void FindMask(const stf_problem& problem, const Pass& pass, const View& view, int64_t first, int lanes, const Segment& segment,
                     SegmentMask* mask) {
  const stf_component& c = *segment.component;
  const int64_t last = first + lanes - 1;
  const int granules = (lanes + kGranule - 1) / kGranule, blocks = (segment.count + kGranule - 1) / kGranule;
  const int64_t origin = c.kind == STF_BLOCKS ? Origin(view, c, first, last) : kNowhere;
  const bool by_bits = origin != kNowhere;  // a row has the segment whole or not at all
  FindLeftOut(problem, pass, view, first, lanes, segment, mask);
  if (!by_bits && !mask->excludes && KeysOf(c, view, last).low <= segment.begin &&
      KeysOf(c, view, first).high >= segment.begin + segment.count) {
    mask->strips[0] = {0, segment.count, 0, granules};
    mask->strip_count = 1;
    for (int b = 0; b < blocks; b++) mask->cut[b] = false;
    return;
  }
  for (int lane = 0; lane < granules * kGranule; lane++) {
    const int64_t m = first + (lane < lanes ? lane : lanes - 1);
    Interval keys = KeysOf(c, view, m);
    if (by_bits && !LayoutBit(problem.layouts, c, (m - origin) / c.a, (segment.begin - origin) / c.a)) keys.high = 0;
    const int64_t high = Most(0, Least(segment.count, keys.high - segment.begin));
    mask->low[lane] = static_cast<int32_t>(Most(0, Least(high, keys.low - segment.begin)));
    mask->high[lane] = static_cast<int32_t>(high);
  }
  int reach_low[kLanes / kGranule], reach_high[kLanes / kGranule];    // of any lane of the granule
  int common_low[kLanes / kGranule], common_high[kLanes / kGranule];  // of every lane
  for (int g = 0; g < granules; g++) {
    reach_low[g] = common_high[g] = kKeys;
    reach_high[g] = common_low[g] = 0;
    for (int lane = g * kGranule; lane < (g + 1) * kGranule; lane++) {
      const int low = mask->low[lane], high = mask->high[lane];
      common_low[g] = low > common_low[g] ? low : common_low[g];
      common_high[g] = high < common_high[g] ? high : common_high[g];
      if (low >= high) continue;
      reach_low[g] = low < reach_low[g] ? low : reach_low[g];
      reach_high[g] = high > reach_high[g] ? high : reach_high[g];
    }
  }
  mask->strip_count = 0;
  for (int b = 0; b < blocks; b++) {
    const int begin = b * kGranule, end = static_cast<int>(Least(begin + kGranule, segment.count));
    int granule_begin = granules, granule_end = 0;
    for (int g = 0; g < granules; g++) {
      if (reach_low[g] >= end || reach_high[g] <= begin) continue;
      granule_begin = g < granule_begin ? g : granule_begin;
      granule_end = g + 1;
    }
    if (granule_begin >= granule_end) continue;
    bool cut = mask->excludes;
    for (int g = granule_begin; g < granule_end; g++) cut = cut || common_low[g] > begin || common_high[g] < end;
    mask->cut[b] = cut;
    Strip* previous = mask->strip_count ? &mask->strips[mask->strip_count - 1] : nullptr;
    if (previous && previous->end == begin && previous->granule_begin == granule_begin && previous->granule_end == granule_end) {
      previous->end = end;
    } else {
      mask->strips[mask->strip_count++] = {begin, end, granule_begin, granule_end};
    }
  }
}

// All ones where lanes lane ... lane + kWidth - 1 may attend to key t of the segment.
inline __attribute__((always_inline)) IntVec Allowed(const SegmentMask& mask, int t, int lane) {
  const IntVec key = BroadcastInt(t);
  IntVec allowed = (key >= LoadInt(mask.low + lane)) & (key < LoadInt(mask.high + lane));
  if (mask.excludes) {
    for (int i = 0; i < kWidth; i++) {
      if ((mask.left_out[t] >> (lane + i)) & 1) allowed[i] = 0;
    }
  }
  return allowed;
}

}  // namespace STF_ISA
}  // namespace cpu
}  // namespace stf

#endif  // STF_CUSTOM_OPS_ATTENTION_CPU_MASK_H_
