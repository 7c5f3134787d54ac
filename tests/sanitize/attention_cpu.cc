// Runs the CPU kernels over every kind of component, for the sanitizers that test_attention_cpu.py compiles them and this file with.
// Every tensor has its exact size and every element that may not be read is not-a-number. Results are held against the formulas in
// float64, and those of eight threads, bit by bit, against those of one.
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "custom_ops/attention/cpu/attention.h"
#include "tests/sanitize/dense_attention.h"

namespace {

constexpr int kThreads = 8;
constexpr int64_t kLargest = INT64_MAX / 4096;  // of a component's parameter, in tensorflow/attention/attributes.cc

// In roundings, by the dtype of the tensors. Allowed is twice the largest that main printed with
// the generic and the AVX2 kernels of g++ 12 at -O1.
constexpr double kAllowed[3][kResults] = {{3.5, 8, 3.6, 3.8, 5.5}, {1.2, 8, 0.6, 0.6, 1.7}, {1.2, 12, 0.5, 1.9, 2}};
double largest_error[3][kResults];

std::string running;  // what failed, if anything does

void Fail(const std::string& what) {
  printf("%s: %s\n", running.c_str(), what.c_str());
  exit(1);
}

struct Free {
  void operator()(void* memory) const { free(memory); }
};

// A tensor of [B, T, H, depth] whose memory ends with its last element; all not-a-number until it is written.
struct Tensor {
  Tensor(const stf_problem& problem, int64_t depth, int32_t dtype, const stf_tensor& strides) : p(problem), depth(depth), dtype(dtype) {
    view = strides;
    if (p.batch * p.positions * p.heads * depth > 0) bytes = Offset(p.batch - 1, p.positions - 1, p.heads - 1, depth);
    memory.reset(malloc(bytes));
    view.data = memory.get();
    memset(view.data, 0xff, bytes);
  }

  // Heads next to each other, or apart by what nothing may touch.
  static Tensor Rows(const stf_problem& p, int64_t depth, bool apart) {
    const int64_t head = depth + 3 * apart, position = p.heads * head + 5 * apart;
    return Tensor(p, depth, p.dtype, {nullptr, p.positions * position + 7 * apart, position, head});
  }
  static Tensor Statistic(const stf_problem& p) { return Tensor(p, 1, STF_FLOAT32, {nullptr, p.heads * p.positions, 1, p.positions}); }

  size_t Offset(int64_t b, int64_t t, int64_t h, int64_t d) const {
    return (b * view.batch_stride + t * view.position_stride + h * view.head_stride + d) * (dtype == STF_FLOAT32 ? 4 : 2);
  }

  void Set(int64_t b, int64_t t, int64_t h, int64_t d, float x) {
    char* const to = static_cast<char*>(view.data) + Offset(b, t, h, d);
    const uint32_t bits = Encode(x, dtype);
    const uint16_t half = bits;
    dtype == STF_FLOAT32 ? memcpy(to, &bits, sizeof bits) : memcpy(to, &half, sizeof half);
  }

  double Get(int64_t b, int64_t t, int64_t h, int64_t d) const {
    const char* const from = static_cast<const char*>(view.data) + Offset(b, t, h, d);
    uint32_t bits;
    uint16_t half;
    if (dtype == STF_FLOAT32) {
      memcpy(&bits, from, sizeof bits);
    } else {
      memcpy(&half, from, sizeof half);
      bits = half;
    }
    return Decode(bits, dtype);
  }

  // [B, H, T, depth]
  std::vector<double> Values() const {
    std::vector<double> values;
    values.reserve(p.batch * p.heads * p.positions * depth);
    for (int64_t b = 0; b < p.batch; b++)
      for (int64_t h = 0; h < p.heads; h++)
        for (int64_t t = 0; t < p.positions; t++)
          for (int64_t d = 0; d < depth; d++) values.push_back(Get(b, t, h, d));
    return values;
  }

  const stf_problem& p;
  int64_t depth;
  int32_t dtype;
  stf_tensor view;
  size_t bytes = 0;
  std::unique_ptr<void, Free> memory;
};

int64_t Used(const stf_problem& p, int64_t batch) { return p.lengths ? p.lengths[batch] : p.positions; }

void FillRandom(const stf_problem& p, std::mt19937_64* random, Tensor* x) {
  for (int64_t b = 0; b < p.batch; b++)
    for (int64_t t = 0; t < Used(p, b); t++)
      for (int64_t h = 0; h < p.heads; h++)
        for (int64_t d = 0; d < x->depth; d++) x->Set(b, t, h, d, static_cast<int64_t>((*random)() >> 40) * 0x6p-24f - 3);
}

// All threads begin together, so that they meet in what they share.
void RunThreads(void*, int32_t workers, void (*body)(void*, int32_t), void* argument) {
  std::atomic<int32_t> begun{0};
  std::vector<std::thread> threads;
  for (int32_t worker = 0; worker < workers; worker++) {
    threads.emplace_back([&begun, workers, body, argument, worker] {
      begun.fetch_add(1, std::memory_order_relaxed);
      while (begun.load(std::memory_order_relaxed) < workers) std::this_thread::yield();
      body(argument, worker);
    });
  }
  for (std::thread& thread : threads) thread.join();
}

struct Inputs {
  Tensor query, key, value, output_grad, log_sum_exp_grad;
  bool apart, with_log_sum_exp_grad;

