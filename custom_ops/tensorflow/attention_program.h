// The op's attributes, checked and parsed once: the pattern as the kernels' stf_problem wants it.
#ifndef STF_CUSTOM_OPS_TENSORFLOW_ATTENTION_PROGRAM_H_
#define STF_CUSTOM_OPS_TENSORFLOW_ATTENTION_PROGRAM_H_

#include <cstdint>
#include <string>
#include <vector>

#include "custom_ops/attention/problem.h"
#include "tensorflow/core/framework/op_kernel.h"

namespace stf {

struct Program {
  std::vector<stf_component> components;
  std::vector<int32_t> begin;  // [programs + 1]
  std::string layouts;
  float scale = 0;

  // InvalidArgument names the attribute and the value.
  absl::Status Init(tensorflow::OpKernelConstruction* context);

  // Whether block layouts fit a sequence of `positions`.
  absl::Status CheckPositions(int64_t positions) const;
};

}  // namespace stf

#endif  // STF_CUSTOM_OPS_TENSORFLOW_ATTENTION_PROGRAM_H_
