// C (+)= A B for the small matrices of a tile. C's columns are vector lanes; A is read one element at a time, by any two strides, so that
// a matrix and its transpose are equally good. Blocks of C stay in registers over the whole inner dimension.
#ifndef STF_CUSTOM_OPS_ATTENTION_CPU_GEMM_H_
#define STF_CUSTOM_OPS_ATTENTION_CPU_GEMM_H_

#include "custom_ops/attention/cpu/simd.h"

namespace stf {
namespace cpu {
namespace STF_ISA {

struct Left {  // A: element (m, k) at data[m * row + k * column]
  const float* data;
  int64_t row, column;
};

template <int kRows, int kVectors>
inline __attribute__((always_inline)) void GemmBlock(int64_t inner, const float* a, int64_t row, int64_t column, const float* b,
                                                     int64_t b_row, float* c, int64_t c_row, bool add) {
  Vec sum[kRows][kVectors];
#pragma GCC unroll 16
  for (int m = 0; m < kRows; m++) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; v++) sum[m][v] = add ? Load(c + m * c_row + v * kWidth) : Vec{};
  }
  for (int64_t k = 0; k < inner; k++) {
    Vec right[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; v++) right[v] = Load(b + v * kWidth);
#pragma GCC unroll 16
    for (int m = 0; m < kRows; m++) {
      const Vec left = Broadcast(a[m * row]);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; v++) sum[m][v] += left * right[v];
    }
    a += column;
    b += b_row;
  }
#pragma GCC unroll 16
  for (int m = 0; m < kRows; m++) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; v++) Store(c + m * c_row + v * kWidth, sum[m][v]);
  }
}

// Rows of C held at once: as many accumulators as hide the multiply-add's latency and leave registers for B.
template <int kVectors>
constexpr int BlockRows() {
  return kWidth == 16 ? (kVectors == 4 ? 6 : kVectors == 3 ? 8 : 12) : (kVectors == 2 ? 6 : 8);
}

template <int kVectors>
__attribute__((noinline)) void GemmPanel(int64_t rows, int64_t inner, Left a, const float* b, int64_t b_row, float* c, int64_t c_row,
                                         bool add) {
  constexpr int kRows = BlockRows<kVectors>();
  int64_t m = 0;
  for (; m + kRows <= rows; m += kRows)
    GemmBlock<kRows, kVectors>(inner, a.data + m * a.row, a.row, a.column, b, b_row, c + m * c_row, c_row, add);
  if constexpr (kRows > 8) {
    if (m + 8 <= rows) {
      GemmBlock<8, kVectors>(inner, a.data + m * a.row, a.row, a.column, b, b_row, c + m * c_row, c_row, add);
      m += 8;
    }
  }
  if (m + 4 <= rows) {
    GemmBlock<4, kVectors>(inner, a.data + m * a.row, a.row, a.column, b, b_row, c + m * c_row, c_row, add);
    m += 4;
  }
  if (m + 2 <= rows) {
    GemmBlock<2, kVectors>(inner, a.data + m * a.row, a.row, a.column, b, b_row, c + m * c_row, c_row, add);
    m += 2;
  }
  if (m < rows) GemmBlock<1, kVectors>(inner, a.data + m * a.row, a.row, a.column, b, b_row, c + m * c_row, c_row, add);
}

// C [rows, columns] = A [rows, inner] B [inner, columns], or += where add. columns is a multiple of 16.
inline void Gemm(int64_t rows, int64_t columns, int64_t inner, Left a, const float* b, int64_t b_row, float* c, int64_t c_row, bool add) {
  int64_t n = 0;
  for (; n + kPanel * kWidth <= columns; n += kPanel * kWidth) GemmPanel<kPanel>(rows, inner, a, b + n, b_row, c + n, c_row, add);
  if constexpr (kPanel == 4) {
    switch ((columns - n) / kWidth) {
      case 3:
        return GemmPanel<3>(rows, inner, a, b + n, b_row, c + n, c_row, add);
      case 2:
        return GemmPanel<2>(rows, inner, a, b + n, b_row, c + n, c_row, add);
      case 1:
        return GemmPanel<1>(rows, inner, a, b + n, b_row, c + n, c_row, add);
    }
  }
}

}  // namespace STF_ISA
}  // namespace cpu
}  // namespace stf

#endif  // STF_CUSTOM_OPS_ATTENTION_CPU_GEMM_H_
