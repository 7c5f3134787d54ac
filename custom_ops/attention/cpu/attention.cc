#include "custom_ops/attention/cpu/attention.h"

#include <sched.h>
#include <stdlib.h>
#include <string.h>

#include <algorithm>
#include <atomic>
#include <memory>
#include <new>
#include <vector>

#include "custom_ops/attention/cpu/kernels.h"
#include "custom_ops/attention/cpu/schedule.h"

namespace stf {
namespace cpu {

void Yield() { sched_yield(); }

namespace {

const Kernels& ChooseKernels() {
  const char* asked = getenv("STF_CPU_ISA");
  const bool generic = asked && strcmp(asked, "generic") == 0, avx2 = asked && strcmp(asked, "avx2") == 0;
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (!generic && !avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq"))
    return kAvx512Kernels;
  if (!generic && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) return kAvx2Kernels;
#endif
  (void)generic;
  (void)avx2;
  return kGenericKernels;
}

const Kernels& ActiveKernels() {
  static const Kernels& kernels = ChooseKernels();
  return kernels;
}

struct Free {
  void operator()(void* memory) const { free(memory); }
};
template <typename T>
using Memory = std::unique_ptr<T, Free>;

template <typename T>
Memory<T> Allocate(size_t bytes) {
  void* memory = nullptr;
  if (posix_memalign(&memory, 64, std::max<size_t>(bytes, 64)) != 0) return nullptr;
  return Memory<T>(static_cast<T*>(memory));
}

// Runs body(index, scratch) for every index in 0 ... count - 1, `chunk` neighbours at a time, taken in ascending order. False where no
// worker could get its scratch.
template <typename Body>
bool ForEach(const stf_parallel* parallel, int64_t count, int64_t chunk, size_t scratch_bytes, const Body& body) {
  struct State {
    const Body& body;
    int64_t count, chunk;
    size_t scratch_bytes;
    std::atomic<int64_t> next{0}, done{0};
  } state{body, count, chunk, scratch_bytes};
  auto work = [](void* argument, int32_t) {
    State& state = *static_cast<State*>(argument);
    if (state.next.load(std::memory_order_relaxed) >= state.count) return;
    Memory<char> scratch = Allocate<char>(state.scratch_bytes);
    if (!scratch) return;
    for (;;) {
      const int64_t begin = state.next.fetch_add(state.chunk);
      if (begin >= state.count) return;
      const int64_t end = std::min(begin + state.chunk, state.count);
      for (int64_t i = begin; i < end; i++) state.body(i, scratch.get());
      state.done.fetch_add(end - begin);
    }
  };
  const int64_t chunks = (count + chunk - 1) / chunk;
  const int32_t workers = parallel ? static_cast<int32_t>(std::min<int64_t>(std::max(parallel->workers, 1), chunks)) : 1;
  if (workers <= 1) {
    work(&state, 0);
  } else {
    parallel->run(parallel->context, workers, work, &state);
  }
  return state.done.load() == count;
}

bool Empty(const stf_problem& p) { return p.batch == 0 || p.positions == 0 || p.heads == 0; }

// A contiguous float32 tensor of the problem's shape over `data`.
stf_tensor Contiguous(const stf_problem& p, float* data, int64_t depth) {
  return {data, p.positions * p.heads * depth, p.heads * depth, depth};
}

int64_t Rows(const stf_problem& p) { return p.batch * p.positions * p.heads; }

// Items of whole sequences are short and neighbours share pages of memory: a worker takes several. Tiles take turns: one at a time.
int64_t Chunk(const Schedule& schedule) { return schedule.whole_only() ? 8 : 1; }

// Float sums of all heads to a gradient of `heads`: those of heads that share one are added, in their order, into the first's.
bool Convert(const Kernels& kernels, const stf_problem& p, const stf_tensor& from, int64_t depth, const stf_tensor& to, int64_t heads,
             const stf_parallel* parallel) {
  return ForEach(parallel, p.batch * p.positions, 64, 0, [&](int64_t index, char*) {
    const int64_t batch = index / p.positions, position = index % p.positions, shared = p.heads / heads;
    for (int64_t head = 0; head < heads; head++) {
      float* row =
          static_cast<float*>(from.data) + batch * from.batch_stride + position * from.position_stride + head * shared * from.head_stride;
      for (int64_t other = 1; other < shared; other++) {
        for (int64_t d = 0; d < depth; d++) row[d] += row[other * from.head_stride + d];
      }
      const int64_t element = batch * to.batch_stride + position * to.position_stride + head * to.head_stride;
      kernels.convert(row, p.dtype, depth, static_cast<char*>(to.data) + element * (p.dtype == STF_FLOAT32 ? 4 : 2));
    }
  });
}

bool Forward(const Kernels& kernels, const Arguments& args, const Schedule& schedule, const stf_parallel* parallel) {
  const size_t scratch = kernels.forward_scratch(*args.problem, schedule.whole_any());
  for (const Phase& phase : schedule.phases()) {
    auto body = [&](int64_t index, char* memory) { kernels.forward(args, schedule.ItemAt(phase, index, true, nullptr), memory); };
    if (!ForEach(parallel, phase.items, Chunk(schedule), scratch, body)) return false;
  }
  return true;
}

bool Backward(const Kernels& kernels, const Arguments& args, const Schedule& schedule, const stf_parallel* parallel) {
  const size_t scratch = kernels.backward_scratch(*args.problem, schedule.whole_any());
  for (const Phase& phase : schedule.phases()) {
    Memory<int64_t> progress = Allocate<int64_t>(phase.progress * sizeof(int64_t));
    if (!progress) return false;
    memset(progress.get(), 0, phase.progress * sizeof(int64_t));
    auto body = [&](int64_t index, char* memory) { kernels.backward(args, schedule.ItemAt(phase, index, false, progress.get()), memory); };
    if (!ForEach(parallel, phase.items, Chunk(schedule), scratch, body)) return false;
  }
  return true;
}

}  // namespace
}  // namespace cpu
}  // namespace stf

extern "C" {

int stf_attention_cpu_forward(const stf_problem* problem, const stf_tensor* query, const stf_tensor* key, const stf_tensor* value,
                              const stf_tensor* output, float* log_sum_exp, const stf_parallel* parallel) {
  using namespace stf::cpu;
  const stf_problem& p = *problem;
  if (Empty(p)) return 0;
  try {
    const Schedule schedule(p);
    Arguments args = {};
    args.problem = problem;
    args.query = *query;
    args.key = *key;
    args.value = *value;
    args.output = *output;
    args.log_sum_exp = log_sum_exp;
    Memory<float> partial;
    if (p.dtype == STF_FLOAT32) {
      args.partial = *output;
    } else if (schedule.phases().size() > 1) {
      partial = Allocate<float>(Rows(p) * p.value_depth * sizeof(float));
      if (!partial) return 1;
      args.partial = Contiguous(p, partial.get(), p.value_depth);
    }
    return Forward(ActiveKernels(), args, schedule, parallel) ? 0 : 1;
  } catch (const std::bad_alloc&) {
    return 1;
  }
}

int stf_attention_cpu_backward(const stf_problem* problem, const stf_tensor* query, const stf_tensor* key, const stf_tensor* value,
                               const stf_tensor* output, const float* log_sum_exp, const stf_tensor* output_grad,
                               const float* log_sum_exp_grad, const stf_tensor* query_grad, const stf_tensor* key_grad,
                               const stf_tensor* value_grad, const stf_parallel* parallel) {
  using namespace stf::cpu;
  const stf_problem& p = *problem;
  if (Empty(p)) return 0;
  try {
    const Schedule schedule(p);
    const Kernels& kernels = ActiveKernels();
    Arguments args = {problem,     *query,       *key,
                      *value,      *output,      const_cast<float*>(log_sum_exp),
                      {},          *output_grad, log_sum_exp_grad,
                      *query_grad, *key_grad,    *value_grad,
                      *query_grad, *key_grad,    *value_grad};
    Memory<float> query_sum, key_sum, value_sum;
    const int64_t key_heads = p.key_heads ? p.key_heads : p.heads;
    const bool halves = p.dtype != STF_FLOAT32, several = schedule.phases().size() > 1;
    if (halves) {
      if (several) query_sum = Allocate<float>(Rows(p) * p.key_depth * sizeof(float));
      if (several && !query_sum) return 1;
      args.query_sum = Contiguous(p, query_sum.get(), p.key_depth);
    }
    if (key_heads < p.heads || (halves && (several || !schedule.whole_only()))) {
      key_sum = Allocate<float>(Rows(p) * p.key_depth * sizeof(float));
      value_sum = Allocate<float>(Rows(p) * p.value_depth * sizeof(float));
      if (!key_sum || !value_sum) return 1;
    }
    if (halves || key_sum) {
      args.key_sum = Contiguous(p, key_sum.get(), p.key_depth);
      args.value_sum = Contiguous(p, value_sum.get(), p.value_depth);
    }
    if (!Backward(kernels, args, schedule, parallel)) return 1;
    if (query_sum && !Convert(kernels, p, args.query_sum, p.key_depth, *query_grad, p.heads, parallel)) return 1;
    if (key_sum && !Convert(kernels, p, args.key_sum, p.key_depth, *key_grad, key_heads, parallel)) return 1;
    if (value_sum && !Convert(kernels, p, args.value_sum, p.value_depth, *value_grad, key_heads, parallel)) return 1;
    return 0;
  } catch (const std::bad_alloc&) {
    return 1;
  }
}

const char* stf_attention_cpu_isa(void) { return stf::cpu::ActiveKernels().name; }

}  // extern "C"
