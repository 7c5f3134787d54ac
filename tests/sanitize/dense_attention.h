// Attention and its gradients in float64, pair by pair, from what problem.h says alone: what the kernels are held against.
#ifndef STF_TESTS_SANITIZE_DENSE_ATTENTION_H_
#define STF_TESTS_SANITIZE_DENSE_ATTENTION_H_

#include <vector>

#include "custom_ops/attention/problem.h"

enum Result { kOutput, kLogSumExp, kQueryGrad, kKeyGrad, kValueGrad, kResults };

// All are [B, H, T, depth]. What stands past a sequence's length is not read.
struct DenseInputs {
  std::vector<double> query, key, value, output_grad, log_sum_exp_grad;
};

// The results, and the size of the terms that each is summed from: a change of one part in N of every product, score and weight on the way
// changes a result by size / N at the most, to the first order.
struct DenseResults {
  std::vector<double> value[kResults], size[kResults];
};

// Ends the process where the components of a head are not disjoint.
DenseResults DenseAttention(const stf_problem& problem, const DenseInputs& inputs);

#endif  // STF_TESTS_SANITIZE_DENSE_ATTENTION_H_
