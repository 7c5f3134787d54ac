// Tensors as Hopper's copy engine knows them.
#ifndef STF_CUSTOM_OPS_ATTENTION_CUDA_TENSOR_MAPS_H_
#define STF_CUSTOM_OPS_ATTENTION_CUDA_TENSOR_MAPS_H_

#include <cuda_runtime_api.h>

#include "custom_ops/attention/cuda/kernels.h"

namespace stf {
namespace cuda {

// Whether this machine's driver can make maps.
bool HasMaps();

// What a launch of halves copies to tiles of depths key_depth and value_depth.
cudaError_t MakeMaps(Pass pass, int key_depth, int value_depth, const Arguments& args, const Launch& launch, Maps* maps);

}  // namespace cuda
}  // namespace stf

#endif  // STF_CUSTOM_OPS_ATTENTION_CUDA_TENSOR_MAPS_H_
