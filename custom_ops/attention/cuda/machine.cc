#include "custom_ops/attention/cuda/machine.h"

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdlib>
#include <string_view>
#include <vector>

#include "custom_ops/attention/cuda/attention.h"
#include "custom_ops/attention/cuda/sm90/tensor_maps.h"
#include "custom_ops/attention/cuda/tiles.h"

namespace stf {
namespace cuda {
namespace {

Machine Ask(int device) {
  const auto attribute = [&](cudaDeviceAttr name) {
    int value = 0;
    return cudaDeviceGetAttribute(&value, name, device) == cudaSuccess ? value : 0;
  };
  const bool hopper = attribute(cudaDevAttrComputeCapabilityMajor) == 9 && attribute(cudaDevAttrComputeCapabilityMinor) == 0;
  return {attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin), std::max(1, attribute(cudaDevAttrMultiProcessorCount)), hopper && HasMaps()};
}

}  // namespace

int FindMachine(Machine* machine) {
  static const std::vector<Machine> machines = [] {
    int count = 0;
    if (cudaGetDeviceCount(&count) != cudaSuccess) count = 0;
    std::vector<Machine> all;
    for (int device = 0; device < count; device++) all.push_back(Ask(device));
    return all;
  }();
  int device;
  if (const cudaError_t error = cudaGetDevice(&device); error != cudaSuccess) return error;
  if (device >= static_cast<int>(machines.size())) return cudaErrorInvalidDevice;
  *machine = machines[device];
  const char* set = std::getenv("STF_CUDA_KERNELS");
  const std::string_view kernels = set ? set : "";
  if (kernels == "sm80" || kernels == "sm86") {
    machine->sm90 = false;
    if (kernels == "sm86") machine->memory = std::min(machine->memory, kSharedMemory[0]);
  } else if (!kernels.empty()) {
    return STF_CUDA_UNKNOWN_KERNELS;
  }
  if (!Sm80Memory(machine->memory)) return STF_CUDA_OLD_DEVICE;
  return cudaSuccess;
}

}  // namespace cuda
}  // namespace stf
