// Starting the kernels, each dtype and pair of depths compiled apart, and the sizes of their tiles.
#ifndef STF_CUSTOM_OPS_ATTENTION_CUDA_KERNELS_H_
#define STF_CUSTOM_OPS_ATTENTION_CUDA_KERNELS_H_

#include <cuda_runtime_api.h>

#include "custom_ops/attention/cuda/arguments.h"

namespace stf {
namespace cuda {

enum Pass { kForward, kQueryGrad, kKeyGrad, kPackedForward, kPackedBackward };

// The depths that kernels are compiled for: a call takes the first pair that holds its own.
struct Depths {
  int key, value;
};
constexpr Depths kDepths[] = {{32, 32}, {64, 64}, {64, 128}, {128, 128}, {256, 256}};

// Warpgroups of a block, of 64 rows each, and blocks of a multiprocessor, for the kernels in group_kernels.cuh: as registers and shared
// memory allow.
template <int kKeyDepth, int kValueDepth>
struct GroupShape {
  static constexpr int kForwardGroups = kValueDepth <= 64 ? 2 : 3, kForwardBlocks = kValueDepth <= 64 ? 2 : 1;
  static constexpr int kQueryGroups = kKeyDepth <= 64 ? 3 : 2, kQueryBlocks = 1;
  static constexpr int kKeyGroups = kKeyDepth <= 32 ? 3 : 2, kKeyBlocks = 1;
};

// Rows of a tile of queries, or of keys in the pass over keys. Packed tiles have as many rows as launch.packed_rows asks for.
int TileRows(Pass pass, int32_t dtype, int depths, bool groups);

// Whether the current device and a problem are such that warpgroups can work on it (16-byte rows apart, see Arguments::vector).
bool TakesGroups(const stf_problem& problem);

int Multiprocessors();  // of the current device; at least 1

constexpr int kMostGroupRows = 128;  // the longest sequence that warpgroups pack

// Whether sequences of `length` positions are packed: rows that each takes of a tile (not a warpgroup's), or 0.
int PackedRowsOf(int64_t length, int32_t dtype, int depths);

// Starts one launch. Instantiated in kernels.cu for each dtype and pair of depths.
template <typename T, int kIndex>
cudaError_t Run(Pass pass, const Arguments& args, const Launch& launch, cudaStream_t stream);

// The same, for the dtype and depths of a problem.
cudaError_t Run(const stf_problem& problem, Pass pass, const Arguments& args, const Launch& launch, cudaStream_t stream);

// Index into kDepths, or -1 where a depth is too large.
int FindDepths(const stf_problem& problem);

}  // namespace cuda
}  // namespace stf

#endif  // STF_CUSTOM_OPS_ATTENTION_CUDA_KERNELS_H_
