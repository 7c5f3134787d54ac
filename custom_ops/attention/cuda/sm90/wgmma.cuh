// The matrix products of attention for a warpgroup, 64 rows at a time, on Hopper's asynchronous tensor cores (wgmma):
//   MultiplyScores:      sum[64, kColumns] = A[64, depth] * B[kColumns, depth]^T, both in shared memory
//   MultiplyWeighted:    sum[64, depth] += P[64, kRows] * B[kRows, depth], P in registers
//   MultiplyTransposed:  sum[64, depth] (+)= P[64, 64]^T * B[64, depth], both in shared memory (P by StoreWeights)
// Halves only, sm_90a only; for all else see common/mma.cuh, whose accumulators these share: a warp's are rows 16 * warp on.
//
// A tile lies in shared memory in panels of 64 columns (32 where the depth is 32), a panel's rows one after another, and in every row the
// 16-byte chunks swizzled as wgmma knows it: by the row's index within 8 (by half of it within 4). A row's chunks stay together in 128
// bytes: copies that scatter them fetch every sector twice.
#ifndef STF_CUSTOM_OPS_ATTENTION_CUDA_SM90_WGMMA_CUH_
#define STF_CUSTOM_OPS_ATTENTION_CUDA_SM90_WGMMA_CUH_

#include <type_traits>

#include "custom_ops/attention/cuda/common/rows.cuh"

namespace stf {
namespace cuda {

template <int kDepth, int kRows>
struct SharedTile {
  static constexpr int kRowBytes = kDepth == 32 ? 64 : 128, kEight = 8 * kRowBytes;  // of a panel's row, of eight
  static constexpr int kChunks = kDepth / 8, kRowChunks = kRowBytes / 16;
  static constexpr int kPanel = kRows * kRowBytes, kBytes = kDepth * 2 / kRowBytes * kPanel;
  static constexpr uint64_t kSwizzle = static_cast<uint64_t>(kRowBytes == 128 ? 1 : 2) << 62;  // in a matrix descriptor

  __device__ static int Offset(int row, int chunk) {
    const int swizzle = kRowBytes == 128 ? row & 7 : row >> 1 & 3;
    return chunk / kRowChunks * kPanel + row * kRowBytes + (chunk % kRowChunks ^ swizzle) * 16;
  }
};

__device__ inline uint32_t SharedAddress(const void* shared) { return static_cast<uint32_t>(__cvta_generic_to_shared(shared)); }

// A matrix in shared memory, `offset` bytes behind an address: bytes between panels (where it is read by rows), and between eights of
// rows. Of its two words only the low one varies.
template <int kDepth, int kRows>
__device__ inline uint64_t Describe(uint32_t address, int offset) {
  using Tile = SharedTile<kDepth, kRows>;
  const uint32_t low = (address >> 4 | (Tile::kPanel >> 4) << 16) + (offset >> 4);
  return static_cast<uint64_t>(Tile::kEight >> 4) << 32 | Tile::kSwizzle | low;
}

// A value that is the same in all lanes, told to the compiler.
__device__ inline uint32_t Uniform(uint32_t x) { return __shfl_sync(~0u, x, 0); }

// Shared memory written by this thread so far may be read by the tensor cores after the next barrier.
__device__ inline void FenceShared() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

#define STF_REGISTERS4(x, b) "+f"(x[b][0]), "+f"(x[b][1]), "+f"(x[b][2]), "+f"(x[b][3])
#define STF_REGISTERS16(x, b) STF_REGISTERS4(x, b), STF_REGISTERS4(x, b + 1), STF_REGISTERS4(x, b + 2), STF_REGISTERS4(x, b + 3)
#define STF_REGISTERS32(x, b) STF_REGISTERS16(x, b), STF_REGISTERS16(x, b + 4)
#define STF_REGISTERS64(x, b) STF_REGISTERS32(x, b), STF_REGISTERS32(x, b + 8)
#define STF_NAMES16 "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15"
#define STF_NAMES32 STF_NAMES16 ",%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define STF_NAMES64                                                                                               \
  STF_NAMES32                                                                                                     \
  ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58," \
  "%59,%60,%61,%62,%63"

// a and b in shared memory, each by its rows or, where `transposed`, by its columns; `accumulate` says whether sum is added to.
#define STF_SHARED(columns, names, registers, type, a_name, b_name, accumulate_name, transposed_name)                   \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " accumulate_name                                                      \
               ", 0;\n"                                                                                                 \
               "wgmma.mma_async.sync.aligned.m64n" columns "k16.f32." type "." type " {" names "}, " a_name ", " b_name \
               ", p, 1, 1, " transposed_name ", " transposed_name ";\n}\n"                                              \
               : registers                                                                                              \
               : "l"(a), "l"(b), "r"(accumulate), "n"(kTransposed))
// p in registers, b in shared memory by rows.
#define STF_WEIGHTED(columns, names, registers, type, p0, p1, p2, p3, b_name, accumulate_name)                                             \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " accumulate_name                                                                         \
               ", 0;\n"                                                                                                                    \
               "wgmma.mma_async.sync.aligned.m64n" columns "k16.f32." type "." type " {" names "}, {" p0 "," p1 "," p2 "," p3 "}, " b_name \
               ", p, 1, 1, 1;\n}\n"                                                                                                        \
               : registers                                                                                                                 \
               : "r"(p[0]), "r"(p[1]), "r"(p[2]), "r"(p[3]), "l"(b), "r"(accumulate))

