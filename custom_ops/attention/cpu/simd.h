// One vector type, as wide as the instruction set that this file is compiled for, through the compiler's vector extensions.
// Everything here and in the headers that use it lies in a namespace named after the instruction set, and calls no inline function of
// the standard library: a linker that merges equal inline functions must never hand AVX-512 code to an old processor.
#ifndef STF_CUSTOM_OPS_ATTENTION_CPU_SIMD_H_
#define STF_CUSTOM_OPS_ATTENTION_CPU_SIMD_H_

#include <stdint.h>

#if defined(__AVX512F__)
#define STF_ISA avx512
#elif defined(__AVX2__)
#define STF_ISA avx2
#else
#define STF_ISA generic
#endif
#if defined(__F16C__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace stf {
namespace cpu {
namespace STF_ISA {

#if defined(__AVX512F__)
constexpr int kWidth = 16;
constexpr int kPanel = 4;  // vectors side by side in a matrix product's register block
#elif defined(__AVX2__)
constexpr int kWidth = 8;
constexpr int kPanel = 2;
#else
constexpr int kWidth = 4;
constexpr int kPanel = 2;
#endif

typedef float Vec __attribute__((vector_size(kWidth * 4)));
typedef int32_t IntVec __attribute__((vector_size(kWidth * 4)));

inline __attribute__((always_inline)) Vec Load(const float* from) {
  Vec v;
  __builtin_memcpy(&v, from, sizeof v);
  return v;
}
inline __attribute__((always_inline)) void Store(float* to, Vec v) { __builtin_memcpy(to, &v, sizeof v); }
inline __attribute__((always_inline)) IntVec LoadInt(const int32_t* from) {
  IntVec v;
  __builtin_memcpy(&v, from, sizeof v);
  return v;
}

#if defined(__AVX512F__)
inline __attribute__((always_inline)) Vec Broadcast(float x) { return Vec{x, x, x, x, x, x, x, x, x, x, x, x, x, x, x, x}; }
inline __attribute__((always_inline)) IntVec BroadcastInt(int32_t x) { return IntVec{x, x, x, x, x, x, x, x, x, x, x, x, x, x, x, x}; }
#elif defined(__AVX2__)
inline __attribute__((always_inline)) Vec Broadcast(float x) { return Vec{x, x, x, x, x, x, x, x}; }
inline __attribute__((always_inline)) IntVec BroadcastInt(int32_t x) { return IntVec{x, x, x, x, x, x, x, x}; }
#else
inline __attribute__((always_inline)) Vec Broadcast(float x) { return Vec{x, x, x, x}; }
inline __attribute__((always_inline)) IntVec BroadcastInt(int32_t x) { return IntVec{x, x, x, x}; }
#endif

inline __attribute__((always_inline)) Vec Max(Vec a, Vec b) { return a > b ? a : b; }

// 2^x to 1 ulp for x in [-126, 127]; below, 2^-126. Not-a-number stays.
inline __attribute__((always_inline)) Vec Exp2(Vec x) {
  const Vec low = Broadcast(-126.0f);
  x = x < low ? low : x;
  const Vec magic = Broadcast(12582912.0f);  // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
  const Vec shifted = x + magic;
  const Vec f = x - (shifted - magic);  // in [-1/2, 1/2]
  // Taylor's series of 2^f to f^7: the remainder is 5e-9 of the value.
  Vec p = Broadcast(1.5252733804e-5f);
  p = p * f + Broadcast(1.5403530394e-4f);
  p = p * f + Broadcast(1.3333558146e-3f);
  p = p * f + Broadcast(9.6181291076e-3f);
  p = p * f + Broadcast(5.5504108665e-2f);
  p = p * f + Broadcast(2.4022650696e-1f);
  p = p * f + Broadcast(6.9314718056e-1f);
  p = p * f + Broadcast(1.0f);
  return (Vec)((IntVec)p + ((IntVec)shifted << 23));
}

// The kWidth x kWidth matrix in r, transposed by log2(kWidth) rounds of exchanges.
template <int kStep>
inline __attribute__((always_inline)) void TransposeRound(Vec* r) {
  if constexpr (kStep < kWidth) {
#pragma GCC unroll 16
    for (int i = 0; i < kWidth; i++) {
      if (i & kStep) continue;
      IntVec low, high;  // lanes of the pair (r[i], r[i + kStep]), the second one's counted from kWidth
      for (int lane = 0; lane < kWidth; lane++) {
        low[lane] = lane & kStep ? kWidth + lane - kStep : lane;
        high[lane] = lane & kStep ? kWidth + lane : lane + kStep;
      }
      const Vec a = r[i], b = r[i + kStep];
      r[i] = __builtin_shuffle(a, b, low);
      r[i + kStep] = __builtin_shuffle(a, b, high);
    }
    TransposeRound<kStep * 2>(r);
  }
}

}  // namespace STF_ISA
}  // namespace cpu
}  // namespace stf

#endif  // STF_CUSTOM_OPS_ATTENTION_CPU_SIMD_H_
