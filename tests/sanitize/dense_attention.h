// Attention and its gradients in float64, pair by pair, from what problem.h says alone: what the kernels are held against.
#ifndef STF_TESTS_SANITIZE_DENSE_ATTENTION_H_
#define STF_TESTS_SANITIZE_DENSE_ATTENTION_H_

#include <stddef.h>
#include <stdint.h>

#include <vector>

#include "custom_ops/attention/problem.h"

enum Result { kOutput, kLogSumExp, kQueryGrad, kKeyGrad, kValueGrad, kResults };
extern const char* const kResultNames[kResults];
extern const char* const kDtypeNames[3];  // by stf_dtype

// A number's bits in a dtype, in the lower 16 those of a half, which is cut towards 0; and the number that bits are.
uint32_t Encode(float x, int32_t dtype);
double Decode(uint32_t bits, int32_t dtype);

// All are [B, H, T, depth]. What stands past a sequence's length is not read.
struct DenseInputs {
  std::vector<double> query, key, value, output_grad, log_sum_exp_grad;
};

// The results, and the size of the terms that each is summed from: a change of one part in N of every product, score and weight on the way
// changes a result by size / N at the most, to the first order.
struct DenseResults {
  std::vector<double> value[kResults], size[kResults];
};

// How far a result is from the n-th of `dense`, in roundings, to the result's dtype, of its `size`; not-a-number where it is none.
double Roundings(double got, const DenseResults& dense, Result result, size_t n, int32_t dtype);

// Ends the process where the components of a head are not disjoint.
DenseResults DenseAttention(const stf_problem& problem, const DenseInputs& inputs);

#endif  // STF_TESTS_SANITIZE_DENSE_ATTENTION_H_
