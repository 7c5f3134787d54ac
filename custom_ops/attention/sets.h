// The sets of keys that components are: the only place that says what a kind covers. The CPU's kernels use it for stf_component, once for
// each instruction set, the GPU's for their own records of 32 bits.
//
// A component numbers its keys: strided ones as the sequence of queries is numbered, summaries by their columns in use, all others by
// position. In that numbering the keys of a query are an interval, the queries of a key are an interval of queries, and the ends of both
// grow. So a tile of rows visits a range, a part of its rows needs a part of that, and a mask is two comparisons. Block layouts and
// exclusions come on top: of a layout the intervals have all that is causal. Documents cut both intervals, and their ends still grow.
#ifndef STF_CUSTOM_OPS_ATTENTION_SETS_H_
#define STF_CUSTOM_OPS_ATTENTION_SETS_H_

#include <stdint.h>

#include "custom_ops/attention/problem.h"

#ifdef __CUDACC__
#define STF_SETS __device__ inline
#else
#define STF_SETS inline
#endif

// Compiled for several instruction sets (cpu/simd.h), a function has a name for each, so that the linker takes none for another's.
#ifdef STF_ISA
#define STF_SETS_NAMESPACE STF_ISA
#else
#define STF_SETS_NAMESPACE any_isa
#endif

