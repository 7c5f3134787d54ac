// The sets (custom_ops/attention/sets.h) as the kernels use them: of several rows at once, and with what intervals do not tell.
#ifndef STF_CUSTOM_OPS_ATTENTION_CUDA_COMMON_SETS_CUH_
#define STF_CUSTOM_OPS_ATTENTION_CUDA_COMMON_SETS_CUH_

#include "custom_ops/attention/cuda/common/arguments.h"

namespace stf {
namespace cuda {

using Interval = stf::Interval<int32_t>;
using View = stf::View<int32_t>;
using stf::KeysOf;
using stf::QueriesOf;

// Of several queries at once: the component's kind is looked at once.
template <int kCount>
__device__ inline void KeysOf(const Component& c, const View& view, const int (&queries)[kCount], Interval (&keys)[kCount]) {
  VisitKeysOf(c, view, [&](auto keys_of) {
#pragma unroll
    for (int i = 0; i < kCount; i++) keys[i] = keys_of(queries[i]);
  });
}

// Of several keys at once, as above.
template <int kCount>
__device__ inline void QueriesOf(const Component& c, const View& view, const int (&keys)[kCount], Interval (&queries)[kCount]) {
  VisitQueriesOf(c, view, [&](auto queries_of) {
#pragma unroll
    for (int i = 0; i < kCount; i++) queries[i] = queries_of(keys[i]);
  });
}

// A head's components of one launch.
struct Head {
  const Component* components;  // what `exclude` bits count from
  uint64_t members;
};

// What the intervals do not tell: exclusions of component c, and its own set where that is irregular.
__device__ inline bool Extra(const uint8_t* layouts, const Head& head, const Component& c, const View& view, int m, int t) {
  const int i = view.Position(m), j = KeyPosition(c, view, t);
  if (j > i) return false;
  const int origin = view.Origin(i);
  if (j < origin) return false;
  if (Irregular(c) && !Covers(layouts, c, i, j, origin)) return false;
  for (uint64_t left = c.exclude; left; left &= left - 1) {
    if (Covers(layouts, head.components[__ffsll(left) - 1], i, j, origin)) return false;
  }
  return true;
}

// Whether pairs of queries [m0, m1] and keys [t0, t1] need `Extra` at all.
__device__ inline bool NeedsExtra(const Head& head, const Component& c, const View& view, int m0, int m1, int t0, int t1) {
  if (Irregular(c)) return true;
  if (!c.exclude) return false;
  const int i0 = view.Position(m0), i1 = view.Position(m1), j0 = KeyPosition(c, view, t0), j1 = KeyPosition(c, view, t1);
  for (uint64_t left = c.exclude; left; left &= left - 1) {
    if (MayCover(head.components[__ffsll(left) - 1], i0, i1, j0, j1)) return true;
  }
  return false;
}

// Whether a layout has a block that queries [i0, i1] and keys [j0, j1] touch. For a whole warp.
__device__ inline bool AnyBit(const uint8_t* layouts, const Component& c, int i0, int i1, int j0, int j1) {
  const int row = i0 / c.a, rows = i1 / c.a - row + 1, column = j0 / c.a, columns = j1 / c.a - column + 1;
  bool any = false;
  for (int x = threadIdx.x % 32; x < rows * columns; x += 32) {
    any = any || LayoutBit(layouts, c, row + x / columns, column + x % columns);
  }
  return __any_sync(~0u, any);
}

// Whether an irregular component may have a pair of queries [i0, i1] and keys [j0, j1], whose intervals meet. For a whole warp.
__device__ inline bool AnyPair(const uint8_t* layouts, const Component& c, const View& view, int i0, int i1, int j0, int j1) {
  int origin = 0;
  if (Restarts(c)) {
    origin = view.Origin(i0);
    if (origin > i0 || view.Origin(i1) != origin) return true;  // of several documents, or of none
    j0 = max(j0, origin);
    if (j1 < j0) return false;
  }
  if (c.kind == STF_BLOCKS) return AnyBit(layouts, c, i0 - origin, i1 - origin, j0 - origin, j1 - origin);
  const int begin = (j0 - origin) % c.a, end = begin + j1 - j0;  // columns
  return (begin < c.c && end >= c.b) || end >= c.a + c.b;
}

// Clears the bits that `Extra` leaves out, of columns from `begin` on; bits as WarpMask::Allowed has them.
template <bool kByKey>
__device__ __noinline__ uint32_t LeaveOut(const Arguments& args, const Head& head, const View& view, const Component& component,
                                          int row_begin, int begin, uint32_t bits) {
  for (uint32_t left = bits; left; left &= left - 1) {
    const int x = __ffs(left) - 1;
    const int row = row_begin + threadIdx.x % 32 / 4 + x / 2 % 2 * 8;
    const int other = begin + x / 4 * 8 + threadIdx.x % 4 * 2 + x % 2;
    if (!Extra(args.layouts, head, component, view, kByKey ? other : row, kByKey ? row : other)) bits &= ~(1u << x);
  }
  return bits;
}

}  // namespace cuda
}  // namespace stf

#endif  // STF_CUSTOM_OPS_ATTENTION_CUDA_COMMON_SETS_CUH_
