// Starting the kernels, each dtype and pair of depths compiled apart.
#ifndef STF_CUSTOM_OPS_ATTENTION_CUDA_KERNELS_H_
#define STF_CUSTOM_OPS_ATTENTION_CUDA_KERNELS_H_

#include <cuda_runtime_api.h>

#include "custom_ops/attention/cuda/common/arguments.h"
#include "custom_ops/attention/cuda/machine.h"
#include "custom_ops/attention/cuda/tiles.h"

namespace stf {
namespace cuda {

// Rows of a tile of queries, or of keys in the pass over keys, where sequences are not packed.
int TileRows(Pass pass, int32_t dtype, int depths, const Machine& machine);

// Whether Hopper's kernels can work on a problem, its rows being 16 bytes apart (see Arguments::vector).
bool SupportsSm90(const stf_problem& problem);

// Lets a kernel have so many bytes of shared memory on the current device.
cudaError_t Allow(const void* kernel, int bytes);

// Starts one launch. Instantiated in kernels.cu for each dtype and pair of depths.
template <typename T, int kIndex>
cudaError_t Run(Pass pass, const Arguments& args, const Launch& launch, const Machine& machine, cudaStream_t stream);

// Adds the heads' gradients of keys (or values) to those of the heads that share them: common/groups.cuh. Instantiated in kernels.cu for
// each dtype.
template <typename T>
cudaError_t SumGroups(const Arguments& args, const stf_tensor& from, const stf_tensor& to, int depth, cudaStream_t stream);

// The same, for the dtype of a problem.
cudaError_t SumGroups(const stf_problem& problem, const Arguments& args, const stf_tensor& from, const stf_tensor& to, int depth,
                      cudaStream_t stream);

// Run, for the dtype and depths of a problem.
cudaError_t Run(const stf_problem& problem, Pass pass, const Arguments& args, const Launch& launch, const Machine& machine,
                cudaStream_t stream);

inline int ElementBytes(int32_t dtype) { return dtype == STF_FLOAT32 ? 4 : 2; }

// Index into kDepths, or -1 where a depth is too large.
int FindDepths(const stf_problem& problem);

}  // namespace cuda
}  // namespace stf

#endif  // STF_CUSTOM_OPS_ATTENTION_CUDA_KERNELS_H_
