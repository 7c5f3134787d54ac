// What a block does between its products, one pass over memory each. All of it is by rows (a position of a sequence), which a warp holds in
// registers. Sums over rows, for the gradients of biases, are made in a fixed order.
#ifndef STF_CUSTOM_OPS_RESIDUAL_STACK_CUDA_ROWWISE_H_
#define STF_CUSTOM_OPS_RESIDUAL_STACK_CUDA_ROWWISE_H_

#include <cuda_runtime_api.h>

#include <cstdint>

#include "custom_ops/residual_stack/cuda/residual_stack.h"

namespace stf {
namespace cuda {

constexpr int64_t kVector = 8;        // widths are multiples of it: 16 bytes
constexpr int64_t kMostWidth = 2048;  // of a row that is normalized
constexpr int64_t kParts = 528;       // partial sums over rows: thread blocks of a launch, four for each multiprocessor of an H100

// Which elements of a branch are dropped: those whose hash of row and column, under the seed moved by (block, addition << 30), is below
// `below`; the same as stf/layers/dropout.py. `scale` is for the others. Rows are those of whole sequences, of which these `positions` are
// the `part`.
struct Dropout {
  const int32_t* seed;
  uint32_t below;
  float scale;
  int32_t block, addition;
  int64_t positions;
  stf_part part;
};

struct Rows {
  int32_t dtype;
  int64_t count, width;
  cudaStream_t stream;
};

// output = input + drop(branch + bias), normalized = (output - mean) inv_std. branch null: output = input, which is then not written.
// normalized null: it is not computed. output may be input, or null: it is not written.
cudaError_t AddAndNormalize(const Rows& rows, const void* input, const void* branch, const float* bias, const Dropout& dropout,
                            float epsilon, void* output, void* normalized, float* inv_std);

// grad = upstream + the gradient through a normalization (normalized_grad null: none), which may be upstream; dropped = what of it reaches
// a branch that was dropped (null: nothing is to be dropped, or no branch), and `sums` [kParts, stride] its sums over rows (null: not
// asked for).
cudaError_t NormalizeGradient(const Rows& rows, const void* upstream, const void* normalized_grad, const void* normalized,
                              const float* inv_std, const Dropout& dropout, void* grad, void* dropped, float* sums, int64_t stride);

// output = f(input), f(u) = u sigmoid(1.702 u).
cudaError_t Activate(const Rows& rows, const void* input, void* output);

// grad = grad f'(input), and its sums over rows.
cudaError_t ActivateGradient(const Rows& rows, const void* input, void* grad, float* sums, int64_t stride);

// Sums over rows of `input`.
cudaError_t SumRows(const Rows& rows, const void* input, float* sums, int64_t stride);

// The end of up to four sums over rows, which stand side by side in `sums`: each in its own `output` (null: left out) of so many `columns`.
struct Sums {
  float* output[4];
  int64_t columns[4];
};
cudaError_t FinishSums(const float* sums, const Sums& outputs, cudaStream_t stream);

// `count` floats, a multiple of kVector, in a stack's dtype.
cudaError_t Round(int32_t dtype, const float* input, void* output, int64_t count, cudaStream_t stream);

}  // namespace cuda
}  // namespace stf

#endif  // STF_CUSTOM_OPS_RESIDUAL_STACK_CUDA_ROWWISE_H_
