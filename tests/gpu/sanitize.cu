// Runs every kind of attention kernel once, on few positions, for compute-sanitizer, which takes long under Python, and holds the results
// against the formulas in float64. test_sanitize.py builds it, with the kernels, and runs it.
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

#include "custom_ops/attention/cuda/attention.h"
#include "tests/sanitize/dense_attention.h"

namespace {

// In roundings, by the dtype of the tensors: twice the largest that main printed with each card's kernels and those of STF_CUDA_KERNELS, on
// an H100.
constexpr double kAllowed[3][kResults] = {{5.1, 5.3, 1.3, 1.4, 6.5}, {0.5, 3.4, 0.2, 0.15, 0.35}, {0.5, 5.3, 0.25, 1.8, 5.3}};
double largest_error[3][kResults];

void Check(int error) {
  if (error == 0) return;
  std::printf("%s\n", stf_attention_cuda_error(error));
  std::exit(1);
}

void* Allocate(size_t bytes) {
  void* memory;
  Check(cudaMalloc(&memory, bytes));
  return memory;
}

// A tensor [B, T, H, depth] of the device, to which nothing has been written, or a statistic [B, H, T].
struct Tensor {
  Tensor(const stf_problem& p, int64_t depth, int32_t dtype) : p(p), depth(depth), dtype(dtype), element(dtype == STF_FLOAT32 ? 4 : 2) {
    count = p.batch * p.positions * p.heads * depth;
    view = {Allocate(count * element), p.positions * p.heads * depth, p.heads * depth, depth};
  }
  Tensor(const Tensor&) = delete;
  ~Tensor() { Check(cudaFree(view.data)); }

  // Random numbers from -3 to 3, and what is not-a-number past a sequence's length; returns them as [B, H, T, depth].
  std::vector<double> Fill(const int32_t* lengths, std::mt19937_64* random) {
    std::vector<char> bytes(count * element);
    std::vector<double> numbers(count);
    for (size_t n = 0; n < numbers.size(); n++) {
      const int64_t d = n % depth, t = n / depth % p.positions, h = n / depth / p.positions % p.heads,
                    b = n / depth / p.positions / p.heads;
      const bool used = !lengths || t < lengths[b];
      const uint32_t bits = used ? Encode(static_cast<int64_t>((*random)() >> 40) * 0x6p-24f - 3, dtype) : ~0u;
      const size_t at = b * view.batch_stride + t * view.position_stride + h * view.head_stride + d;
      std::copy_n(reinterpret_cast<const char*>(&bits), element, &bytes[at * element]);  // little-endian
      numbers[n] = Decode(bits, dtype);
    }
    Check(cudaMemcpy(view.data, bytes.data(), bytes.size(), cudaMemcpyHostToDevice));
    return numbers;
  }

  void Compare(Result result, const DenseResults& dense) const {
    std::vector<char> bytes(count * element);
    Check(cudaMemcpy(bytes.data(), view.data, bytes.size(), cudaMemcpyDeviceToHost));
    for (size_t n = 0; n < count; n++) {
      const int64_t d = n % depth, t = n / depth % p.positions, h = n / depth / p.positions % p.heads,
                    b = n / depth / p.positions / p.heads;
      const size_t at = b * view.batch_stride + t * view.position_stride + h * view.head_stride + d;
      uint32_t bits = 0;
      std::copy_n(&bytes[(result == kLogSumExp ? n : at) * element], element, reinterpret_cast<char*>(&bits));
      const double got = Decode(bits, dtype), error = Roundings(got, dense, result, n, dtype);
      if (!(error <= kAllowed[p.dtype][result])) {
        std::printf("%s depths %d %d, components of kind %d ...: %s[%zu] is %g, not %g: wrong by %g roundings\n", kDtypeNames[p.dtype],
                    static_cast<int>(p.key_depth), static_cast<int>(p.value_depth), static_cast<int>(p.components[0].kind),
                    kResultNames[result], n, got, dense.value[result][n], error);
        std::exit(1);
      }
      largest_error[p.dtype][result] = std::max(largest_error[p.dtype][result], error);
    }
  }

