#include "custom_ops/attention/cuda/kernels.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <mutex>
#include <set>
#include <utility>

namespace stf {
namespace cuda {
namespace {

template <typename T>
cudaError_t RunDepths(int depths, Pass pass, const Arguments& args, const Launch& launch, const Machine& machine, cudaStream_t stream) {
  switch (depths) {
    case 0:
      return Run<T, 0>(pass, args, launch, machine, stream);
    case 1:
      return Run<T, 1>(pass, args, launch, machine, stream);
    case 2:
      return Run<T, 2>(pass, args, launch, machine, stream);
    case 3:
      return Run<T, 3>(pass, args, launch, machine, stream);
    default:
      return Run<T, 4>(pass, args, launch, machine, stream);
  }
}

}  // namespace

int FindDepths(const stf_problem& problem) {
  int index = 0;
  for (const Depths& depths : kDepths) {
    if (problem.key_depth <= depths.key && problem.value_depth <= depths.value) return index;
    index++;
  }
  return -1;
}

cudaError_t Run(const stf_problem& problem, Pass pass, const Arguments& args, const Launch& launch, const Machine& machine,
                cudaStream_t stream) {
  const int depths = FindDepths(problem);
  if (problem.dtype == STF_FLOAT32) return RunDepths<float>(depths, pass, args, launch, machine, stream);
  if (problem.dtype == STF_BFLOAT16) return RunDepths<__nv_bfloat16>(depths, pass, args, launch, machine, stream);
  return RunDepths<__half>(depths, pass, args, launch, machine, stream);
}

cudaError_t SumGroups(const stf_problem& problem, const Arguments& args, const stf_tensor& from, const stf_tensor& to, int depth,
                      cudaStream_t stream) {
  if (problem.dtype == STF_FLOAT32) return SumGroups<float>(args, from, to, depth, stream);
  if (problem.dtype == STF_BFLOAT16) return SumGroups<__nv_bfloat16>(args, from, to, depth, stream);
  return SumGroups<__half>(args, from, to, depth, stream);
}

cudaError_t Allow(const void* kernel, int bytes) {
  if (bytes <= 48 * 1024) return cudaSuccess;
  static std::mutex mutex;
  static std::set<std::pair<const void*, int>> allowed;  // each kernel has one size
  int device;
  if (const cudaError_t error = cudaGetDevice(&device); error != cudaSuccess) return error;
  std::lock_guard<std::mutex> lock(mutex);
  if (allowed.count({kernel, device})) return cudaSuccess;
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error == cudaSuccess) allowed.insert({kernel, device});
  return error;
}

int TileRows(Pass pass, int32_t dtype, int depths, const Machine& machine) {
  if (machine.sm90) return FindSm90Tile(pass, kDepths[depths]).rows();
  return FindSm80Tile(pass, ElementBytes(dtype), kDepths[depths], Sm80Memory(machine.memory)).rows();
}

bool SupportsSm90(const stf_problem& problem) {
  const int depths = FindDepths(problem);
  if (depths < 0 || !HasSm90Kernels(ElementBytes(problem.dtype), kDepths[depths])) return false;
  for (int32_t t = problem.program_begin[0]; t < problem.program_begin[problem.programs]; t++) {
    const stf_component& c = problem.components[t];
    // The copy engine writes to multiples of 128 bytes: two rows of depth 32. A launch's components are cut to the positions.
    const int64_t width = std::min(c.c, problem.positions) - std::min(c.b, problem.positions);
    if (depths == 0 && c.kind == STF_SUMMARY && c.a < problem.positions && width % 2 != 0) return false;
  }
  return true;
}

}  // namespace cuda
}  // namespace stf
