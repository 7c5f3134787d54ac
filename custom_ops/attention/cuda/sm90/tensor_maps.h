// Tensors as Hopper's copy engine knows them.
#ifndef STF_CUSTOM_OPS_ATTENTION_CUDA_SM90_TENSOR_MAPS_H_
#define STF_CUSTOM_OPS_ATTENTION_CUDA_SM90_TENSOR_MAPS_H_

#include <memory>

#include "custom_ops/attention/cuda/kernels.h"

namespace stf {
namespace cuda {

// Whether this machine's driver can make maps.
bool HasMaps();

// What a launch of halves copies to tiles of depths key_depth and value_depth: made once for the same tensors. Returns a cudaError_t.
int MapsOf(Pass pass, int key_depth, int value_depth, const Arguments& args, const Launch& launch, std::shared_ptr<const Maps>* maps);

}  // namespace cuda
}  // namespace stf

#endif  // STF_CUSTOM_OPS_ATTENTION_CUDA_SM90_TENSOR_MAPS_H_