  const stf_problem& p;
  int64_t depth;
  int32_t dtype;
  size_t element, count;
  stf_tensor view;
};

// `host` has its lengths and layouts on the host, `p` on the device.
void Run(const stf_problem& host, const stf_problem& p, std::mt19937_64* random) {
  Tensor query(p, p.key_depth, p.dtype), key(p, p.key_depth, p.dtype), value(p, p.value_depth, p.dtype), grad(p, p.value_depth, p.dtype);
  DenseInputs inputs = {query.Fill(host.lengths, random), key.Fill(host.lengths, random), value.Fill(host.lengths, random),
                        grad.Fill(host.lengths, random), std::vector<double>(p.batch * p.heads * p.positions)};
  Tensor output(p, p.value_depth, p.dtype), log_sum_exp(p, 1, STF_FLOAT32);
  Tensor query_grad(p, p.key_depth, p.dtype), key_grad(p, p.key_depth, p.dtype), value_grad(p, p.value_depth, p.dtype);
  const size_t bytes = std::max(stf_attention_cuda_forward_workspace(&p), stf_attention_cuda_backward_workspace(&p));
  void* const workspace = Allocate(bytes + 16);
  float* const sums = static_cast<float*>(log_sum_exp.view.data);
  Check(stf_attention_cuda_forward(&p, &query.view, &key.view, &value.view, &output.view, sums, workspace, nullptr));
  Check(stf_attention_cuda_backward(&p, &query.view, &key.view, &value.view, &output.view, sums, &grad.view, nullptr, &query_grad.view,
                                    &key_grad.view, &value_grad.view, workspace, nullptr));
  Check(cudaDeviceSynchronize());
  Check(cudaFree(workspace));
  const DenseResults dense = DenseAttention(host, inputs);
  const Tensor* const results[kResults] = {&output, &log_sum_exp, &query_grad, &key_grad, &value_grad};
  for (int r = 0; r < kResults; r++) results[r]->Compare(static_cast<Result>(r), dense);
}

}  // namespace

int main() {
  const int64_t n = 205;
  const std::vector<std::vector<stf_component>> patterns = {
      {{STF_CAUSAL}},
      {{STF_LOCAL, 37}},
      {{STF_STRIDED, 2}},
      {{STF_STRIDED, 7}},
      {{STF_OWN_BLOCK, 24}},
      {{STF_OWN_BLOCK, 150}},
      {{STF_OWN_BLOCK, 32}, {STF_SUMMARY, 32, 24, 32}},
      {{STF_SUMMARY, 50, 43, 50, 1}},
      {{STF_LOCAL, 20}, {STF_STRIDED, 20, 0, 0, 0, 1}},
      {{STF_BLOCKS, 16, 0, 13}, {STF_LOCAL, 9, 0, 0, 0, 1}},
  };
  const int64_t depths[][2] = {{32, 32}, {64, 64}, {64, 128}, {128, 128}, {256, 256}, {40, 24}, {7, 5}};
  const int32_t begin[2][2] = {{0, 1}, {0, 2}}, used[2] = {n, 90};
  const std::vector<uint8_t> bits(32, 0x5b);
  int32_t* const lengths = static_cast<int32_t*>(Allocate(sizeof(used)));
  Check(cudaMemcpy(lengths, used, sizeof(used), cudaMemcpyHostToDevice));
  uint8_t* const layouts = static_cast<uint8_t*>(Allocate(bits.size()));
  Check(cudaMemcpy(layouts, bits.data(), bits.size(), cudaMemcpyHostToDevice));
  std::mt19937_64 random(1);
  int runs = 0;
  for (const int32_t dtype : {STF_FLOAT32, STF_BFLOAT16, STF_FLOAT16}) {
    for (const auto& depth : depths) {
      const float scale = 1 / std::sqrt(static_cast<float>(depth[0]));
      for (const auto& pattern : patterns) {
        const bool ragged = runs++ % 3 == 2;
        stf_problem host = {
            2, n, 3, depth[0], depth[1], dtype, scale, 1, begin[pattern.size() - 1], pattern.data(), bits.data(), ragged ? used : nullptr};
        stf_problem device = host;
        device.layouts = layouts;
        device.lengths = ragged ? lengths : nullptr;
        Run(host, device, &random);
      }
    }
  }
  Check(cudaFree(lengths));
  Check(cudaFree(layouts));
  std::printf("%d runs; largest errors in roundings:\n", runs);
  for (int32_t dtype = 0; dtype < 3; dtype++) {
    std::printf("%-8s", kDtypeNames[dtype]);
    for (int r = 0; r < kResults; r++) std::printf("  %s %.2f", kResultNames[r], largest_error[dtype][r]);
    std::printf("\n");
  }
}
