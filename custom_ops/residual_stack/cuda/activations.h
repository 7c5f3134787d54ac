// What a pass over a stack keeps and what its blocks share, and where it lies.
#ifndef STF_CUSTOM_OPS_RESIDUAL_STACK_CUDA_ACTIVATIONS_H_
#define STF_CUSTOM_OPS_RESIDUAL_STACK_CUDA_ACTIVATIONS_H_

#include <algorithm>
#include <utility>

#include "custom_ops/residual_stack/cuda/residual_stack.h"

namespace stf {
namespace cuda {

constexpr int64_t kElement = 2;     // bytes of a half
constexpr size_t kAlignment = 256;  // of what the workspace is divided into

// Hands out memory from a beginning on; from null on, it only counts.
class Arena {
 public:
  explicit Arena(void* begin) : begin_(static_cast<char*>(begin)) {}

  char* Take(size_t bytes) {
    char* taken = begin_ + used_;
    used_ += (bytes + kAlignment - 1) / kAlignment * kAlignment;
    return taken;
  }
  float* TakeFloats(size_t count) { return reinterpret_cast<float*>(Take(count * sizeof(float))); }
  size_t used() const { return used_; }

 private:
  char* begin_;
  size_t used_ = 0;
};

// Sizes that everything is counted in.
struct Sizes {
  int64_t rows, width, hidden, units, values, statistics;

  explicit Sizes(const stf_stack& stack) {
    const stf_problem& p = stack.attention[0];
    rows = p.batch * p.positions;
    width = stack.width;
    hidden = stack.hidden_width;
    values = p.heads * p.value_depth;
    units = 2 * p.heads * p.key_depth + values;
    statistics = rows * p.heads;
  }
};

// Blocks that are computed again at a time, from the input of their first: the more, the less is kept, and the more workspace their
// tensors take.
constexpr int64_t kSegment = 2;
inline int64_t Segment(const stf_stack& stack) { return stack.keep == STF_KEEP_STREAM ? std::min(stack.blocks, kSegment) : 1; }

// What a block computes on its way and its gradient needs: the normalized stream, query, key and value (`units`), attention's output
// (`heads`), the stream after attention normalized, the hidden layer before and after f.
struct Activations {
  char* stream;  // the block's input; only where it is kept
  char *normalized, *units, *heads, *second_normalized, *hidden, *activated;
  float *inv_std, *second_inv_std, *log_sum_exp;
};

// Those of a block that are kept; the others stay null.
inline Activations Kept(const stf_stack& stack, const void* kept, const float* statistics, int64_t block) {
  if (block % Segment(stack)) return {};
  const Sizes s(stack);
  const int64_t row = block / Segment(stack);
  char* next = static_cast<char*>(const_cast<void*>(kept)) + row * stf_stack_kept(&stack) * kElement;
  float* next_statistic = const_cast<float*>(statistics) + row * stf_stack_kept_statistics(&stack);
  auto take = [&](int64_t columns) { return std::exchange(next, next + s.rows * columns * kElement); };
  auto take_statistic = [&](int64_t count) { return std::exchange(next_statistic, next_statistic + count); };
  Activations a = {};
  if (stack.keep != STF_KEEP_ALL) a.stream = take(s.width);
  if (stack.keep != STF_KEEP_STREAM) {
    a.heads = take(s.values);
    a.log_sum_exp = take_statistic(s.statistics);
  }
  if (stack.keep == STF_KEEP_ALL) {
    a.normalized = take(s.width);
    a.units = take(s.units);
    a.second_normalized = take(s.width);
    a.hidden = take(s.hidden);
    a.activated = take(s.hidden);
    a.inv_std = take_statistic(s.rows);
    a.second_inv_std = take_statistic(s.rows);
  }
  return a;
}

// The others, which blocks share. A gradient of the hidden layer, or of the units, may take the place of `activated`.
inline Activations Shared(const stf_stack& stack, Arena* arena) {
  const Sizes s(stack);
  Activations a = {};
  if (stack.keep == STF_KEEP_STREAM) {
    a.heads = arena->Take(s.rows * s.values * kElement);
    a.log_sum_exp = arena->TakeFloats(s.statistics);
  }
  if (stack.keep != STF_KEEP_ALL) {
    a.normalized = arena->Take(s.rows * s.width * kElement);
    a.units = arena->Take(s.rows * s.units * kElement);
    a.second_normalized = arena->Take(s.rows * s.width * kElement);
    a.hidden = arena->Take(s.rows * s.hidden * kElement);
    a.activated = arena->Take(s.rows * std::max(s.hidden, s.units) * kElement);
    a.inv_std = arena->TakeFloats(s.rows);
    a.second_inv_std = arena->TakeFloats(s.rows);
  }
  return a;
}

// Those of `a`, and of `b` where `a` has none.
inline Activations Merge(Activations a, const Activations& b) {
  auto fill = [](auto*& x, auto* y) { x = x ? x : y; };
  fill(a.normalized, b.normalized);
  fill(a.units, b.units);
  fill(a.heads, b.heads);
  fill(a.second_normalized, b.second_normalized);
  fill(a.hidden, b.hidden);
  fill(a.activated, b.activated);
  fill(a.inv_std, b.inv_std);
  fill(a.second_inv_std, b.second_inv_std);
  fill(a.log_sum_exp, b.log_sum_exp);
  return a;
}

}  // namespace cuda
}  // namespace stf

#endif  // STF_CUSTOM_OPS_RESIDUAL_STACK_CUDA_ACTIVATIONS_H_
