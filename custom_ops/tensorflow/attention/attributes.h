// The op's attributes, checked and parsed once: the pattern as the kernels' stf_problem wants it.
#ifndef STF_CUSTOM_OPS_TENSORFLOW_ATTENTION_ATTRIBUTES_H_
#define STF_CUSTOM_OPS_TENSORFLOW_ATTENTION_ATTRIBUTES_H_

#include <cstdint>
#include <vector>

#include "custom_ops/attention/problem.h"
#include "tensorflow/core/framework/op_kernel.h"

namespace stf {

struct Program {
  std::vector<stf_component> components;
  std::vector<int32_t> begin;  // [programs + 1]
  float scale = 0;

  // InvalidArgument names the attribute and the value.
  absl::Status Init(tensorflow::OpKernelConstruction* context);

  // Whether the block layouts, of so many bytes, are there and fit a sequence of `positions`.
  absl::Status CheckLayouts(int64_t bytes, int64_t positions) const;
};

}  // namespace stf

#endif  // STF_CUSTOM_OPS_TENSORFLOW_ATTENTION_ATTRIBUTES_H_
