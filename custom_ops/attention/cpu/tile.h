// What forward and backward share: the view of an item, its keys as float32 rows, and the walk over a tile's segments.
#ifndef STF_CUSTOM_OPS_ATTENTION_CPU_TILE_H_
#define STF_CUSTOM_OPS_ATTENTION_CPU_TILE_H_

#include "custom_ops/attention/cpu/mask.h"
#include "custom_ops/attention/cpu/rows.h"

namespace stf {
namespace cpu {
namespace STF_ISA {

// Hands out 64-byte aligned pieces of a worker's scratch. With no memory behind it, it counts what would be needed.
class Scratch {
 public:
  explicit Scratch(char* memory) : base_(memory) {}
  float* Floats(int64_t count) {
    float* piece = reinterpret_cast<float*>(base_ + used_);
    used_ += (count * 4 + 63) / 64 * 64;
    return piece;
  }
  size_t used() const { return used_; }

 private:
  char* base_;
  size_t used_ = 0;
};

// The part of the item's sequence that is in use: positions past the batch row's length belong to no query and no key.
inline View ViewOf(const Arguments& args, const Item& item) {
  const stf_problem& problem = *args.problem;
  const int64_t positions = problem.lengths ? problem.lengths[item.batch] : problem.positions;
  const int64_t stride = item.pass->stride;
  const int64_t count = item.sequence < positions ? (positions - item.sequence + stride - 1) / stride : 0;
  return {item.sequence, stride, count, problem.documents ? problem.documents + 2 * item.batch * problem.positions : nullptr};
}

// Queries of the item's sequence, in use or not.
inline int64_t Queries(const Arguments& args, const Item& item) {
  const int64_t stride = item.pass->stride;
  return (args.problem->positions - item.sequence + stride - 1) / stride;
}

struct Keys {
  const float *key, *value;
  int64_t key_row, value_row;
};

// The keys of a segment: in place where that is float32 in whole vectors and neighbouring rows, else copied to scratch.
struct KeyReader {
  float *key, *value;  // scratch: kKeys rows, or the whole sequence
  bool whole;

  // Where the whole sequence is read, the next item's rows often lie right behind this one's (the next key head, or the next sequence's
  // first): they are asked for now, since rows a stride apart are no pattern that the processor would foresee.
  void Read(const Arguments& args, const Item& item, const stf_component& c, const View& view, int64_t begin, int64_t count) const {
    const stf_problem& p = *args.problem;
    const int64_t key_row = Padded(p.key_depth), value_row = Padded(p.value_depth);
    for (int64_t t = 0; t < count; t++) {
      const int64_t position = KeyPosition(c, view, begin + t);
      const char* key_from = Element(args.key, p.dtype, item.batch, position, item.key_head);
      const char* value_from = Element(args.value, p.dtype, item.batch, position, item.key_head);
      if (whole) {
        PrefetchNext(key_from, p.key_depth * ElementSize(p.dtype));
        PrefetchNext(value_from, p.value_depth * ElementSize(p.dtype));
      }
      ReadRow(key_from, p.dtype, p.key_depth, key + t * key_row);
      ReadRow(value_from, p.dtype, p.value_depth, value + t * value_row);
    }
  }

  Keys Get(const Arguments& args, const Item& item, const View& view, const Segment& segment) const {
    const stf_problem& p = *args.problem;
    const stf_component& c = *segment.component;
    const int64_t key_row = Padded(p.key_depth), value_row = Padded(p.value_depth);
    if (whole) return {key + segment.begin * key_row, value + segment.begin * value_row, key_row, value_row};
    if (p.dtype == STF_FLOAT32 && p.key_depth == key_row && p.value_depth == value_row && view.stride == 1 && c.kind != STF_SUMMARY) {
      return {reinterpret_cast<const float*>(Element(args.key, p.dtype, item.batch, segment.begin, item.key_head)),
              reinterpret_cast<const float*>(Element(args.value, p.dtype, item.batch, segment.begin, item.key_head)),
              args.key.position_stride, args.value.position_stride};
    }
    Read(args, item, c, view, segment.begin, segment.count);
    return {key, value, key_row, value_row};
  }
};

constexpr int kMostComponents = 63;  // of one head: what `exclude` has bits for

// The segments of all of a pass' components for one tile, by ascending first key position.
class Walk {
 public:
  Walk(const stf_problem& problem, const Pass& pass, const View& view, int64_t first, int64_t last)
      : problem_(problem), pass_(pass), view_(view), first_(first), last_(last) {
    for (int i = 0; i < pass.count; i++) cursors_[i] = Begin(problem, view, pass.program[pass.members[i]], first, last);
  }

  // The first position of all keys still to come, or `otherwise` where there are none.
  int64_t Position(int64_t otherwise) const {
    int64_t position = otherwise;
    for (int i = 0; i < pass_.count; i++) {
      if (!cursors_[i].Done()) position = Least(position, KeyPosition(*cursors_[i].component, view_, cursors_[i].next));
    }
    return position;
  }

  bool Next(Segment* segment) {
    int best = -1;
    int64_t best_position = 0;
    for (int i = 0; i < pass_.count; i++) {
      if (cursors_[i].Done()) continue;
      const int64_t position = KeyPosition(*cursors_[i].component, view_, cursors_[i].next);
      if (best < 0 || position < best_position) {
        best = i;
        best_position = position;
      }
    }
    if (best < 0) return false;
    *segment = Take(problem_, view_, first_, last_, &cursors_[best]);
    return true;
  }

 private:
  const stf_problem& problem_;
  const Pass& pass_;
  const View& view_;
  int64_t first_, last_;
  Cursor cursors_[kMostComponents];
};

// The scores of a segment: S^T [keys, lanes], strip by strip. `left` rows are keys (or values), `right` is [depth, kLanes].
inline void Scores(const SegmentMask& mask, const float* left, int64_t left_row, int64_t depth, const float* right, float* scores) {
  for (int s = 0; s < mask.strip_count; s++) {
    const Strip& strip = mask.strips[s];
    const int lane = strip.granule_begin * kGranule;
    Gemm(strip.end - strip.begin, (strip.granule_end - strip.granule_begin) * kGranule, depth,
         Left{left + strip.begin * left_row, left_row, 1}, right + lane, kLanes, scores + strip.begin * kLanes + lane, kLanes, false);
  }
}

}  // namespace STF_ISA
}  // namespace cpu
}  // namespace stf

#endif  // STF_CUSTOM_OPS_ATTENTION_CPU_TILE_H_
