"""The table of the CUDA kernels' tiles against what cards have. Needs g++, no GPU."""

import itertools
import json
import pathlib
import subprocess

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
DEPTHS = [(32, 32), (64, 64), (64, 128), (128, 128), (256, 256)]
PASSES = ["forward", "query_grad", "key_grad"]
# Bytes of shared memory of a block and of a multiprocessor, which also holds 1 KiB of the system's for each block
# (CUDA's programming guide, "Technical Specifications per Compute Capability").
CARDS = {
    "8.0": (163 << 10, 164 << 10),
    "8.6": (99 << 10, 100 << 10),
    "8.7": (163 << 10, 164 << 10),
    "8.9": (99 << 10, 100 << 10),
    "9.0": (227 << 10, 228 << 10),
    "10.0": (227 << 10, 228 << 10),
    "12.0": (99 << 10, 100 << 10),
}

PROGRAM = """
#include <cstdio>
#include <cstdlib>
#include <initializer_list>
#include "custom_ops/attention/cuda/tiles.h"
using namespace stf::cuda;
int main(int, char** args) {
  const int card = std::atoi(args[1]), memory = Sm80Memory(card);
  std::printf("{\\"memory\\": %d, \\"tiles\\": [", memory);
  const char* separator = "";
  for (int element = 2; element <= 4; element += 2) {
    for (const Depths& depths : kDepths) {
      for (int pass = kForward; pass <= kKeyGrad; pass++) {
        const Pass of = static_cast<Pass>(pass);
        const Sm80Tile tile = FindSm80Tile(of, element, depths, memory);
        std::printf("%s[%d, %d, %d, %d, %d, %d, %d, %d]", separator, pass, element, depths.key, depths.value,
                    tile.warps, tile.visited, tile.stages, Sm80Bytes(of, element, depths, tile));
        separator = ", ";
      }
    }
  }
  std::printf("], \\"packed\\": [");
  separator = "";
  for (int element = 2; element <= 4; element += 2) {
    for (const Depths& depths : kDepths) {
      for (int length : {1, 32, 33, 64, 65, 96, 128, 129}) {
        std::printf("%s[%d, %d, %d, %d, %d]", separator, element, depths.key, depths.value, length,
                    Sm80PackedRows(element, depths, length, card));
        separator = ", ";
      }
    }
  }
  std::printf("], \\"sm90\\": [");
  separator = "";
  for (const Depths& depths : kDepths) {
    for (int pass = kForward; pass <= kKeyGrad && HasSm90Kernels(2, depths); pass++) {
      const Sm90Tile tile = FindSm90Tile(static_cast<Pass>(pass), depths);
      std::printf("%s[%d, %d, %d, %d, %d, %d, %d]", separator, pass, depths.key, depths.value, tile.rows(), tile.blocks,
                  tile.stages, tile.bytes());
      separator = ", ";
    }
  }
  std::printf("], \\"backward\\": [");
  separator = "";
  for (const Depths& depths : kDepths) {
    const Sm90BackwardTile tile = FindSm90BackwardTile(depths);
    std::printf("%s[%d, %d, %d, %d, %d, %d, %d]", separator, depths.key, depths.value, tile.accumulators,
                tile.reach(), tile.stages, tile.bytes(), Sm90PackedBytes(kPackedBackward, depths, kMaxPackedRows));
    separator = ", ";
  }
  std::printf("]}");
}
"""


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """The table for a card with so many bytes a block."""
    folder = tmp_path_factory.mktemp("tiles")
    (folder / "table.cc").write_text(PROGRAM)
    subprocess.run(["g++", "-std=c++17", "-I", ROOT, folder / "table.cc", "-o", folder / "table"], check=True)

    def read(memory):
        said = subprocess.run([folder / "table", str(memory)], check=True, capture_output=True, text=True)
        return json.loads(said.stdout)

    return read


@pytest.mark.parametrize("card", CARDS)
def test_every_kernel_has_a_tile_that_the_card_holds(card, table):
    most, of_multiprocessor = CARDS[card]
    tiles = table(most)["tiles"]
    assert [(t[1], (t[2], t[3]), PASSES[t[0]]) for t in tiles] == list(itertools.product((2, 4), DEPTHS, PASSES))
    for index, element, key, value, warps, visited, stages, bytes_ in tiles:
        pitches = (key + value) * element + 2 * 16
        if PASSES[index] == "forward":
            needed = 16 * warps * (key * element + 16) + stages * visited * pitches
        else:  # delta of the tile's rows; log-sum-exp and delta of the visited ones
            needed = 16 * warps * (pitches + 4) + stages * visited * (pitches + 8)
        assert warps in (1, 2, 4) and visited in (32, 64) and stages in (1, 2)
        assert needed == bytes_ <= most and bytes_ + 1024 <= of_multiprocessor


@pytest.mark.parametrize("card", CARDS)
def test_packed_tiles_fit(card, table):
    most = CARDS[card][0]
    for element, key, value, length, rows in table(most)["packed"]:
        tile = 64 if length <= 64 else 128
        fits = tile * 2 * ((key + value) * element + 2 * 16 + 4) <= most and key + value <= 256 and length <= 128
        assert rows == (-(-length // 32) * 32 if fits else 0)


def test_hopper_holds_its_tiles(table):
    most, of_multiprocessor = CARDS["9.0"]
    tiles = table(most)["sm90"]
    assert [((t[1], t[2]), PASSES[t[0]]) for t in tiles] == list(itertools.product(DEPTHS[:4], PASSES))
    for index, key, value, rows, blocks, stages, bytes_ in tiles:
        own = rows * 2 * (key + (value if index else 0))
        assert stages >= 2 and bytes_ >= own + stages * 64 * 2 * (key + value)
        assert bytes_ <= most and blocks * (bytes_ + 1024) <= of_multiprocessor


def test_hopper_holds_a_backward_pass_in_one(table):
    most, _ = CARDS["9.0"]
    tiles = table(most)["backward"]
    assert [(key, value) for key, value, *_ in tiles] == DEPTHS
    for key, value, accumulators, reach, stages, bytes_, packed in tiles[:3]:
        # Two blocks of 128 keys, tiles of 64 queries, the scores' gradients of both halves, outputs, sums.
        needed = 2 * 128 * 2 * (key + value) + stages * 64 * 2 * (key + value) + 2 * 64 * 64 * 2 + 64 * 2 * value
        needed += accumulators * 64 * 4 * key + 2 * reach * 64 * 2 * 4
        assert stages >= 2 and reach == accumulators + 2 and needed <= bytes_ <= most
        assert packed == 128 * 2 * 2 * (key + value) + 2 * 128 * 4 + 2 * 64 * 64 * 2
        # The longest window whose keys reach that many tiles.
        assert 64 * reach - 128 == {(32, 32): 1024, (64, 64): 256, (64, 128): 128}[key, value]
    assert [accumulators for _, _, accumulators, *_ in tiles[3:]] == [0, 0]


def test_older_cards_are_refused(table):
    assert table(64 << 10)["memory"] == table(98 << 10)["memory"] == 0
    assert table(99 << 10)["memory"] == 99 << 10
    assert table(227 << 10)["memory"] == 163 << 10
