#include "custom_ops/attention/cuda/kernels.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>

#include "custom_ops/attention/cuda/tensor_maps.h"

namespace stf {
namespace cuda {
namespace {

int64_t Bytes(int32_t dtype, int depths) { return (dtype == STF_FLOAT32 ? 4 : 2) * (kDepths[depths].key + kDepths[depths].value); }

int Attribute(cudaDeviceAttr attribute) {
  int device, value;
  return cudaGetDevice(&device) == cudaSuccess && cudaDeviceGetAttribute(&value, attribute, device) == cudaSuccess ? value : 0;
}

template <typename T>
cudaError_t RunDepths(int depths, Pass pass, const Arguments& args, const Launch& launch, cudaStream_t stream) {
  switch (depths) {
    case 0:
      return Run<T, 0>(pass, args, launch, stream);
    case 1:
      return Run<T, 1>(pass, args, launch, stream);
    case 2:
      return Run<T, 2>(pass, args, launch, stream);
    case 3:
      return Run<T, 3>(pass, args, launch, stream);
    default:
      return Run<T, 4>(pass, args, launch, stream);
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

cudaError_t Run(const stf_problem& problem, Pass pass, const Arguments& args, const Launch& launch, cudaStream_t stream) {
  const int depths = FindDepths(problem);
  if (problem.dtype == STF_FLOAT32) return RunDepths<float>(depths, pass, args, launch, stream);
  if (problem.dtype == STF_BFLOAT16) return RunDepths<__nv_bfloat16>(depths, pass, args, launch, stream);
  return RunDepths<__half>(depths, pass, args, launch, stream);
}

namespace {

template <int kIndex>
int GroupRows(Pass pass) {
  using Shape = GroupShape<kDepths[kIndex].key, kDepths[kIndex].value>;
  return 64 * (pass == kForward ? Shape::kForwardGroups : pass == kQueryGrad ? Shape::kQueryGroups : Shape::kKeyGroups);
}

}  // namespace

int TileRows(Pass pass, int32_t dtype, int depths, bool groups) {
  if (!groups) return pass != kForward && Bytes(dtype, depths) > 1024 ? 32 : 64;
  constexpr int (*kRows[])(Pass) = {GroupRows<0>, GroupRows<1>, GroupRows<2>, GroupRows<3>};
  return kRows[depths](pass);
}

bool TakesGroups(const stf_problem& problem) {
  const int depths = FindDepths(problem);
  if (problem.dtype == STF_FLOAT32 || depths < 0 || kDepths[depths].value > 128) return false;
  for (int32_t t = problem.program_begin[0]; t < problem.program_begin[problem.programs]; t++) {
    const stf_component& c = problem.components[t];
    // The copy engine writes to multiples of 128 bytes: two rows of depth 32.
    if (depths == 0 && c.kind == STF_SUMMARY && (c.c - c.b) % 2 != 0) return false;
  }
  return Attribute(cudaDevAttrComputeCapabilityMajor) == 9 && Attribute(cudaDevAttrComputeCapabilityMinor) == 0 && HasMaps();
}

int Multiprocessors() { return std::max(1, Attribute(cudaDevAttrMultiProcessorCount)); }

int PackedRowsOf(int64_t length, int32_t dtype, int depths) {
  const int64_t rows = (length + 31) / 32 * 32;
  if (rows > 128 || kDepths[depths].key + kDepths[depths].value > 256) return 0;
  const int64_t tile = rows <= 64 ? 64 : 128, pitches = Bytes(dtype, depths) + 32;
  return 2 * tile * (pitches + 4) <= Attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin) ? static_cast<int>(rows)
                                                                                        : 0;  // of the backward pass
}

}  // namespace cuda
}  // namespace stf
