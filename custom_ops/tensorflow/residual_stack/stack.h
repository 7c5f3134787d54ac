// A call of the stack op: what its kernels, its lowering and its handlers under XLA share.
#ifndef STF_CUSTOM_OPS_TENSORFLOW_RESIDUAL_STACK_STACK_H_
#define STF_CUSTOM_OPS_TENSORFLOW_RESIDUAL_STACK_STACK_H_

#include <cstdint>
#include <vector>

#include "custom_ops/residual_stack/cuda/residual_stack.h"

namespace stf {

constexpr char kStackForwardCall[] = "stf_residual_stack", kStackGradientCall[] = "stf_residual_stack_gradient";

// The weights' places among the inputs, and their names, in the order of stf_stack_weights.
constexpr int kStackWeights = 8;
constexpr const char* kStackWeightNames[kStackWeights] = {"projection_kernel",     "projection_bias", "attention_output_kernel",
                                                          "attention_output_bias", "hidden_kernel",   "hidden_bias",
                                                          "output_kernel",         "output_bias"};

// Sizes and options of a stack, from shapes and attributes. Components, program_begin and first_program are the attributes' (see
// schema.cc); they are pointed to.
struct StackOptions {
  int64_t blocks, batch, positions, width, hidden_width, heads, key_depth, value_depth;
  int32_t dtype, keep;
  float epsilon, scale;
  int64_t drop_below;
  float drop_scale;
  stf_part part;
  const stf_component* components;
  const int32_t* program_begin;
  const int64_t* first_program;
  int64_t period;
};

// The stack as the kernels take it.
class Stack {
 public:
  Stack(const StackOptions& o, const uint8_t* layouts, const int32_t* seed) : problems_(o.period) {
    for (int64_t i = 0; i < o.period; i++) {
      problems_[i] = {o.batch,
                      o.positions,
                      o.heads,
                      o.key_depth,
                      o.value_depth,
                      o.dtype,
                      o.scale,
                      static_cast<int32_t>(o.first_program[i + 1] - o.first_program[i]),
                      o.program_begin + o.first_program[i],
                      o.components,
                      layouts,
                      nullptr};
    }
    stack_ = {o.blocks,        o.width,
              o.hidden_width,  o.keep,
              o.epsilon,       static_cast<uint32_t>(o.drop_below),
              o.drop_scale,    seed,
              o.part,          static_cast<int32_t>(o.period),
              problems_.data()};
  }
  Stack(const Stack&) = delete;
  Stack& operator=(const Stack&) = delete;

  const stf_stack* get() const { return &stack_; }
  const stf_problem& problem() const { return problems_[0]; }

 private:
  std::vector<stf_problem> problems_;
  stf_stack stack_;
};

inline stf_stack_weights StackWeights(void* const data[kStackWeights]) {
  auto floats = [&](int i) { return static_cast<float*>(data[i]); };
  return {data[0], floats(1), data[2], floats(3), data[4], floats(5), data[6], floats(7)};
}

}  // namespace stf

#endif  // STF_CUSTOM_OPS_TENSORFLOW_RESIDUAL_STACK_STACK_H_
