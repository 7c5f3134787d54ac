// Row-major matrix products by cuBLASLt, which is found when it is first asked for.
#ifndef STF_CUSTOM_OPS_RESIDUAL_STACK_CUDA_MATMUL_H_
#define STF_CUSTOM_OPS_RESIDUAL_STACK_CUDA_MATMUL_H_

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "custom_ops/attention/problem.h"

namespace stf {
namespace cuda {

constexpr size_t kMatmulWorkspace = size_t{32} << 20;  // bytes; what NVIDIA advises for Hopper

// One product after another on a stream. The first failure is kept, and nothing is launched after it.
class Matmul {
 public:
  // workspace: kMatmulWorkspace bytes, aligned to 256.
  Matmul(int32_t dtype, void* workspace, cudaStream_t stream) : dtype_(dtype), workspace_(workspace), stream_(stream) {}

  // c [m, n] = a [m, k] b [k, n] + bias [n]; bias may be null.
  void Forward(const void* a, const void* b, const void* bias, void* c, int64_t m, int64_t k, int64_t n);
  // a_grad [m, k] = c_grad [m, n] b [k, n]^T.
  void InputGradient(const void* c_grad, const void* b, void* a_grad, int64_t m, int64_t k, int64_t n);
  // b_grad [k, n] = a [m, k]^T c_grad [m, n].
  void KernelGradient(const void* a, const void* c_grad, void* b_grad, int64_t m, int64_t k, int64_t n);

  const char* error() const { return error_; }

 private:
  // Column-major, as cuBLAS has it: c [m, n] = op(a) op(b).
  void Run(bool transpose_a, bool transpose_b, int64_t m, int64_t n, int64_t k, const void* a, const void* b, const void* bias, void* c);

  int32_t dtype_;
  void* workspace_;
  cudaStream_t stream_;
  const char* error_ = nullptr;
};

}  // namespace cuda
}  // namespace stf

#endif  // STF_CUSTOM_OPS_RESIDUAL_STACK_CUDA_MATMUL_H_