  Inputs(const stf_problem& p, std::mt19937_64* random, bool apart, bool with_log_sum_exp_grad)
      : query(Tensor::Rows(p, p.key_depth, apart)),
        key(Tensor::Rows(p, p.key_depth, apart)),
        value(Tensor::Rows(p, p.value_depth, apart)),
        output_grad(Tensor::Rows(p, p.value_depth, apart)),
        log_sum_exp_grad(Tensor::Statistic(p)),
        apart(apart),
        with_log_sum_exp_grad(with_log_sum_exp_grad) {
    for (Tensor* x : {&query, &key, &value, &output_grad, &log_sum_exp_grad}) FillRandom(p, random, x);
  }

  DenseInputs Dense() const {
    DenseInputs dense = {query.Values(), key.Values(), value.Values(), output_grad.Values(), log_sum_exp_grad.Values()};
    if (!with_log_sum_exp_grad) std::fill(dense.log_sum_exp_grad.begin(), dense.log_sum_exp_grad.end(), 0);
    return dense;
  }
};

std::vector<Tensor> Results(const stf_problem& p, const Inputs& in, const stf_parallel* parallel) {
  std::vector<Tensor> r;
  r.push_back(Tensor::Rows(p, p.value_depth, in.apart));
  r.push_back(Tensor::Statistic(p));
  for (const int64_t depth : {p.key_depth, p.key_depth, p.value_depth}) r.push_back(Tensor::Rows(p, depth, in.apart));
  float* const log_sum_exp = static_cast<float*>(r[kLogSumExp].view.data);
  const float* const grad = in.with_log_sum_exp_grad ? static_cast<const float*>(in.log_sum_exp_grad.view.data) : nullptr;
  int error = stf_attention_cpu_forward(&p, &in.query.view, &in.key.view, &in.value.view, &r[kOutput].view, log_sum_exp, parallel);
  if (error) Fail("forward returned " + std::to_string(error));
  error = stf_attention_cpu_backward(&p, &in.query.view, &in.key.view, &in.value.view, &r[kOutput].view, log_sum_exp, &in.output_grad.view,
                                     grad, &r[kQueryGrad].view, &r[kKeyGrad].view, &r[kValueGrad].view, parallel);
  if (error) Fail("backward returned " + std::to_string(error));
  return r;
}

void Compare(const Tensor& got, Result result, const DenseResults& dense) {
  const std::vector<double> values = got.Values();
  for (size_t n = 0; n < values.size(); n++) {
    const double error = Roundings(values[n], dense, result, n, got.dtype);
    if (!(error <= kAllowed[got.p.dtype][result])) {
      Fail(std::string(kResultNames[result]) + "[" + std::to_string(n) + "] is " + std::to_string(values[n]) + ", not " +
           std::to_string(dense.value[result][n]) + ": wrong by " + std::to_string(error) + " roundings");
    }
    double& largest = largest_error[got.p.dtype][result];
    largest = std::max(largest, error);
  }
}

// Whether nothing but the tensor's elements was written to. Overwrites them.
bool OnlyElements(Tensor* x) {
  for (int64_t b = 0; b < x->p.batch; b++)
    for (int64_t t = 0; t < x->p.positions; t++)
      for (int64_t h = 0; h < x->p.heads; h++)
        if (x->depth > 0) memset(static_cast<char*>(x->view.data) + x->Offset(b, t, h, 0), 0xff, x->Offset(0, 0, 0, x->depth));
  const unsigned char* const bytes = static_cast<const unsigned char*>(x->view.data);
  return std::all_of(bytes, bytes + x->bytes, [](unsigned char byte) { return byte == 0xff; });
}

struct Pattern {
  std::string name;
  std::vector<std::vector<stf_component>> programs;
};

struct Shape {
  int64_t batch, positions, heads, key_depth, value_depth;
};

int runs = 0;

void Run(const Pattern& pattern, const std::vector<uint8_t>& layouts, const Shape& shape, int32_t dtype, std::vector<int32_t> lengths = {},
         int repeats = 1) {
  std::mt19937_64 random(++runs);
  const auto& s = shape;
  running = pattern.name + " " + kDtypeNames[dtype] + (lengths.empty() ? "" : " ragged");
  for (const int64_t x : {s.batch, s.positions, s.heads, s.key_depth, s.value_depth}) running += " " + std::to_string(x);
  std::vector<stf_component> all;
  std::vector<int32_t> ends = {0};
  for (const auto& program : pattern.programs) {
    all.insert(all.end(), program.begin(), program.end());
    ends.push_back(all.size());
  }
  const std::vector<stf_component> components(all);  // a copy has no room to spare
  const std::vector<int32_t> begin(ends);
  const int32_t programs = pattern.programs.size();
  const float scale = (random() % 8 ? 1 : -2) / std::sqrt(std::max<float>(s.key_depth, 1));
  const stf_problem p = {s.batch, s.positions, s.heads,      s.key_depth,       s.value_depth,  dtype,
                         scale,   programs,    begin.data(), components.data(), layouts.data(), lengths.empty() ? nullptr : lengths.data()};
  const Inputs in(p, &random, random() % 2, random() % 4);
  const DenseResults dense = DenseAttention(p, in.Dense());
  std::vector<Tensor> one = Results(p, in, nullptr);
  for (int r = 0; r < kResults; r++) Compare(one[r], static_cast<Result>(r), dense);
  const stf_parallel parallel = {nullptr, RunThreads, kThreads};
  for (int repeat = 0; repeat < repeats; repeat++) {
    const std::vector<Tensor> many = Results(p, in, &parallel);
    for (int r = 0; r < kResults; r++) {
      if (memcmp(one[r].view.data, many[r].view.data, one[r].bytes))
        Fail(std::string(kResultNames[r]) + " depends on the number of threads");
    }
  }
  for (int r = 0; r < kResults; r++) {
    if (!OnlyElements(&one[r])) Fail(std::string(kResultNames[r]) + " is written to between its rows");
  }
}

// Components as a union's: each leaves out the keys of all before it.
std::vector<stf_component> Union(std::vector<stf_component> components) {
  for (size_t t = 0; t < components.size(); t++) components[t].exclude = (int64_t{1} << t) - 1;
  return components;
}

// For n positions. Layouts are random, so all may have the same bits.
std::vector<Pattern> Patterns(int64_t n) {
  auto blocks = [n](int64_t size) { return stf_component{STF_BLOCKS, size, 3, (n + size - 1) / size}; };
  const std::vector<stf_component> fixed = {{STF_OWN_BLOCK, 32}, {STF_SUMMARY, 32, 24, 32}};
  const std::vector<stf_component> strides = Union({{STF_STRIDED, 2}, {STF_STRIDED, 15}, {STF_STRIDED, 40}});
  return {
      {"causal", {{{STF_CAUSAL}}}},
      {"local", {{{STF_LOCAL, 37}}}},
      {"itself", {{{STF_LOCAL, 0}}}},
      {"wide local", {{{STF_LOCAL, kLargest}}}},
      {"strided by 1", {{{STF_STRIDED, 1}}}},
      {"strided", {{{STF_STRIDED, 7}}}},
      {"far strided", {{{STF_STRIDED, 5, 3}}}},
      {"wide strided", {{{STF_STRIDED, kLargest}}}},
      {"farthest strided", {{{STF_STRIDED, 2, kLargest / 2}}}},
      {"own block", {{{STF_OWN_BLOCK, 24}}}},
      {"long own block", {{{STF_OWN_BLOCK, 150}}}},
      {"wide own block", {{{STF_OWN_BLOCK, kLargest}}}},
      {"summary", {{{STF_SUMMARY, 50, 43, 50}}}},
      {"summary with its own", {{{STF_SUMMARY, 50, 3, 20, 1}}}},
      {"wide summary", {{{STF_SUMMARY, kLargest, 0, 2, 1}}}},
      {"last column", {{{STF_SUMMARY, kLargest, kLargest - 1, kLargest, 1}}}},
      {"blocks", {{blocks(16)}}},
      {"small blocks", {{blocks(1)}}},
      {"large blocks", {{blocks(100)}}},
      {"merged strided", {{{STF_LOCAL, 20}, {STF_STRIDED, 20, 2}}}},
      {"merged fixed", {fixed}},
      {"strides", {strides}},
      {"local and strides", {Union({{STF_LOCAL, 9}, {STF_STRIDED, 3}, {STF_STRIDED, 40}})}},
      {"blocks and local", {Union({blocks(16), {STF_LOCAL, 9}, blocks(100)})}},
      {"all kinds", {Union({{STF_LOCAL, 5}, {STF_OWN_BLOCK, 24}, blocks(16), {STF_STRIDED, 7}, {STF_SUMMARY, 30, 21, 28, 1}})}},
      {"nothing", {{}}},
      {"two heads", {{{STF_LOCAL, 37}}, {{STF_STRIDED, 37}}}},
      {"all heads", {strides, {{STF_CAUSAL}}, {}, fixed, {blocks(16)}, {{STF_STRIDED, 40}}}},
  };
}

std::vector<uint8_t> Layouts(int64_t n, std::mt19937_64* random) {
  std::vector<uint8_t> layouts((n * n + 3 + 7) / 8);  // for blocks of one position, from bit 3 on
  for (uint8_t& byte : layouts) byte = (*random)();
  return layouts;
}

std::vector<int32_t> Lengths(const Shape& shape, std::mt19937_64* random) {
  std::vector<int32_t> lengths;
  for (int64_t b = 0; b < shape.batch; b++) lengths.push_back((*random)() % (shape.positions + 1));
  if (shape.batch > 1) lengths[0] = (*random)() % 2 ? 0 : shape.positions;
  return lengths;
}

void RunAllKinds(int64_t largest_depth) {
  const int64_t depths[][2] = {{1, 3},   {3, 1},    {0, 5},    {5, 0},     {16, 32},   {33, 65},
                               {65, 33}, {64, 128}, {128, 64}, {128, 129}, {129, 256}, {256, 65}};
  std::mt19937_64 random(1);
  for (const int64_t n : {1, 2, 63, 64, 65, 149, 700}) {
    const bool many = n > 149;  // positions: fewer of all else
    int choices = 0;
    for (const auto& pair : depths) choices += std::max(pair[0], pair[1]) <= std::min<int64_t>(largest_depth, many ? 65 : 256);
    for (const Pattern& pattern : Patterns(n)) {
      for (int32_t dtype = 0; dtype < 3; dtype++) {
        const int64_t* const depth = depths[random() % choices];
        const int64_t batch = many ? 1 : 1 + random() % 3, heads = std::max<int64_t>(pattern.programs.size(), many ? 1 : 1 + random() % 3);
        const Shape shape = {batch, n, heads, depth[0], depth[1]};
        Run(pattern, Layouts(n, &random), shape, dtype, random() % 2 ? Lengths(shape, &random) : std::vector<int32_t>());
      }
    }
  }
}

void RunEmpty() {
  for (const Shape& shape : {Shape{0, 5, 2, 3, 3}, Shape{2, 5, 0, 3, 3}, Shape{2, 0, 2, 3, 3}}) {
    for (int32_t dtype = 0; dtype < 3; dtype++) Run({"causal", {{{STF_CAUSAL}}}}, {}, shape, dtype);
  }
}

// As many components as a head may have.
void RunMost() {
  std::vector<stf_component> most;
  for (int64_t t = 0; t < 63; t++) most.push_back({t % 8 == 7 ? STF_STRIDED : t % 2 ? STF_OWN_BLOCK : STF_LOCAL, t + 1});
  for (int32_t dtype = 0; dtype < 3; dtype++) Run({"63 components", {Union(most)}}, {}, {1, 65, 1, 3, 5}, dtype);
}

// Where many tiles take turns at the gradients of their keys, and sequences of the length to which they are worked on whole.
void RunLong() {
  const Pattern fixed = {"merged fixed", {{{STF_OWN_BLOCK, 100}, {STF_SUMMARY, 100, 70, 100}}}};
  Run(fixed, {}, {4, 700, 4, 16, 16}, STF_FLOAT32, {}, 4);
  Run(fixed, {}, {4, 700, 8, 3, 5}, STF_BFLOAT16, {700, 699, 64, 400}, 3);
  Run({"causal", {{{STF_CAUSAL}}}}, {}, {1, 1500, 1, 16, 16}, STF_FLOAT32, {}, 3);
  Run({"strided", {{{STF_STRIDED, 2}}}}, {}, {1, 1500, 2, 3, 5}, STF_FLOAT16, {}, 3);
  std::vector<int32_t> lengths(32, 1);
  for (const int32_t n : {2048, 2049}) {
    lengths[17] = n;
    Run({"strided by 1", {{{STF_STRIDED, 1}}}}, {}, {32, n, 1, 3, 1}, STF_BFLOAT16, lengths);
  }
}

}  // namespace

// attention_cpu [largest depth]
int main(int argc, char** argv) {
  RunEmpty();
  RunAllKinds(argc > 1 ? atoi(argv[1]) : 256);
  RunMost();
  RunLong();
  printf("%d runs; largest errors in roundings:\n", runs);
  for (int32_t dtype = 0; dtype < 3; dtype++) {
    printf("%-8s", kDtypeNames[dtype]);
    for (int r = 0; r < kResults; r++) printf("  %s %.2f", kResultNames[r], largest_error[dtype][r]);
    printf("\n");
  }
  printf("%s\n", stf_attention_cpu_isa());
}
