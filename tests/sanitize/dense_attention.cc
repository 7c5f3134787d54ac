#include "tests/sanitize/dense_attention.h"

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>

const char* const kResultNames[kResults] = {"output", "log_sum_exp", "query_grad", "key_grad", "value_grad"};
const char* const kDtypeNames[3] = {"float32", "bfloat16", "float16"};

namespace {

constexpr double kRoundoff[3] = {0x1p-24, 0x1p-8, 0x1p-11};
constexpr double kSmallest[3] = {0, 0, 0x1p-25};  // the rounding of a float16 below its normal numbers

bool Contains(const stf_problem& p, const stf_component& c, int64_t i, int64_t j) {
  switch (c.kind) {
    case STF_LOCAL:
      return i - j <= c.a;
    case STF_STRIDED:
      return (i - j) % c.a == 0 && i - j >= c.b * c.a;
    case STF_OWN_BLOCK:
      return j / c.a == i / c.a;
    case STF_SUMMARY:
      return c.b <= j % c.a && j % c.a < c.c && (j / c.a < i / c.a || c.d == 1);
    case STF_BLOCKS: {
      const int64_t bit = c.b + i / c.a * c.c + j / c.a;
      return p.layouts[bit / 8] >> bit % 8 & 1;
    }
    default:
      return true;
  }
}

// Whether the pair is in a component of the head; it may be in one only.
bool Attends(const stf_problem& p, int64_t head, int64_t i, int64_t j) {
  const int32_t* const begin = p.program_begin + head % p.programs;
  const stf_component* const program = p.components + begin[0];
  int count = 0;
  for (int t = 0; t < begin[1] - begin[0]; t++) {
    bool in = Contains(p, program[t], i, j);
    for (int e = 0; in && e < t; e++) in = !(program[t].exclude >> e & 1 && Contains(p, program[e], i, j));
    count += in;
  }
  if (count <= 1) return count == 1;
  std::printf("The components of head %d overlap.\n", static_cast<int>(head));
  std::exit(1);
}

void AddTo(DenseResults* to, Result result, int64_t row, int64_t depth, double factor, double factor_size, const double* x) {
  double *const value = &to->value[result][row * depth], *const size = &to->size[result][row * depth];
  for (int64_t d = 0; d < depth; d++) {
    value[d] += factor * x[d];
    size[d] += factor_size * std::fabs(x[d]);
  }
}

// A query's part of all results. Rows count all positions of all heads.
void AddQuery(const stf_problem& p, const DenseInputs& in, int64_t row, const std::vector<int64_t>& keys, DenseResults* to) {
  const double scale = p.scale, *const query = &in.query[row * p.key_depth], *const grad = &in.output_grad[row * p.value_depth];
  std::vector<double> score(keys.size()), score_size(keys.size());
  double top = -INFINITY, total = 0;
  for (size_t n = 0; n < keys.size(); n++) {
    const double* const key = &in.key[keys[n] * p.key_depth];
    for (int64_t d = 0; d < p.key_depth; d++) {
      score[n] += scale * query[d] * key[d];
      score_size[n] += std::fabs(scale * query[d] * key[d]);
    }
    top = std::fmax(top, score[n]);
  }
  for (const double x : score) total += std::exp(x - top);
  const double log_sum_exp = top + std::log(total);
  to->value[kLogSumExp][row] = log_sum_exp;
  to->size[kLogSumExp][row] = 1 + std::fabs(log_sum_exp);

  std::vector<double> weight(keys.size()), weight_size(keys.size());
  for (size_t n = 0; n < keys.size(); n++) {
    weight[n] = std::exp(score[n] - log_sum_exp);
    weight_size[n] = weight[n] * (1 + score_size[n] + std::fabs(log_sum_exp));
    to->size[kLogSumExp][row] += weight[n] * score_size[n];
    AddTo(to, kOutput, row, p.value_depth, weight[n], weight_size[n], &in.value[keys[n] * p.value_depth]);
  }

  double delta = -in.log_sum_exp_grad[row], delta_size = std::fabs(delta);
  for (int64_t d = 0; d < p.value_depth; d++) {
    delta += grad[d] * to->value[kOutput][row * p.value_depth + d];
    delta_size += std::fabs(grad[d]) * to->size[kOutput][row * p.value_depth + d];
  }
  for (size_t n = 0; n < keys.size(); n++) {
    const double* const value = &in.value[keys[n] * p.value_depth];
    double product = 0, product_size = 0;
    for (int64_t d = 0; d < p.value_depth; d++) {
      product += grad[d] * value[d];
      product_size += std::fabs(grad[d] * value[d]);
    }
    const double score_grad = scale * weight[n] * (product - delta);
    const double size = std::fabs(scale) * (weight_size[n] * std::fabs(product - delta) + weight[n] * (product_size + delta_size));
    AddTo(to, kQueryGrad, row, p.key_depth, score_grad, size, &in.key[keys[n] * p.key_depth]);
    AddTo(to, kKeyGrad, keys[n], p.key_depth, score_grad, size, query);
    AddTo(to, kValueGrad, keys[n], p.value_depth, weight[n], weight_size[n], grad);
  }
}

}  // namespace

uint32_t Encode(float x, int32_t dtype) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  if (dtype == STF_FLOAT32) return bits;
  if (dtype == STF_BFLOAT16) return bits >> 16;
  const uint32_t magnitude = bits & 0x7fffffff;
  return (bits >> 16 & 0x8000) | (magnitude < 0x38800000 ? 0 : (magnitude - 0x38000000) >> 13);
}

double Decode(uint32_t bits, int32_t dtype) {
  if (dtype == STF_FLOAT16) {
    const int exponent = bits >> 10 & 31, fraction = bits & 1023;
    const double x = exponent == 31  ? fraction ? NAN : INFINITY
                     : exponent == 0 ? std::ldexp(fraction, -24)
                                     : std::ldexp(1024 + fraction, exponent - 25);
    return bits & 0x8000 ? -x : x;
  }
  float x;
  if (dtype == STF_BFLOAT16) bits <<= 16;
  memcpy(&x, &bits, sizeof x);
  return x;
}

double Roundings(double got, const DenseResults& dense, Result result, size_t n, int32_t dtype) {
  const double expected = dense.value[result][n];
  if (got == expected) return 0;
  return std::fabs(got - expected) / (kRoundoff[dtype] * dense.size[result][n] + kSmallest[dtype]);
}

DenseResults DenseAttention(const stf_problem& p, const DenseInputs& inputs) {
  const int64_t rows = p.batch * p.heads * p.positions, depths[] = {p.value_depth, 1, p.key_depth, p.key_depth, p.value_depth};
  DenseResults results;
  for (int r = 0; r < kResults; r++) {
    results.value[r].assign(rows * depths[r], r == kLogSumExp ? -INFINITY : 0);
    results.size[r].assign(rows * depths[r], 0);
  }
  for (int64_t sequence = 0; sequence < p.batch * p.heads; sequence++) {
    const int64_t batch = sequence / p.heads, head = sequence % p.heads, first = sequence * p.positions;
    const int64_t length = p.lengths ? p.lengths[batch] : p.positions;
    for (int64_t i = 0; i < length; i++) {
      std::vector<int64_t> keys;
      for (int64_t j = 0; j <= i; j++) {
        if (Attends(p, head, i, j)) keys.push_back(first + j);
      }
      if (!keys.empty()) AddQuery(p, inputs, first + i, keys, &results);
    }
  }
  return results;
}