template <typename T, int kTransposed, int kBlocks>
__device__ inline void IssueShared(float (&sum)[kBlocks][4], uint64_t a, uint64_t b, int accumulate) {
  constexpr bool kBrain = std::is_same_v<T, __nv_bfloat16>;
  if constexpr (kBlocks == 4) {
    if constexpr (kBrain) STF_SHARED("32", STF_NAMES16, STF_REGISTERS16(sum, 0), "bf16", "%16", "%17", "%18", "%19");
    if constexpr (!kBrain) STF_SHARED("32", STF_NAMES16, STF_REGISTERS16(sum, 0), "f16", "%16", "%17", "%18", "%19");
  } else if constexpr (kBlocks == 8) {
    if constexpr (kBrain) STF_SHARED("64", STF_NAMES32, STF_REGISTERS32(sum, 0), "bf16", "%32", "%33", "%34", "%35");
    if constexpr (!kBrain) STF_SHARED("64", STF_NAMES32, STF_REGISTERS32(sum, 0), "f16", "%32", "%33", "%34", "%35");
  } else {
    static_assert(kBlocks == 16, "32, 64 or 128 columns");
    if constexpr (kBrain) STF_SHARED("128", STF_NAMES64, STF_REGISTERS64(sum, 0), "bf16", "%64", "%65", "%66", "%67");
    if constexpr (!kBrain) STF_SHARED("128", STF_NAMES64, STF_REGISTERS64(sum, 0), "f16", "%64", "%65", "%66", "%67");
  }
}

template <typename T, int kBlocks>
__device__ inline void IssueWeighted(float (&sum)[kBlocks][4], const uint32_t (&p)[4], uint64_t b) {
  constexpr bool kBrain = std::is_same_v<T, __nv_bfloat16>;
  const int accumulate = 1;
  if constexpr (kBlocks == 4) {
    if constexpr (kBrain) STF_WEIGHTED("32", STF_NAMES16, STF_REGISTERS16(sum, 0), "bf16", "%16", "%17", "%18", "%19", "%20", "%21");
    if constexpr (!kBrain) STF_WEIGHTED("32", STF_NAMES16, STF_REGISTERS16(sum, 0), "f16", "%16", "%17", "%18", "%19", "%20", "%21");
  } else if constexpr (kBlocks == 8) {
    if constexpr (kBrain) STF_WEIGHTED("64", STF_NAMES32, STF_REGISTERS32(sum, 0), "bf16", "%32", "%33", "%34", "%35", "%36", "%37");
    if constexpr (!kBrain) STF_WEIGHTED("64", STF_NAMES32, STF_REGISTERS32(sum, 0), "f16", "%32", "%33", "%34", "%35", "%36", "%37");
  } else {
    static_assert(kBlocks == 16, "depth 32, 64 or 128");
    if constexpr (kBrain) STF_WEIGHTED("128", STF_NAMES64, STF_REGISTERS64(sum, 0), "bf16", "%64", "%65", "%66", "%67", "%68", "%69");
    if constexpr (!kBrain) STF_WEIGHTED("128", STF_NAMES64, STF_REGISTERS64(sum, 0), "f16", "%64", "%65", "%66", "%67", "%68", "%69");
  }
}

#undef STF_REGISTERS4
#undef STF_REGISTERS16
#undef STF_REGISTERS32
#undef STF_REGISTERS64
#undef STF_NAMES16
#undef STF_NAMES32
#undef STF_NAMES64
#undef STF_SHARED
#undef STF_WEIGHTED

// Products are issued between BeginProducts and CommitProducts; sums and P may be touched again once WaitForProducts says so.
__device__ inline void BeginProducts() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void CommitProducts() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

template <int kLeft = 0>
__device__ inline void WaitForProducts() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kLeft) : "memory");
}

// Keeps the compiler from moving other uses of registers across products that still write them.
template <int kBlocks>
__device__ inline void FenceRegisters(float (&sum)[kBlocks][4]) {
#pragma unroll
  for (int b = 0; b < kBlocks; b++) {
#pragma unroll
    for (int e = 0; e < 4; e++) asm volatile("" : "+f"(sum[b][e])::"memory");
  }
}

