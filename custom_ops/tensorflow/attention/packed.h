// Query, key and value that lie side by side, as the strided tensors that kernels take.
#ifndef STF_CUSTOM_OPS_TENSORFLOW_ATTENTION_PACKED_H_
#define STF_CUSTOM_OPS_TENSORFLOW_ATTENTION_PACKED_H_

#include "custom_ops/attention/problem.h"

namespace stf {

// Query, key and value (or their gradients) of a problem, side by side in rows that begin at `data`, whose elements have so many bytes.
inline void Unpack(const stf_problem& problem, void* data, int64_t bytes, stf_tensor tensors[3]) {
  const int64_t keys = problem.heads * problem.key_depth, width = 2 * keys + problem.heads * problem.value_depth;
  for (int i = 0; i < 3; i++) {
    tensors[i] = {static_cast<char*>(data) + bytes * i * keys, problem.positions * width, width,
                  i < 2 ? problem.key_depth : problem.value_depth};
  }
}

}  // namespace stf

#endif  // STF_CUSTOM_OPS_TENSORFLOW_ATTENTION_PACKED_H_
