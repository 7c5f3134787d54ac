#include "custom_ops/attention/cuda/sm90/tensor_maps.h"

#include <cuda.h>

#include <algorithm>
#include <numeric>

#include "custom_ops/attention/cuda/cache.h"

namespace stf {
namespace cuda {
namespace {

constexpr int kRows = 64;  // that are copied at a time

using Encode = decltype(&cuTensorMapEncodeTiled);

// The driver's function, found at run time: the library is linked to no driver.
Encode FindEncode() {
  static const Encode encode = [] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result;
    const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result);
    return error == cudaSuccess && result == cudaDriverEntryPointSuccess ? reinterpret_cast<Encode>(found) : nullptr;
  }();
  return encode;
}

// How a map numbers rows: `sequences` of them, `count` rows each, so many positions apart.
struct Numbering {
  int64_t sequences, sequence_stride, count, stride;
};

// Rows are cut into panels as wgmma.cuh has them.
cudaError_t Make(const stf_tensor& tensor, int heads, int batch, int depth, int tile_depth, const Numbering& numbering, int rows,
                 TensorMap* map) {
  static_assert(sizeof(TensorMap) == sizeof(CUtensorMap), "the driver's size");
  const auto bytes = [](int64_t elements) { return static_cast<cuuint64_t>(2 * elements); };
  const auto size = [](int64_t x) { return static_cast<cuuint64_t>(x); };
  const cuuint64_t sizes[5] = {size(depth), size(numbering.sequences), size(numbering.count), size(heads), size(batch)};
  const cuuint64_t strides[4] = {bytes(numbering.sequence_stride * tensor.position_stride),
                                 bytes(numbering.stride * tensor.position_stride), bytes(tensor.head_stride), bytes(tensor.batch_stride)};
  const bool narrow = tile_depth == 32;
  const cuuint32_t box[5] = {narrow ? 32u : 64u, 1, static_cast<cuuint32_t>(rows), 1, 1}, steps[5] = {1, 1, 1, 1, 1};
  // Halves of either kind are 16 bits that nobody computes with here.
  const CUresult result =
      FindEncode()(reinterpret_cast<CUtensorMap*>(map), CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 5, tensor.data, sizes, strides, box, steps,
                   CU_TENSOR_MAP_INTERLEAVE_NONE, narrow ? CU_TENSOR_MAP_SWIZZLE_64B : CU_TENSOR_MAP_SWIZZLE_128B,
                   CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

// The most rows, a power of two up to kRows, that every summary of a launch divides its columns into; 0 where there is none.
int SummaryRows(const Launch& launch, int positions) {
  int rows = 0;
  for (int slot = 0; slot < launch.programs; slot++) {
    for (uint64_t left = launch.members[slot]; left; left &= left - 1) {
      const Component& c = launch.components[launch.begin[slot] + __builtin_ctzll(left)];
      if (IsScattered(c, positions)) rows = std::gcd(rows == 0 ? kRows : rows, c.c - c.b);
    }
  }
  return rows;
}

cudaError_t MakeMaps(Pass pass, int key_depth, int value_depth, const Arguments& args, const Launch& launch, int summary_rows, Maps* maps) {
  const stf_tensor *own[2] = {&args.query, &args.output_grad}, *streamed[2] = {&args.key, &args.value};
  const bool by_key = pass == kKeyGrad || pass == kBackward;
  if (by_key) std::swap(own, streamed);
  const int depths[2] = {args.key_depth, args.value_depth}, tile_depths[2] = {key_depth, value_depth};
  const int key_heads = args.heads / args.group;
  const int64_t positions = args.positions, stride = launch.stride;
  const int64_t longer = positions % stride;
  const Numbering plain = {1, 1, positions, 1};
  const Numbering variants[2] = {{stride, 1, positions / stride, stride}, {longer, 1, positions / stride + 1, stride}};
  cudaError_t error = cudaSuccess;
  const auto make = [&](int t, const stf_tensor& tensor, const Numbering& numbering, int rows, TensorMap* map) {
    const int heads = &tensor == &args.key || &tensor == &args.value ? key_heads : args.heads;
    if (error == cudaSuccess) error = Make(tensor, heads, args.batch, depths[t], tile_depths[t], numbering, rows, map);
  };
  *maps = {};
  maps->own_rows = by_key && summary_rows ? summary_rows : kRows;
  maps->summary_rows = summary_rows;
  maps->longer = static_cast<int32_t>(longer);
  for (int t = 0; t < 2; t++) {
    for (int variant = 0; variant < (longer ? 2 : 1); variant++) {
      if (own[t]->data) make(t, *own[t], variants[variant], maps->own_rows, &maps->own[t][variant]);
      make(t, *streamed[t], variants[variant], kRows, &maps->streamed[t][variant]);
    }
    if (!by_key && summary_rows) make(t, *streamed[t], plain, summary_rows, &maps->summary[t]);
  }
  for (int variant = 0; variant < (longer ? 2 : 1) && pass == kBackward; variant++) {
    make(1, args.output, variants[variant], kRows, &maps->output[variant]);
  }
  return error;
}

}  // namespace

bool HasMaps() { return FindEncode() != nullptr; }

int MapsOf(Pass pass, int key_depth, int value_depth, const Arguments& args, const Launch& launch, std::shared_ptr<const Maps>* maps) {
  static Cache<Maps, 4096> cache;  // 5 MiB
  const int summary_rows = SummaryRows(launch, args.positions);
  Key key;
  key.Add(args.query, args.key, args.value, pass == kBackward ? args.output : stf_tensor{}, args.output_grad)
      .Add(args.batch, args.positions, args.heads, args.group, args.key_depth, args.value_depth, launch.stride, summary_rows, key_depth,
           value_depth, pass);
  return cache.Get(key, maps, [&](Maps* made) { return MakeMaps(pass, key_depth, value_depth, args, launch, summary_rows, made); });
}

}  // namespace cuda
}  // namespace stf
