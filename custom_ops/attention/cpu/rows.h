// Rows of tensors to and from float32 scratch: conversion, padding, transposition.
#ifndef STF_CUSTOM_OPS_ATTENTION_CPU_ROWS_H_
#define STF_CUSTOM_OPS_ATTENTION_CPU_ROWS_H_

#include "custom_ops/attention/cpu/kernels.h"
#include "custom_ops/attention/cpu/simd.h"

namespace stf {
namespace cpu {
namespace STF_ISA {

inline float Bfloat16ToFloat(uint16_t x) {
  const uint32_t bits = static_cast<uint32_t>(x) << 16;
  float y;
  __builtin_memcpy(&y, &bits, sizeof y);
  return y;
}

inline uint16_t FloatToBfloat16(float x) {  // to nearest, ties to even
  uint32_t bits;
  __builtin_memcpy(&bits, &x, sizeof bits);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const uint32_t quiet = (bits >> 16) | 0x40;
  return static_cast<uint16_t>((bits & 0x7fffffff) > 0x7f800000 ? quiet : rounded);
}

inline float Float16ToFloat(uint16_t x) {
  const uint32_t sign = static_cast<uint32_t>(x & 0x8000) << 16;
  const uint32_t magnitude = x & 0x7fff;
  uint32_t bits = magnitude << 13;
  float y;
  if (magnitude >= 0x7c00) {  // infinity, not-a-number
    bits += 0x70000000;
  } else if (magnitude >= 0x0400) {
    bits += 0x38000000;
  } else {  // subnormal: an integer multiple of 2^-24
    y = static_cast<float>(magnitude) * 5.9604644775390625e-8f;
    __builtin_memcpy(&bits, &y, sizeof bits);
  }
  bits |= sign;
  __builtin_memcpy(&y, &bits, sizeof y);
  return y;
}

inline uint16_t FloatToFloat16(float x) {  // to nearest, ties to even
  uint32_t bits;
  __builtin_memcpy(&bits, &x, sizeof bits);
  const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000);
  bits &= 0x7fffffff;
  if (bits > 0x7f800000) return sign | 0x7e00;
  if (bits >= 0x477ff000) return sign | 0x7c00;  // 65520 and above round to infinity
  if (bits >= 0x38800000) return sign | static_cast<uint16_t>((bits - 0x38000000 + 0xfff + ((bits >> 13) & 1)) >> 13);
  float magnitude;  // below 2^-14: adding 1/2 aligns the subnormal's last bit with that of the sum, whose rounding is the wanted one
  __builtin_memcpy(&magnitude, &bits, sizeof magnitude);
  magnitude += 0.5f;
  __builtin_memcpy(&bits, &magnitude, sizeof bits);
  return sign | static_cast<uint16_t>(bits - 0x3f000000);
}

inline int64_t ElementSize(int32_t dtype) { return dtype == STF_FLOAT32 ? 4 : 2; }

// to[0 ... depth - 1] = factor * from, and zeros up to the padded depth.
inline void ReadRow(const void* from, int32_t dtype, int64_t depth, float* to) {
  int64_t i = 0;
  if (dtype == STF_FLOAT32) {
    const float* x = static_cast<const float*>(from);
    for (; i + kWidth <= depth; i += kWidth) Store(to + i, Load(x + i));
    for (; i < depth; i++) to[i] = x[i];
  } else if (dtype == STF_BFLOAT16) {
    const uint16_t* x = static_cast<const uint16_t*>(from);
    for (; i < depth; i++) to[i] = Bfloat16ToFloat(x[i]);
  } else {
    const uint16_t* x = static_cast<const uint16_t*>(from);
#if defined(__AVX512F__)
    for (; i + 16 <= depth; i += 16) _mm512_storeu_ps(to + i, _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + i))));
#elif defined(__F16C__)
    for (; i + 8 <= depth; i += 8) _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x + i))));
#endif
    for (; i < depth; i++) to[i] = Float16ToFloat(x[i]);
  }
  for (const int64_t padded = Padded(depth); i < padded; i++) to[i] = 0;
}

inline void WriteRow(const float* from, int32_t dtype, int64_t depth, void* to) {
  int64_t i = 0;
  if (dtype == STF_FLOAT32) {
    float* y = static_cast<float*>(to);
    for (; i + kWidth <= depth; i += kWidth) Store(y + i, Load(from + i));
    for (; i < depth; i++) y[i] = from[i];
  } else if (dtype == STF_BFLOAT16) {
    uint16_t* y = static_cast<uint16_t*>(to);
    for (; i < depth; i++) y[i] = FloatToBfloat16(from[i]);
  } else {
    uint16_t* y = static_cast<uint16_t*>(to);
#if defined(__AVX512F__)
    for (; i + 16 <= depth; i += 16)
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(y + i), _mm512_cvtps_ph(_mm512_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
    for (; i + 8 <= depth; i += 8)
      _mm_storeu_si128(reinterpret_cast<__m128i*>(y + i), _mm256_cvtps_ph(_mm256_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT));
#endif
    for (; i < depth; i++) y[i] = FloatToFloat16(from[i]);
  }
}

inline void AddRow(const float* from, int64_t depth, float* to) {
  int64_t i = 0;
  for (; i + kWidth <= depth; i += kWidth) Store(to + i, Load(to + i) + Load(from + i));
  for (; i < depth; i++) to[i] += from[i];
}

inline void Fill(float* to, int64_t count, float x) {
  for (int64_t i = 0; i < count; i++) to[i] = x;
}

// to [depth, kLanes] = factor * the transpose of from [kLanes, padded depth], whose rows from `rows` on (up to a multiple of 16) are zero.
inline void Transpose(const float* from, int64_t rows, int64_t depth, float factor, float* to) {
  const int64_t padded = Padded(depth);
  const Vec scale = Broadcast(factor);
  for (int64_t m = 0; m < rows; m += kWidth) {
    for (int64_t d = 0; d < depth; d += kWidth) {
      Vec r[kWidth];
#pragma GCC unroll 16
      for (int i = 0; i < kWidth; i++) r[i] = Load(from + (m + i) * padded + d) * scale;
      TransposeRound<1>(r);
#pragma GCC unroll 16
      for (int i = 0; i < kWidth; i++) Store(to + (d + i) * kLanes + m, r[i]);
    }
  }
}

// Asks for the `bytes` behind a row of as many.
inline void PrefetchNext(const char* row, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(row + bytes + i, 0, 2);
}

inline char* Element(const stf_tensor& tensor, int32_t dtype, int64_t batch, int64_t position, int64_t head) {
  return static_cast<char*>(tensor.data) +
         ElementSize(dtype) * (batch * tensor.batch_stride + position * tensor.position_stride + head * tensor.head_stride);
}

}  // namespace STF_ISA
}  // namespace cpu
}  // namespace stf

#endif  // STF_CUSTOM_OPS_ATTENTION_CPU_ROWS_H_