// a: the address of 64 rows in a tile of kRowsA; b: that of 8 * kBlocks rows in a tile of kRowsB.
template <typename T, int kDepth, int kRowsA, int kRowsB, int kBlocks>
__device__ inline void MultiplyScores(float (&sum)[kBlocks][4], uint32_t a, uint32_t b) {
  using A = SharedTile<kDepth, kRowsA>;
  using B = SharedTile<kDepth, kRowsB>;
#pragma unroll
  for (int k = 0; k < kDepth / 16; k++) {
    const int panel = 2 * k / A::kRowChunks, within = 2 * k % A::kRowChunks * 16;
    IssueShared<T, 0>(sum, Describe<kDepth, kRowsA>(a, panel * A::kPanel + within), Describe<kDepth, kRowsB>(b, panel * B::kPanel + within),
                      k > 0);
  }
}

// b: the address of 16 * kSixteens rows in a tile of kRows; p: see PackWeights.
template <typename T, int kDepth, int kRows, int kSixteens>
__device__ inline void MultiplyWeighted(float (&sum)[kDepth / 8][4], const uint32_t (&p)[kSixteens][4], uint32_t b) {
#pragma unroll
  for (int k = 0; k < kSixteens; k++) {
    IssueWeighted<T>(sum, p[k], Describe<kDepth, kRows>(b, 2 * k * SharedTile<kDepth, kRows>::kEight));
  }
}

// p: the address of a tile of 64 rows and columns; b: that of as many rows in a tile of kRows. Adds to `sum` where `add`.
template <typename T, int kDepth, int kRows>
__device__ inline void MultiplyTransposed(float (&sum)[kDepth / 8][4], uint32_t p, uint32_t b, bool add) {
#pragma unroll
  for (int k = 0; k < 64 / 16; k++) {
    IssueShared<T, 1>(sum, Describe<64, 64>(p, 2 * k * SharedTile<64, 64>::kEight),
                      Describe<kDepth, kRows>(b, 2 * k * SharedTile<kDepth, kRows>::kEight), add || k > 0);
  }
}

// Accumulators as the left factor of the next product.
template <typename T, int kBlocks>
__device__ inline void PackWeights(uint32_t (&p)[kBlocks / 2][4], const float (&x)[kBlocks][4]) {
#pragma unroll
  for (int k = 0; k < kBlocks / 2; k++) {
    p[k][0] = Pack(x[2 * k][0], x[2 * k][1], T());
    p[k][1] = Pack(x[2 * k][2], x[2 * k][3], T());
    p[k][2] = Pack(x[2 * k + 1][0], x[2 * k + 1][1], T());
    p[k][3] = Pack(x[2 * k + 1][2], x[2 * k + 1][3], T());
  }
}

// The same to shared memory: 64 rows and columns, each of the warpgroup's four warps its 16 rows.
__device__ inline void StoreWeights(uint32_t tile, const uint32_t (&p)[4][4]) {
  const int row = threadIdx.x / 32 % 4 * 16 + threadIdx.x % 16, chunk = threadIdx.x % 32 / 16;
#pragma unroll
  for (int k = 0; k < 4; k++) {
    asm volatile(
        "stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(tile + SharedTile<64, 64>::Offset(row, 2 * k + chunk)),
        "r"(p[k][0]), "r"(p[k][1]), "r"(p[k][2]), "r"(p[k][3])
        : "memory");
  }
}

// tile[row] = the row at position place(row) of a tensor; zeros where that is negative, and beyond `depth`. Rows are read 16 bytes at a
// time.
template <typename T, int kDepth, int kRows, int kThreads, typename Place>
__device__ void LoadSharedTile(uint32_t tile, const T* base, int64_t stride, int depth, Place place) {
  constexpr int kChunks = kDepth / 8, kStep = kThreads / kChunks;
  static_assert(kThreads % kChunks == 0 && kRows % kStep == 0, "every thread copies the same chunk of as many rows");
  const int chunk = threadIdx.x % kChunks, first = threadIdx.x / kChunks;
  static_assert(kStep % 8 == 0, "a thread's rows are swizzled alike");
  tile += SharedTile<kDepth, kRows>::Offset(first, chunk);
  const bool inside = 8 * chunk < depth;
  base += inside ? 8 * chunk : 0;
#pragma unroll
  for (int i = 0; i < kRows; i += kStep) {
    const int position = inside ? place(first + i) : -1;
    const T* from = base + max(position, 0) * stride;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(tile + i * SharedTile<kDepth, kRows>::kRowBytes), "l"(from),
                 "r"(position >= 0 ? 16 : 0)
                 : "memory");
  }
}

// The block's copies so far are there, and may be read by the tensor cores; what they read before may be overwritten. The fence waits for
// all copies under way: the next ones are started after it.
__device__ inline void FinishCopies() {
  WaitForCopies<0>();
  FenceShared();
  __syncthreads();
}

}  // namespace cuda
}  // namespace stf

#endif  // STF_CUSTOM_OPS_ATTENTION_CUDA_SM90_WGMMA_CUH_
