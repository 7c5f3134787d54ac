// Runs every kind of kernel once, on few positions, for compute-sanitizer, which takes long under Python:
//
//     nvcc -std=c++17 -O3 -I. -arch=native -o build/sanitize tests/gpu/sanitize.cu build/cuda/*.o
//     for tool in memcheck racecheck initcheck; do compute-sanitizer --tool $tool build/sanitize; done
//
// The objects are those that custom_ops/attention/torch/binding.py builds. Nothing is compared here; see test_kernels.py.
#include <cuda_runtime.h>

#include <cstdio>
#include <cstdlib>
#include <vector>

#include "custom_ops/attention/cuda/attention.h"

namespace {

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

// A tensor of small numbers, or one that nothing has been written to.
stf_tensor Tensor(const stf_problem& problem, int64_t depth, bool fill) {
  const size_t size = problem.dtype == STF_FLOAT32 ? 4 : 2, count = problem.batch * problem.positions * problem.heads * depth;
  stf_tensor tensor = {Allocate(count * size), problem.positions * problem.heads * depth, problem.heads * depth, depth};
  if (fill) {
    std::vector<uint16_t> bits(count * size / 2);
    for (size_t i = 0; i < bits.size(); i++) bits[i] = 0x3000 + (i * 2654435761u >> 20 & 0x7ff);  // between 0 and 1 in all dtypes
    Check(cudaMemcpy(tensor.data, bits.data(), count * size, cudaMemcpyHostToDevice));
  }
  return tensor;
}

void Run(const stf_problem& problem) {
  const size_t rows = problem.batch * problem.heads * problem.positions;
  std::vector<stf_tensor> tensors;
  const int64_t key = problem.key_depth, value = problem.value_depth;
  for (const int64_t depth : {key, key, value, value}) tensors.push_back(Tensor(problem, depth, true));
  for (const int64_t depth : {value, key, key, value}) tensors.push_back(Tensor(problem, depth, false));
  float* const sums = static_cast<float*>(Allocate(rows * sizeof(float)));
  void* const workspace = Allocate(stf_attention_cuda_backward_workspace(&problem) + 16);
  const stf_tensor* t = tensors.data();
  Check(stf_attention_cuda_forward(&problem, &t[0], &t[1], &t[2], &t[4], sums, nullptr, nullptr));
  Check(stf_attention_cuda_backward(&problem, &t[0], &t[1], &t[2], &t[4], sums, &t[3], nullptr, &t[5], &t[6], &t[7], workspace, nullptr));
  Check(cudaDeviceSynchronize());
  for (const stf_tensor& tensor : tensors) Check(cudaFree(tensor.data));
  Check(cudaFree(sums));
  Check(cudaFree(workspace));
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
  int32_t* const lengths = static_cast<int32_t*>(Allocate(sizeof(used)));
  Check(cudaMemcpy(lengths, used, sizeof(used), cudaMemcpyHostToDevice));
  uint8_t* const layouts = static_cast<uint8_t*>(Allocate(32));
  Check(cudaMemset(layouts, 0x5b, 32));
  int runs = 0;
  for (const int32_t dtype : {STF_FLOAT32, STF_BFLOAT16, STF_FLOAT16}) {
    for (const auto& depth : depths) {
      for (const auto& pattern : patterns) {
        const bool ragged = runs % 3 == 2;
        Run({2, n, 3, depth[0], depth[1], dtype, 0.125f, 1, begin[pattern.size() - 1], pattern.data(), layouts,
             ragged ? lengths : nullptr});
        runs++;
      }
    }
  }
  std::printf("%d runs\n", runs);
}
