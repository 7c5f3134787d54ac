// Which keys each query may attend to, seen from the queries and from the keys.
//
// Within a component, the keys of a query are an interval of key indices (of the component's own numbering), the queries of a key are an
// interval of queries, and the ends of both grow. So a tile visits a range, a warp's part of it is a range again, and a mask is two
// comparisons. Block layouts and exclusions come on top, in segments that need them only.
#ifndef STF_CUSTOM_OPS_ATTENTION_CUDA_COMMON_SETS_CUH_
#define STF_CUSTOM_OPS_ATTENTION_CUDA_COMMON_SETS_CUH_

#include "custom_ops/attention/cuda/common/arguments.h"

namespace stf {
namespace cuda {

struct Interval {
  int low, high;  // low <= x < high
};

// A sequence of queries: query m stands at position start + m * step; `count` of them are in use.
struct View {
  int start, step, count;
  __device__ int Position(int m) const { return start + m * step; }
};

// Keys are numbered within a component: in a strided view as the queries are, in a summary by the columns in use, else by position.
__device__ inline int KeyPosition(const Component& c, const View& view, int t) {
  if (c.kind == STF_STRIDED) return view.Position(t);
  if (c.kind != STF_SUMMARY) return t;
  const int block = static_cast<int>(static_cast<uint64_t>(t) * c.reciprocal >> c.shift);
  return t + c.b + block * (c.a - (c.c - c.b));
}

// Of several queries at once, which the component's kind is looked at once for.
template <int kCount>
__device__ inline void KeysOf(const Component& c, const int (&queries)[kCount], Interval (&keys)[kCount]) {
  const auto each = [&](auto keys_of) {
#pragma unroll
    for (int i = 0; i < kCount; i++) keys[i] = keys_of(queries[i]);
  };
  switch (c.kind) {
    case STF_LOCAL:
      return each([&](int m) { return Interval{max(0, m - c.a), m + 1}; });
    case STF_STRIDED:
      return each([&](int m) { return Interval{0, max(0, m + 1 - c.b)}; });
    case STF_OWN_BLOCK:
      return each([&](int m) { return Interval{m / c.a * c.a, m + 1}; });
    case STF_SUMMARY:
      return each([&](int m) {
        const int width = c.c - c.b, block = m / c.a;
        return Interval{0, block * width + (c.d ? min(width, max(0, m - block * c.a + 1 - c.b)) : 0)};
      });
    default:
      return each([&](int m) { return Interval{0, m + 1}; });
  }
}

// Of several keys at once, as above; `count` queries are in use.
template <int kCount>
__device__ inline void QueriesOf(const Component& c, const int (&keys)[kCount], int count, Interval (&queries)[kCount]) {
  const auto each = [&](auto queries_of) {
#pragma unroll
    for (int i = 0; i < kCount; i++) queries[i] = queries_of(keys[i]);
  };
  switch (c.kind) {
    case STF_LOCAL:
      return each([&](int t) { return Interval{t, min(count, t + c.a + 1)}; });
    case STF_STRIDED:
      return each([&](int t) { return Interval{t + c.b, count}; });
    case STF_OWN_BLOCK:
      return each([&](int t) { return Interval{t, min(count, (t / c.a + 1) * c.a)}; });
    case STF_SUMMARY:
      return each([&](int t) {
        const int width = c.c - c.b, block = t / width;
        return Interval{c.d ? block * c.a + c.b + t - block * width : (block + 1) * c.a, count};
      });
    default:
      return each([&](int t) { return Interval{t, count}; });
  }
}

__device__ inline Interval KeysOf(const Component& c, int query) {
  const int queries[1] = {query};
  Interval keys[1];
  KeysOf(c, queries, keys);
  return keys[0];
}

__device__ inline Interval QueriesOf(const Component& c, int key, int count) {
  const int keys[1] = {key};
  Interval queries[1];
  QueriesOf(c, keys, count, queries);
  return queries[0];
}

__device__ inline bool LayoutBit(const uint8_t* layouts, const Component& c, int row, int column) {
  const int64_t bit = c.bits + static_cast<int64_t>(row) * c.c + column;
  return (layouts[bit >> 3] >> (bit & 7)) & 1;
}

// Whether query position i may attend to key position j <= i through component c, exclusions apart.
__device__ inline bool Covers(const uint8_t* layouts, const Component& c, int i, int j) {
  switch (c.kind) {
    case STF_LOCAL:
      return i - j <= c.a;
    case STF_STRIDED:
      return (i - j) % c.a == 0 && i - j >= static_cast<int64_t>(c.b) * c.a;
    case STF_OWN_BLOCK:
      return i / c.a == j / c.a;
    case STF_SUMMARY: {
      const int column = j % c.a;
      return column >= c.b && column < c.c && (c.d || j / c.a < i / c.a);
    }
    case STF_BLOCKS:
      return LayoutBit(layouts, c, i / c.a, j / c.a);
    default:
      return true;
  }
}

// A head's components of one launch.
struct Head {
  const Component* components;  // what `exclude` bits count from
  uint64_t members;
};

// What the intervals do not tell: block layouts and exclusions of component c.
__device__ inline bool Extra(const uint8_t* layouts, const Head& head, const Component& c, const View& view, int m, int t) {
  const int i = view.Position(m), j = KeyPosition(c, view, t);
  if (j > i) return false;
  if (c.kind == STF_BLOCKS && !LayoutBit(layouts, c, i / c.a, j / c.a)) return false;
  for (uint64_t left = c.exclude; left; left &= left - 1) {
    if (Covers(layouts, head.components[__ffsll(left) - 1], i, j)) return false;
  }
  return true;
}

// Whether pairs of queries [m0, m1] and keys [t0, t1] need `Extra` at all.
__device__ inline bool NeedsExtra(const Head& head, const Component& c, const View& view, int m0, int m1, int t0, int t1) {
  if (c.kind == STF_BLOCKS) return true;
  if (!c.exclude) return false;
  const int i0 = view.Position(m0), i1 = view.Position(m1), j0 = KeyPosition(c, view, t0), j1 = KeyPosition(c, view, t1);
  for (uint64_t left = c.exclude; left; left &= left - 1) {
    const Component& e = head.components[__ffsll(left) - 1];
    if (e.kind == STF_LOCAL && i0 - j1 > e.a) continue;
    if (e.kind == STF_OWN_BLOCK && i0 / e.a > j1 / e.a) continue;
    if (e.kind == STF_STRIDED && i1 - j0 < static_cast<int64_t>(e.b) * e.a) continue;
    return true;
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
