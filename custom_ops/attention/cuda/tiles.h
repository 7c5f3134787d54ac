// The sizes of every kernel's tiles, in one table: rows, stages and bytes of shared memory, by pass, dtype, depths and what the card has.
// The host plans by it and the kernels are made of it. Plain C++: tests/ops/test_tiles.py reads it without a compiler for GPUs.
#ifndef STF_CUSTOM_OPS_ATTENTION_CUDA_TILES_H_
#define STF_CUSTOM_OPS_ATTENTION_CUDA_TILES_H_

namespace stf {
namespace cuda {

// kQueryGrad and kKeyGrad are a backward pass in two; kBackward is one in one (sm90/backward.cuh).
enum Pass { kForward, kQueryGrad, kKeyGrad, kBackward, kPackedForward, kPackedBackward };

// The depths that kernels are compiled for: a call takes the first pair that holds its own.
struct Depths {
  int key, value;
};
constexpr Depths kDepths[] = {{32, 32}, {64, 64}, {64, 128}, {128, 128}, {256, 256}};
constexpr int kDepthPairs = sizeof(kDepths) / sizeof(Depths);

// Bytes of shared memory that a block may have: of compute capability 8.6, 8.9 and 12; of 8.0 and 8.7; of 9.0 and 10.
constexpr int kSharedMemory[] = {99 * 1024, 163 * 1024, 227 * 1024};

// ---------------------------------------------------------------------------------------------------------------------------------------
// sm80: kernels for every card from compute capability 8.0 on. A warp has 16 rows.

struct Sm80Tile {
  int warps;    // of a block
  int visited;  // rows of the other tensors that a stage holds
  int stages;   // 2: one is filled while the other is used
  constexpr int rows() const { return 16 * warps; }
  constexpr int threads() const { return 32 * warps; }
};

// Bytes from one row in shared memory to the next: 16 more than the row, so that 8 rows' equal columns lie in different banks.
constexpr int RowPitch(int element, int depth) { return element * depth + 16; }

constexpr int Sm80Bytes(Pass pass, int element, const Depths& depths, const Sm80Tile& tile) {
  const int key = RowPitch(element, depths.key), value = RowPitch(element, depths.value);
  if (pass == kForward) return tile.rows() * key + tile.stages * tile.visited * (key + value);
  const int statistics = 2 * 4 * tile.visited;  // log-sum-exp and delta
  return tile.rows() * (key + value + 4) + tile.stages * (tile.visited * (key + value) + statistics);
}

// The first of these that a block has the memory for: with fewer rows visited at a time, with one stage, with fewer warps.
constexpr Sm80Tile FindSm80Tile(Pass pass, int element, const Depths& depths, int memory) {
  const int bytes = element * (depths.key + depths.value);
  const int visited = bytes >= 1024 ? 32 : 64;  // as registers allow, and so the warps
  for (int warps = pass != kForward && bytes > 1024 ? 2 : 4; warps > 0; warps /= 2) {
    const Sm80Tile tiles[] = {{warps, visited, 2}, {warps, 32, 2}, {warps, visited, 1}, {warps, 32, 1}};
    for (const Sm80Tile& tile : tiles) {
      if (Sm80Bytes(pass, element, depths, tile) <= memory) return tile;
    }
  }
  return {0, 0, 0};
}

// What of a card's memory these kernels use: they have tiles for the first two classes. 0: too little for them.
constexpr int Sm80Memory(int memory) {
  return memory >= kSharedMemory[1] ? kSharedMemory[1] : memory >= kSharedMemory[0] ? kSharedMemory[0] : 0;
}

// Packed sequences: a tile's rows are queries and keys both.
constexpr int Sm80PackedBytes(Pass pass, int element, const Depths& depths, int rows) {
  const int key = RowPitch(element, depths.key), value = RowPitch(element, depths.value);
  return pass == kPackedForward ? rows * (2 * key + value) : rows * 2 * (key + value + 4);
}

// Rows of a packed tile that a sequence of `length` takes, or 0 where it is too long, or the tile too large for the card.
constexpr int Sm80PackedRows(int element, const Depths& depths, long long length, int memory) {
  const long long rows = (length + 31) / 32 * 32;
  if (rows > 128 || depths.key + depths.value > 256) return 0;  // as registers allow
  return Sm80PackedBytes(kPackedBackward, element, depths, rows <= 64 ? 64 : 128) <= memory ? static_cast<int>(rows) : 0;
}

// ---------------------------------------------------------------------------------------------------------------------------------------
// sm90: kernels for Hopper, halves of depths up to 128. A warpgroup has 64 rows.

constexpr int kStageRows = 64;        // rows that a stage holds
constexpr int kTileAlignment = 1024;  // of tiles in shared memory
constexpr int kMaxPackedRows = 128;   // the longest sequence that is packed
constexpr int kStageInfoBytes = 16, kWorkTileBytes = 48;
constexpr int kScoreGradBytes = 64 * 64 * 2;  // of the scores' gradients of 64 keys and 64 queries

constexpr bool HasSm90Kernels(int element, const Depths& depths) { return element == 2 && depths.value <= 128; }

// Warpgroups of a block and blocks of a multiprocessor, as registers and shared memory allow.
struct Sm90Shape {
  int warpgroups, blocks;
};

constexpr Sm90Shape FindSm90Shape(Pass pass, const Depths& depths) {
  if (pass == kForward) return depths.value <= 64 ? Sm90Shape{2, 2} : Sm90Shape{3, 1};
  if (pass == kQueryGrad) return {depths.key <= 64 ? 3 : 2, 1};
  return {depths.key <= 32 ? 3 : 2, 1};
}

// Shared memory: `own_stages` tiles of the block's own rows, a ring of `stages`, then what the producer says of stages and tiles, and
// barriers.
struct Sm90Tile {
  int warpgroups, blocks;
  int own_key_bytes, own_bytes;      // of a tile of own rows: of its first tensor, and of both
  int stage_key_bytes, stage_bytes;  // of a stage, in the same way
  int statistics_bytes;              // of a stage
  int own_stages, stages;
  constexpr int rows() const { return 64 * warpgroups; }
  constexpr int ring() const { return own_stages * own_bytes; }  // where each part begins
  constexpr int statistics() const { return ring() + stages * stage_bytes; }
  constexpr int stage_infos() const { return statistics() + stages * statistics_bytes; }
  constexpr int work_tiles() const { return stage_infos() + stages * kStageInfoBytes; }
  constexpr int barriers() const { return work_tiles() + own_stages * kWorkTileBytes; }
  constexpr int bytes() const { return barriers() + 8 * 2 * (own_stages + stages); }
};

constexpr Sm90Tile FindSm90Tile(Pass pass, const Depths& depths) {
  const Sm90Shape shape = FindSm90Shape(pass, depths);
  Sm90Tile tile = {shape.warpgroups, shape.blocks, 0, 0, 0, 0, 0, 0, 0};
  tile.own_key_bytes = tile.rows() * depths.key * 2;
  tile.own_bytes = tile.own_key_bytes + (pass == kForward ? 0 : tile.rows() * depths.value * 2);
  tile.stage_key_bytes = kStageRows * depths.key * 2;
  tile.stage_bytes = tile.stage_key_bytes + kStageRows * depths.value * 2;
  tile.statistics_bytes = pass == kKeyGrad ? 2 * kStageRows * 4 : 0;
  // A block has 1 KiB less than its part of the multiprocessor's, and 256 bytes are enough for all behind the ring.
  const int budget = kSharedMemory[2] / shape.blocks - 1024 - 256, stage = tile.stage_bytes + tile.statistics_bytes;
  tile.own_stages = budget >= 2 * tile.own_bytes + 2 * stage ? 2 : 1;
  const int fit = (budget - tile.own_stages * tile.own_bytes) / stage;
  tile.stages = fit < 4 ? fit : 4;
  return tile;
}

// Backward in one pass: keys of two blocks, a ring of stages with tiles of 64 queries, the scores' gradients and the outputs
// of a tile, query gradients of tiles that wait for further keys, statistics of tiles, then what the producer says and barriers.
constexpr int kBackwardKeys = 128, kKeyBlockBytes = 64;

struct Sm90BackwardTile {
  int accumulators;              // tiles that may wait; 0: there is no such kernel
  int accumulator_bytes;         // of a tile that waits
  int own_key_bytes, own_bytes;  // of a block's keys: of the first tensor, and of both
  int stage_key_bytes, stage_bytes;
  int stages;
  // Tiles of queries that a block of keys may reach. Twice as many have statistics: of this run of keys, and of the last.
  constexpr int reach() const { return accumulators + kBackwardKeys / 64; }
  constexpr int slots() const { return 2 * reach(); }
  constexpr int ring() const { return 2 * own_bytes; }  // where each part begins
  constexpr int score_grads() const { return ring() + stages * stage_bytes; }
  constexpr int output() const { return score_grads() + 2 * kScoreGradBytes; }
  constexpr int sums() const { return output() + stage_bytes - stage_key_bytes; }
  constexpr int statistics() const { return sums() + accumulators * accumulator_bytes; }
  constexpr int key_blocks() const { return statistics() + slots() * 2 * 64 * 4; }
  constexpr int barriers() const { return key_blocks() + 2 * kKeyBlockBytes; }
  constexpr int bytes() const { return barriers() + 8 * (2 * stages + 8 + 2 * slots()); }
};

constexpr Sm90BackwardTile FindSm90BackwardTile(const Depths& depths) {
  Sm90BackwardTile tile = {};
  tile.accumulators = depths.value <= 32 ? 16 : depths.value <= 64 ? 4 : depths.key <= 64 ? 2 : 0;  // as memory and registers allow
  tile.accumulator_bytes = 64 * depths.key * 4;
  tile.own_key_bytes = kBackwardKeys * depths.key * 2;
  tile.own_bytes = tile.own_key_bytes + kBackwardKeys * depths.value * 2;
  tile.stage_key_bytes = 64 * depths.key * 2;
  tile.stage_bytes = tile.stage_key_bytes + 64 * depths.value * 2;
  for (tile.stages = 4; tile.stages > 2 && tile.bytes() > kSharedMemory[2];) tile.stages--;
  return tile;
}

constexpr int Sm90PackedBytes(Pass pass, const Depths& depths, int rows) {
  if (pass == kPackedForward) return rows * 2 * (2 * depths.key + depths.value);
  return rows * 2 * (2 * (depths.key + depths.value) + 4) + rows / 64 * kScoreGradBytes;
}

// ---------------------------------------------------------------------------------------------------------------------------------------
// What must hold of the table.

constexpr bool TilesFit() {
  for (const Depths& depths : kDepths) {
    for (int pass = kForward; pass <= kKeyGrad; pass++) {
      const Pass of = static_cast<Pass>(pass);
      for (int element = 2; element <= 4; element += 2) {
        for (int memory = 0; memory < 2; memory++) {
          if (FindSm80Tile(of, element, depths, kSharedMemory[memory]).warps == 0) return false;
        }
      }
      if (!HasSm90Kernels(2, depths)) continue;
      const Sm90Tile tile = FindSm90Tile(of, depths);
      if (tile.stages < 2 || tile.blocks * (tile.bytes() + 1024) > 228 * 1024) return false;
    }
    const Sm90BackwardTile backward = FindSm90BackwardTile(depths);
    if (HasSm90Kernels(2, depths) && backward.accumulators > 0 && backward.bytes() > kSharedMemory[2]) return false;
    if (HasSm90Kernels(2, depths) && Sm90PackedBytes(kPackedBackward, depths, kMaxPackedRows) > kSharedMemory[2]) return false;
  }
  return true;
}
static_assert(TilesFit(), "every kernel has a tile on every card");

}  // namespace cuda
}  // namespace stf

#endif  // STF_CUSTOM_OPS_ATTENTION_CUDA_TILES_H_
