"""What a component covers, by each view that custom_ops/attention/sets.h has of it, beside stf.patterns. Needs g++.

The kernels of the CPU take `stf_component`, those of the GPU a record of 32 bits: both are looked at here.
"""

import ctypes
import pathlib
import subprocess

import numpy as np
import pytest
from paper_sets import segment_ids, within_documents

from stf.patterns import Component, Kind, components_mask
from stf.patterns.lowering import Program, restarted

ROOT = pathlib.Path(__file__).resolve().parents[2]

PROGRAM = """
#include "custom_ops/attention/cuda/common/arguments.h"
#include "custom_ops/attention/sets.h"

namespace {

// Marks the pairs [query, key] of positions that each of four views has: KeysOf, QueriesOf, Covers, MayCover.
template <typename Component>
void Mark(const Component& c, const uint8_t* layouts, const int32_t* documents, int64_t n, uint8_t* views) {
  using Index = stf::IndexOf<Component>;
  const int64_t stride = c.kind == STF_STRIDED ? c.a : 1;
  for (int64_t r = 0; r < stride && r < n; r++) {
    const stf::View<Index> view = {Index(r), Index(stride), Index((n - r + stride - 1) / stride), documents};
    for (Index m = 0; m < view.count; m++) {
      const auto keys = stf::KeysOf(c, view, m);
      for (Index t = keys.low; t < keys.high; t++) {
        const int64_t j = stf::KeyPosition(c, view, t);
        if (j < n) views[view.Position(m) * n + j]++;
      }
    }
    for (Index t = 0; t < n; t++) {
      const int64_t j = stf::KeyPosition(c, view, t);
      if (j >= n) break;
      const auto queries = stf::QueriesOf(c, view, t);
      for (Index m = queries.low; m < queries.high; m++) views[n * n + view.Position(m) * n + j]++;
    }
  }
  const stf::View<Index> whole = {0, 1, Index(n), documents};
  for (Index i = 0; i < n; i++) {
    const Index origin = whole.Origin(i);
    for (Index j = origin; j <= i; j++) {
      views[2 * n * n + i * n + j] = stf::Covers(layouts, c, i, j, origin);
      views[3 * n * n + i * n + j] = stf::MayCover(c, i, i, j, j);
    }
  }
}

}  // namespace

extern "C" void stf_sets(const stf_component* c, const uint8_t* layouts, const int32_t* documents, int64_t n,
                         int device, uint8_t* views) {
  device ? Mark(stf::cuda::ComponentOf(*c, n), layouts, documents, n, views) : Mark(*c, layouts, documents, n, views);
}
"""

N = 61
COMPONENTS = {
    "causal": Component(Kind.CAUSAL),
    "local 0": Component(Kind.LOCAL, 0),
    "local 17": Component(Kind.LOCAL, 17),
    "local beyond": Component(Kind.LOCAL, 1000),
    "strided 7": Component(Kind.STRIDED, 7),
    "strided 7 behind 3": Component(Kind.STRIDED, 7, 3),
    "strided beyond": Component(Kind.STRIDED, 1000),
    "own block 16": Component(Kind.OWN_BLOCK, 16),
    "own block beyond": Component(Kind.OWN_BLOCK, 1000),
    "summary": Component(Kind.SUMMARY, 16, 13, 16, 1),
    "summary of earlier blocks": Component(Kind.SUMMARY, 16, 5, 9, 0),
    "summary of one column": Component(Kind.SUMMARY, 9, 0, 1, 1),
    "summary that the end cuts": Component(Kind.SUMMARY, 80, 50, 80, 1),
    "summary beyond": Component(Kind.SUMMARY, 1000, 900, 1000, 1),
    "first": Component(Kind.SUMMARY, 2**31 - 1, 0, 9, 1),
    "first behind 12": Component(Kind.SUMMARY, 2**31 - 1, 0, 9, 13),
    "first behind all": Component(Kind.SUMMARY, 2**31 - 1, 0, 9, 1000),
    "blocks": Component(Kind.BLOCKS, 8, c=8, layout=np.tril(np.random.default_rng(0).random((8, 8)) < 0.5)),
}


