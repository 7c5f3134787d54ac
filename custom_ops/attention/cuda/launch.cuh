// Starts the kernels of one dtype and pair of depths.
#ifndef STF_CUSTOM_OPS_ATTENTION_CUDA_LAUNCH_CUH_
#define STF_CUSTOM_OPS_ATTENTION_CUDA_LAUNCH_CUH_

#include <numeric>

#include "custom_ops/attention/cuda/common/groups.cuh"
#include "custom_ops/attention/cuda/kernels.h"
#include "custom_ops/attention/cuda/sm80/backward.cuh"
#include "custom_ops/attention/cuda/sm80/forward.cuh"
#include "custom_ops/attention/cuda/sm80/packed.cuh"
#include "custom_ops/attention/cuda/sm90/backward.cuh"
#include "custom_ops/attention/cuda/sm90/packed.cuh"
#include "custom_ops/attention/cuda/sm90/passes.cuh"
#include "custom_ops/attention/cuda/sm90/tensor_maps.h"

namespace stf {
namespace cuda {

// Whether the output is kept in float32 between launches. That of floats is so anyway, and needs no kernel of its own.
inline bool Partial(const Arguments& args) { return args.output_partial.data != nullptr; }

template <typename Kernel>
cudaError_t Start(Kernel kernel, int threads, int bytes, int64_t tiles, const Arguments& args, const Launch& launch, cudaStream_t stream) {
  const int64_t blocks = tiles * args.batch * launch.head_slots;
  if (blocks == 0) return cudaSuccess;
  if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  if (const cudaError_t error = Allow(reinterpret_cast<const void*>(kernel), bytes)) return error;
  kernel<<<static_cast<unsigned>(blocks), threads, bytes, stream>>>(args, launch);
  return cudaGetLastError();
}

template <typename T, int kKeyDepth, int kValueDepth, int kWarps>
cudaError_t RunSm80Packed(Pass pass, const Arguments& args, const Launch& launch, cudaStream_t stream) {
  using Tile = Sm80PackedTile<T, kKeyDepth, kValueDepth, kWarps>;
  if constexpr (Tile::kBackwardBytes <= kSharedMemory[2]) {
    if (pass == kPackedForward) {
      return Start(Partial(args) ? Sm80PackedForwardKernel<T, kKeyDepth, kValueDepth, kWarps, sizeof(T) == 2>
                                 : Sm80PackedForwardKernel<T, kKeyDepth, kValueDepth, kWarps, false>,
                   Tile::kThreads, Tile::kForwardBytes, launch.tiles, args, launch, stream);
    }
    return Start(Sm80PackedBackwardKernel<T, kKeyDepth, kValueDepth, kWarps>, Tile::kThreads, Tile::kBackwardBytes, launch.tiles, args,
                 launch, stream);
  }
  return cudaErrorInvalidConfiguration;
}

// How many blocks a persistent launch has. Each takes every so many'th tile: where a sequence's tiles, of all lengths, follow one another,
// a few blocks less see to it that each block meets all of them.
inline int64_t PersistentBlocks(const Launch& launch, int64_t resident) {
  if (!launch.persistent) return INT32_MAX;
  for (int64_t blocks = resident; launch.together && blocks > resident - resident / 32; blocks--) {
    if (blocks % launch.head_slots == 0 && std::gcd(blocks / launch.head_slots, int64_t{launch.tiles}) == 1) return blocks;
  }
  return resident;
}

// The same of a kernel of sm90/kernel.cuh. Where each work tile is short, the grid is persistent: so many blocks as are resident.
template <typename Kernel>
cudaError_t StartSm90(Kernel kernel, int threads, int bytes, int64_t resident, Pass pass, int key_depth, int value_depth,
                      const Arguments& args, const Launch& launch, cudaStream_t stream) {
  std::shared_ptr<const Maps> maps;
  if (const int error = MapsOf(pass, key_depth, value_depth, args, launch, &maps)) return static_cast<cudaError_t>(error);
  if (const cudaError_t error = Allow(reinterpret_cast<const void*>(kernel), bytes)) return error;
  const int64_t most = PersistentBlocks(launch, resident);
  kernel<<<static_cast<unsigned>(launch.work_tiles < most ? launch.work_tiles : most), threads, bytes, stream>>>(args, launch, *maps);
  return cudaGetLastError();
}

template <typename P>
struct Type {
  using type = P;
};

template <typename T, int kKeyDepth, int kValueDepth, bool kGeneral, bool kDocuments>
cudaError_t RunSm90(Pass pass, const Arguments& args, const Launch& launch, const Machine& machine, cudaStream_t stream) {
  if (launch.work_tiles == 0) return cudaSuccess;
  if (launch.work_tiles > INT32_MAX / 2) return cudaErrorInvalidConfiguration;
  auto start = [&](auto pass_type) {
    using P = typename decltype(pass_type)::type;
    using Tile = typename P::Tile;
    const int64_t resident = int64_t{Tile::kBlocks} * machine.multiprocessors;
    return StartSm90(Sm90Kernel<P>, Tile::kThreads, Tile::kBytes, resident, pass, kKeyDepth, kValueDepth, args, launch, stream);
  };
  if (pass == kForward) {
    return Partial(args) ? start(Type<Forward<T, kKeyDepth, kValueDepth, kGeneral, kDocuments, true>>())
                         : start(Type<Forward<T, kKeyDepth, kValueDepth, kGeneral, kDocuments, false>>());
  }
  if (pass == kBackward) {
    if constexpr (!kGeneral && FindSm90BackwardTile({kKeyDepth, kValueDepth}).accumulators > 0) {
      using Pipeline = BackwardPipeline<kKeyDepth, kValueDepth>;
      return StartSm90(Sm90BackwardKernel<T, kKeyDepth, kValueDepth, kDocuments>, Pipeline::kThreads, Pipeline::kTile.bytes(),
                       machine.multiprocessors, pass, kKeyDepth, kValueDepth, args, launch, stream);
    }
    return cudaErrorInvalidConfiguration;
  }
  if (pass == kQueryGrad) return start(Type<QueryGrad<T, kKeyDepth, kValueDepth, kGeneral, kDocuments>>());
  return start(Type<KeyGrad<T, kKeyDepth, kValueDepth, kGeneral, kDocuments>>());
}

template <typename T, int kKeyDepth, int kValueDepth, int kRows, bool kDocuments>
cudaError_t RunSm90Packed(Pass pass, const Arguments& args, const Launch& launch, cudaStream_t stream) {
  using Tile = Sm90PackedTile<kKeyDepth, kValueDepth, kRows>;
  if (pass == kPackedForward) {
    return Start(Partial(args) ? Sm90PackedForwardKernel<T, kKeyDepth, kValueDepth, kRows, kDocuments, sizeof(T) == 2>
                               : Sm90PackedForwardKernel<T, kKeyDepth, kValueDepth, kRows, kDocuments, false>,
                 kPackedThreads, Tile::kForwardBytes, launch.tiles, args, launch, stream);
  }
  return Start(Sm90PackedBackwardKernel<T, kKeyDepth, kValueDepth, kRows, kDocuments>, kPackedThreads, Tile::kBackwardBytes, launch.tiles,
               args, launch, stream);
}

// Whatever pass, of a launch that is not general.
template <typename T, int kKeyDepth, int kValueDepth, bool kDocuments>
cudaError_t RunSm90Regular(Pass pass, const Arguments& args, const Launch& launch, const Machine& machine, cudaStream_t stream) {
  if (pass <= kBackward) return RunSm90<T, kKeyDepth, kValueDepth, false, kDocuments>(pass, args, launch, machine, stream);
  if (launch.packed_rows <= 64) return RunSm90Packed<T, kKeyDepth, kValueDepth, 64, kDocuments>(pass, args, launch, stream);
  return RunSm90Packed<T, kKeyDepth, kValueDepth, 128, kDocuments>(pass, args, launch, stream);
}

// A pass over tiles by the kernels of every card, with the tiles for so much shared memory.
template <typename T, int kKeyDepth, int kValueDepth, int kMemory>
cudaError_t RunSm80(Pass pass, const Arguments& args, const Launch& launch, cudaStream_t stream) {
  constexpr Depths kDepthsOf = {kKeyDepth, kValueDepth};
  constexpr Sm80Tile kForwardTile = FindSm80Tile(kForward, sizeof(T), kDepthsOf, kMemory);
  constexpr Sm80Tile kBackwardTile = FindSm80Tile(kKeyGrad, sizeof(T), kDepthsOf, kMemory);
  constexpr int kWarps = kBackwardTile.warps, kVisited = kBackwardTile.visited, kStages = kBackwardTile.stages;
  constexpr int kBackwardBytes = Sm80Bytes(kKeyGrad, sizeof(T), kDepthsOf, kBackwardTile);
  const int64_t tiles = static_cast<int64_t>(launch.tiles) * launch.sequences;
  auto backward = [&](auto kernel) { return Start(kernel, kBackwardTile.threads(), kBackwardBytes, tiles, args, launch, stream); };
  if (pass == kForward) {
    return Start(
        Partial(args)
            ? Sm80ForwardKernel<T, kKeyDepth, kValueDepth, kForwardTile.warps, kForwardTile.visited, kForwardTile.stages, sizeof(T) == 2>
            : Sm80ForwardKernel<T, kKeyDepth, kValueDepth, kForwardTile.warps, kForwardTile.visited, kForwardTile.stages, false>,
        kForwardTile.threads(), Sm80Bytes(kForward, sizeof(T), kDepthsOf, kForwardTile), tiles, args, launch, stream);
  }
  if (pass == kQueryGrad) return backward(Sm80QueryGradKernel<T, kKeyDepth, kValueDepth, kWarps, kVisited, kStages>);
  if constexpr (kKeyDepth + kValueDepth > 256) {
    const cudaError_t error = backward(Sm80KeyGradKernel<T, kKeyDepth, kValueDepth, kWarps, kVisited, kStages, kKeyPart>);
    return error != cudaSuccess ? error : backward(Sm80KeyGradKernel<T, kKeyDepth, kValueDepth, kWarps, kVisited, kStages, kValuePart>);
  } else {
    return backward(Sm80KeyGradKernel<T, kKeyDepth, kValueDepth, kWarps, kVisited, kStages, kBoth>);
  }
}

template <typename T>
cudaError_t SumGroups(const Arguments& args, const stf_tensor& from, const stf_tensor& to, int depth, cudaStream_t stream) {
  constexpr int kVector = 16 / sizeof(T);
  const int heads = args.heads / args.group;
  const int64_t count = int64_t{args.batch} * args.positions * heads * depth / (args.vector ? kVector : 1);
  const int64_t blocks = (count + kGroupThreads - 1) / kGroupThreads, most = 1 << 20;
  const auto kernel = args.vector ? SumGroupsKernel<T, kVector> : SumGroupsKernel<T, 1>;
  kernel<<<static_cast<unsigned>(blocks < most ? blocks : most), kGroupThreads, 0, stream>>>(from, to, args.group, heads, args.positions,
                                                                                             depth, count);
  return cudaGetLastError();
}

template <typename T, int kIndex>
cudaError_t Run(Pass pass, const Arguments& args, const Launch& launch, const Machine& machine, cudaStream_t stream) {
  constexpr int kKeyDepth = kDepths[kIndex].key, kValueDepth = kDepths[kIndex].value;
  if constexpr (HasSm90Kernels(sizeof(T), kDepths[kIndex])) {
    if (launch.sm90) {
      if (launch.general) return RunSm90<T, kKeyDepth, kValueDepth, true, true>(pass, args, launch, machine, stream);
      return args.documents ? RunSm90Regular<T, kKeyDepth, kValueDepth, true>(pass, args, launch, machine, stream)
                            : RunSm90Regular<T, kKeyDepth, kValueDepth, false>(pass, args, launch, machine, stream);
    }
  }
  if (pass <= kKeyGrad) {
    return Sm80Memory(machine.memory) == kSharedMemory[0]
               ? RunSm80<T, kKeyDepth, kValueDepth, kSharedMemory[0]>(pass, args, launch, stream)
               : RunSm80<T, kKeyDepth, kValueDepth, kSharedMemory[1]>(pass, args, launch, stream);
  }
  if constexpr (kKeyDepth + kValueDepth <= 256) {
    if (launch.packed_rows <= 64) return RunSm80Packed<T, kKeyDepth, kValueDepth, 4>(pass, args, launch, stream);
    return RunSm80Packed<T, kKeyDepth, kValueDepth, 8>(pass, args, launch, stream);
  }
  return cudaErrorInvalidConfiguration;
}

}  // namespace cuda
}  // namespace stf

#endif  // STF_CUSTOM_OPS_ATTENTION_CUDA_LAUNCH_CUH_
