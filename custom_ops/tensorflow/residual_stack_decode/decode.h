// A call of the decode op: what its schema, its lowering and its handler under XLA share.
#ifndef STF_CUSTOM_OPS_TENSORFLOW_RESIDUAL_STACK_DECODE_DECODE_H_
#define STF_CUSTOM_OPS_TENSORFLOW_RESIDUAL_STACK_DECODE_DECODE_H_

#include <cstdint>

#include "custom_ops/residual_stack/cuda/decode.h"

namespace stf {

constexpr char kDecodeCall[] = "stf_residual_stack_decode";

// Places among the operands: the input, the weights (as in residual_stack/stack.h), and behind them these. The caches' keys are the last,
// all parts', then their values.
constexpr int kDecodeInput = 0, kDecodeWeights = 1, kDecodeReads = 9, kDecodeWrites = 10, kDecodeCaches = 11;

}  // namespace stf

#endif  // STF_CUSTOM_OPS_TENSORFLOW_RESIDUAL_STACK_DECODE_DECODE_H_