class Record(ctypes.Structure):
    """stf_component."""

    _fields_ = [(name, ctypes.c_int64) for name in ("kind", "a", "b", "c", "d", "exclude")]


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sets")
    (folder / "sets.cc").write_text(PROGRAM)
    command = ["g++", "-std=c++17", "-O1", "-Wall", "-Werror", "-shared", "-fPIC", "-I", ROOT]
    subprocess.run([*command, folder / "sets.cc", "-o", folder / "sets.so"], check=True)
    return ctypes.CDLL(str(folder / "sets.so"))


@pytest.mark.parametrize("device", [0, 1], ids=["stf_component", "32 bits"])
@pytest.mark.parametrize("name", COMPONENTS)
def test_every_view_of_a_component_is_its_set(name, device, library):
    part = COMPONENTS[name]
    bits = np.packbits(part.layout.reshape(-1), bitorder="little") if part.layout is not None else np.zeros(1, np.uint8)
    numbers = [int(part.kind), part.a, part.b, part.c, part.d, 0]
    record = Record(*numbers)
    views = np.zeros((4, N, N), np.uint8)
    pointers = [array.ctypes.data_as(ctypes.c_void_p) for array in (bits, views)]
    library.stf_sets(ctypes.byref(record), pointers[0], None, ctypes.c_int64(N), device, pointers[1])
    causal = np.tri(N, dtype=bool)
    exact = components_mask(Program(numbers, [0, 1], bits.tobytes()), N)[0]
    # Of block layouts the intervals have all that is causal.
    intervals = causal if part.kind == Kind.BLOCKS else exact
    np.testing.assert_array_equal(views[0], intervals, "KeysOf")
    np.testing.assert_array_equal(views[1], intervals, "QueriesOf")
    np.testing.assert_array_equal(views[2], exact, "Covers")
    assert not (exact & (views[3] == 0)).any(), "MayCover"
    if part.kind in (Kind.LOCAL, Kind.OWN_BLOCK):
        np.testing.assert_array_equal(views[3], exact, "MayCover")


@pytest.mark.parametrize("restart", [False, True])
@pytest.mark.parametrize("device", [0, 1], ids=["stf_component", "32 bits"])
@pytest.mark.parametrize("name", COMPONENTS)
def test_every_view_within_documents(name, device, restart, library):
    part = COMPONENTS[name]
    bits = np.packbits(part.layout.reshape(-1), bitorder="little") if part.layout is not None else np.zeros(1, np.uint8)
    exact = components_mask(Program([int(part.kind), part.a, part.b, part.c, part.d, 0], [0, 1], bits.tobytes()), N)[0]
    kind, d = restarted(part) if restart else (part.kind, part.d)
    record = Record(int(kind), part.a, part.b, part.c, d, 0)
    for ids in segment_ids(N, 4):
        bounds = np.zeros((N, 2), np.int32)
        edges = [0, *(np.flatnonzero(np.diff(ids)) + 1), N]
        for begin, end in zip(edges, edges[1:], strict=False):
            place = np.arange(begin, end)
            bounds[begin:end] = [begin, end] if ids[begin] >= 0 else np.stack([place + 1, place], -1)
        views = np.zeros((4, N, N), np.uint8)
        pointers = [array.ctypes.data_as(ctypes.c_void_p) for array in (bits, bounds, views)]
        library.stf_sets(ctypes.byref(record), *pointers[:2], ctypes.c_int64(N), device, pointers[2])
        wanted = within_documents(exact[None], ids[None], restart)[0, 0]
        every = within_documents(np.tri(N, dtype=bool)[None], ids[None], False)[0, 0]
        intervals = every if kind in (Kind.BLOCKS, Kind.COLUMNS) else wanted
        np.testing.assert_array_equal(views[0], intervals, "KeysOf")
        np.testing.assert_array_equal(views[1], intervals, "QueriesOf")
        np.testing.assert_array_equal(views[2] & every, wanted, "Covers")
        assert not (wanted & (views[3] == 0)).any(), "MayCover"