namespace stf {
inline namespace STF_SETS_NAMESPACE {

template <typename Index>
STF_SETS Index Least(Index a, Index b) {
  return a < b ? a : b;
}
template <typename Index>
STF_SETS Index Most(Index a, Index b) {
  return a > b ? a : b;
}

template <typename Index>
struct Interval {
  Index low, high;  // low <= x < high
};

// A sequence of queries: query m stands at position start + m * stride; there are `count` of them. Pairs are of one document (see
// stf_problem, whose `documents` of a batch row these are, or null).
template <typename Index>
struct View {
  Index start, stride, count;
  const int32_t* documents = nullptr;

  STF_SETS Index Position(Index m) const { return start + m * stride; }
  STF_SETS Index Before(Index position) const { return position <= start ? 0 : (position - start - 1) / stride + 1; }  // queries

  // Whatever the numbers are, no further than a position behind the own one: a layout's bits are found by the distance.
  STF_SETS Index FirstKey(Index position) const { return Most<Index>(0, Least<Index>(documents[2 * position], position + 1)); }
  STF_SETS Index EndOfQueries(Index position) const { return documents[2 * position + 1]; }
  STF_SETS Index Origin(Index position) const { return documents ? FirstKey(position) : 0; }  // of the position's document
};

// What a record of components may do in a way of its own: the summary's block in which its column in use t lies, and where the bits of a
// layout begin.
STF_SETS int64_t SummaryBlock(const stf_component& c, int64_t t) { return t / (c.c - c.b); }
STF_SETS int64_t LayoutBegin(const stf_component& c) { return c.b; }

template <typename Component>
using IndexOf = decltype(Component::a);

// Whether a component's set is counted from a document's first position on.
template <typename Component>
STF_SETS bool Restarts(const Component& c) {
  return c.kind == STF_COLUMNS || ((c.kind == STF_OWN_BLOCK || c.kind == STF_BLOCKS) && c.d != 0);
}

// Whether a component's set is less than its intervals.
template <typename Component>
STF_SETS bool Irregular(const Component& c) {
  return c.kind == STF_BLOCKS || c.kind == STF_COLUMNS;
}

// How many of the keys that component c numbers stand before a position.
template <typename Component>
STF_SETS IndexOf<Component> KeysBefore(const Component& c, const View<IndexOf<Component>>& view, IndexOf<Component> position) {
  using Index = IndexOf<Component>;
  if (c.kind == STF_STRIDED) return view.Before(position);
  if (c.kind != STF_SUMMARY) return position;
  const Index width = c.c - c.b, block = position / c.a;
  return block * width + Least<Index>(width, Most<Index>(0, position - block * c.a - c.b));
}

// Position of key t.
template <typename Component>
STF_SETS IndexOf<Component> KeyPosition(const Component& c, const View<IndexOf<Component>>& view, IndexOf<Component> t) {
  if (c.kind == STF_STRIDED) return view.Position(t);
  if (c.kind != STF_SUMMARY) return t;
  return t + c.b + SummaryBlock(c, t) * (c.a - (c.c - c.b));
}

// Calls visit(keys_of), where keys_of(m) is the interval of query m's keys, whatever their documents: for many queries the kind is looked
// at once.
template <typename Component, typename Visit>
STF_SETS void VisitAllKeysOf(const Component& c, Visit visit) {
  using Index = IndexOf<Component>;
  using Keys = Interval<Index>;
  switch (c.kind) {
    case STF_LOCAL:
      return visit([&](Index m) { return Keys{Most<Index>(0, m - c.a), m + 1}; });
    case STF_STRIDED:
      return visit([&](Index m) { return Keys{0, Most<Index>(0, m + 1 - c.b)}; });
    case STF_OWN_BLOCK:
      return visit([&](Index m) { return Keys{m / c.a * c.a, m + 1}; });
    case STF_SUMMARY:
      return visit([&](Index m) {
        const Index width = c.c - c.b, block = m / c.a;
        return Keys{0, block * width + (c.d ? Least<Index>(width, Most<Index>(0, m - block * c.a + 2 - c.d - c.b)) : 0)};
      });
    default:
      return visit([&](Index m) { return Keys{0, m + 1}; });
  }
}

// The same within documents.
template <typename Component, typename Visit>
STF_SETS void VisitKeysOf(const Component& c, const View<IndexOf<Component>>& view, Visit visit) {
  using Index = IndexOf<Component>;
  VisitAllKeysOf(c, [&](auto keys_of) {
    if (!view.documents) return visit(keys_of);
    visit([&](Index m) {
      Interval<Index> keys = keys_of(m);
      const Index first = view.FirstKey(view.Position(m));
      if (c.kind == STF_OWN_BLOCK && Restarts(c)) keys.low = first + (m - first) / c.a * c.a;
      keys.low = Most(keys.low, KeysBefore(c, view, first));
      return keys;
    });
  });
}

// Calls visit(queries_of), where queries_of(t) is the interval of the queries, of `count`, that key t is a key of, whatever their
// documents.
template <typename Component, typename Visit>
STF_SETS void VisitAllQueriesOf(const Component& c, IndexOf<Component> count, Visit visit) {
  using Index = IndexOf<Component>;
  using Queries = Interval<Index>;
  switch (c.kind) {
    case STF_LOCAL:
      return visit([&](Index t) { return Queries{t, Least<Index>(count, t + c.a + 1)}; });
    case STF_STRIDED:
      return visit([&](Index t) { return Queries{t + c.b, count}; });
    case STF_OWN_BLOCK:
      return visit([&](Index t) { return Queries{t, Least<Index>(count, (t / c.a + 1) * c.a)}; });
    case STF_SUMMARY:
      return visit([&](Index t) {
        const Index width = c.c - c.b, block = t / width;
        const Index own = block * c.a + c.b + t - block * width + c.d - 1, next = (block + 1) * c.a;
        return Queries{c.d ? Least(own, next) : next, count};
      });
    default:
      return visit([&](Index t) { return Queries{t, count}; });
  }
}

// The same within documents, of the view's queries.
template <typename Component, typename Visit>
STF_SETS void VisitQueriesOf(const Component& c, const View<IndexOf<Component>>& view, Visit visit) {
  using Index = IndexOf<Component>;
  VisitAllQueriesOf(c, view.count, [&](auto queries_of) {
    if (!view.documents) return visit(queries_of);
    visit([&](Index t) {
      Interval<Index> queries = queries_of(t);
      const Index position = KeyPosition(c, view, t), first = view.FirstKey(position);
      if (c.kind == STF_OWN_BLOCK && Restarts(c)) queries.high = Least(view.count, first + ((t - first) / c.a + 1) * c.a);
      queries.high = Least(queries.high, view.Before(view.EndOfQueries(position)));
      return queries;
    });
  });
}

template <typename Component>
STF_SETS Interval<IndexOf<Component>> KeysOf(const Component& c, const View<IndexOf<Component>>& view, IndexOf<Component> query) {
  Interval<IndexOf<Component>> keys;
  VisitKeysOf(c, view, [&](auto keys_of) { keys = keys_of(query); });
  return keys;
}

template <typename Component>
STF_SETS Interval<IndexOf<Component>> QueriesOf(const Component& c, const View<IndexOf<Component>>& view, IndexOf<Component> key) {
  Interval<IndexOf<Component>> queries;
  VisitQueriesOf(c, view, [&](auto queries_of) { queries = queries_of(key); });
  return queries;
}

// Whether documents leave the keys of queries first ... last all that they are without.
template <typename Component>
STF_SETS bool KeepsKeys(const Component& c, const View<IndexOf<Component>>& view, IndexOf<Component> first, IndexOf<Component> last) {
  if (!view.documents) return true;
  const IndexOf<Component> document = view.FirstKey(view.Position(first)), other = view.FirstKey(view.Position(last));
  Interval<IndexOf<Component>> keys;
  VisitAllKeysOf(c, [&](auto keys_of) { keys = keys_of(first); });
  return !Restarts(c) && document == other && KeysBefore(c, view, document) <= keys.low;
}

// The same of the queries of keys first ... last.
template <typename Component>
STF_SETS bool KeepsQueries(const Component& c, const View<IndexOf<Component>>& view, IndexOf<Component> first, IndexOf<Component> last) {
  if (!view.documents) return true;
  const IndexOf<Component> end = view.EndOfQueries(KeyPosition(c, view, first)), other = view.EndOfQueries(KeyPosition(c, view, last));
  Interval<IndexOf<Component>> queries;
  VisitAllQueriesOf(c, view.count, [&](auto queries_of) { queries = queries_of(last); });
  return !Restarts(c) && end == other && queries.high <= view.Before(end);
}

template <typename Component>
STF_SETS bool LayoutBit(const uint8_t* layouts, const Component& c, int64_t row, int64_t column) {
  const int64_t bit = LayoutBegin(c) + row * c.c + column;
  return (layouts[bit >> 3] >> (bit & 7)) & 1;
}

// Whether query position i may attend to key position j <= i of its document, which begins at `origin`, through component c, exclusions
// apart.
template <typename Component>
STF_SETS bool Covers(const uint8_t* layouts, const Component& c, IndexOf<Component> i, IndexOf<Component> j, IndexOf<Component> origin) {
  if (Restarts(c)) {
    i -= origin;
    j -= origin;
  }
  switch (c.kind) {
    case STF_LOCAL:
      return i - j <= c.a;
    case STF_STRIDED:
      return (i - j) % c.a == 0 && i - j >= static_cast<int64_t>(c.b) * c.a;
    case STF_OWN_BLOCK:
      return i / c.a == j / c.a;
    case STF_SUMMARY:
    case STF_COLUMNS: {
      const auto column = j % c.a;
      return column >= c.b && column < c.c && (j / c.a < i / c.a || (c.d && i - j >= c.d - 1));
    }
    case STF_BLOCKS:
      return LayoutBit(layouts, c, i / c.a, j / c.a);
    default:
      return true;
  }
}

// Whether component c may cover any pair of a query in [i0, i1] and a key in [j0, j1]; true where that is not easily told.
template <typename Component>
STF_SETS bool MayCover(const Component& c, IndexOf<Component> i0, IndexOf<Component> i1, IndexOf<Component> j0, IndexOf<Component> j1) {
  switch (c.kind) {
    case STF_LOCAL:
      return i0 - j1 <= c.a;
    case STF_OWN_BLOCK:
      return Restarts(c) || i0 / c.a <= j1 / c.a;
    case STF_STRIDED:
      return i1 - j0 >= static_cast<int64_t>(c.b) * c.a;
    default:
      return true;
  }
}

}  // namespace STF_SETS_NAMESPACE
}  // namespace stf

#endif  // STF_CUSTOM_OPS_ATTENTION_SETS_H_
