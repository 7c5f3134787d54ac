// The entry points: checks, the plan of a call, its launches.
#include "custom_ops/attention/cuda/attention.h"

#include "custom_ops/attention/cuda/plan.h"

namespace {

using namespace stf::cuda;  // NOLINT: this file is the library's face

size_t ElementSize(const stf_problem& problem) { return problem.dtype == STF_FLOAT32 ? 4 : 2; }

bool Aligned(const stf_problem& problem, const stf_tensor& tensor) {
  const int64_t chunk = 16 / ElementSize(problem);
  return reinterpret_cast<uintptr_t>(tensor.data) % 16 == 0 && tensor.batch_stride % chunk == 0 && tensor.position_stride % chunk == 0 &&
         tensor.head_stride % chunk == 0;
}

bool Empty(const stf_problem& problem) { return problem.batch == 0 || problem.positions == 0 || problem.heads == 0; }

bool Valid(const stf_problem& problem) {
  constexpr int64_t kMost = int64_t{1} << 30;
  return problem.batch >= 0 && problem.batch < kMost && problem.positions >= 0 && problem.positions < kMost && problem.heads >= 0 &&
         problem.heads < kMost && problem.key_heads >= 0 && (problem.key_heads == 0 || problem.heads % problem.key_heads == 0) &&
         problem.key_depth > 0 && problem.value_depth > 0 && FindDepths(problem) >= 0 && (problem.programs > 0 || Empty(problem)) &&
         problem.dtype >= STF_FLOAT32 && problem.dtype <= STF_FLOAT16;
}

int Group(const stf_problem& problem) { return problem.key_heads ? static_cast<int>(problem.heads / problem.key_heads) : 1; }

Arguments Common(const stf_problem& problem, std::initializer_list<const stf_tensor*> tensors) {
  Arguments args = {};
  args.lengths = problem.lengths;
  args.documents = problem.documents;
  args.sinks = problem.sinks;
  args.group = Group(problem);
  args.layouts = problem.layouts;
  args.batch = static_cast<int32_t>(problem.batch);
  args.positions = static_cast<int32_t>(problem.positions);
  args.heads = static_cast<int32_t>(problem.heads);
  args.key_depth = static_cast<int32_t>(problem.key_depth);
  args.value_depth = static_cast<int32_t>(problem.value_depth);
  args.scale = problem.scale;
  const int64_t chunk = 16 / ElementSize(problem);
  args.vector = problem.key_depth % chunk == 0 && problem.value_depth % chunk == 0;
  for (const stf_tensor* tensor : tensors) args.vector = args.vector && Aligned(problem, *tensor);
  return args;
}

int RunPlan(const stf_problem& problem, const Plan& plan, const Arguments& args, const Machine& machine, void* stream) {
  for (const auto& [pass, launch] : plan) {
    const cudaError_t error = Run(problem, pass, args, launch, machine, static_cast<cudaStream_t>(stream));
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

// Whether results are kept in float32 between launches: gradients always, an output where one rounding would become several. A call's
// second launch reads a rounded output with half of the bytes, which is worth more than what that rounding costs (benchmarks/NOTES.md).
bool NeedsPartial(const stf_problem& problem, bool backward) {
  return problem.dtype != STF_FLOAT32 && LaunchesOf(problem, backward) > (backward ? 1 : 2);
}

size_t Rows(const stf_problem& problem) { return problem.batch * problem.heads * problem.positions; }
size_t Padded(size_t bytes) { return (bytes + 15) / 16 * 16; }

// A [B, T, H, depth] tensor of elements of so many bytes at *memory, which is moved behind it.
stf_tensor Take(const stf_problem& problem, int64_t depth, size_t element, char** memory) {
  const stf_tensor tensor = {*memory, problem.positions * problem.heads * depth, problem.heads * depth, depth};
  *memory += Padded(Rows(problem) * depth * element);
  return tensor;
}

// Bytes of such tensors, of a key's and a value's depth each.
size_t TakenByKeysAndValues(const stf_problem& problem, size_t element) {
  return Padded(Rows(problem) * problem.key_depth * element) + Padded(Rows(problem) * problem.value_depth * element);
}

// The machine for a call, with Hopper's kernels where they can do it.
int FindMachine(const stf_problem& problem, const Arguments& args, Machine* machine) {
  if (const int error = FindMachine(machine)) return error;
  machine->sm90 = machine->sm90 && args.vector && SupportsSm90(problem);
  return 0;
}

}  // namespace

size_t stf_attention_cuda_forward_workspace(const stf_problem* problem) {
  if (!Valid(*problem) || Empty(*problem) || !NeedsPartial(*problem, false)) return 0;
  return Padded(Rows(*problem) * problem->value_depth * sizeof(float));
}

size_t stf_attention_cuda_backward_workspace(const stf_problem* problem) {
  if (!Valid(*problem) || Empty(*problem)) return 0;
  size_t bytes = Padded(Rows(*problem) * sizeof(float));
  if (Group(*problem) > 1) bytes += TakenByKeysAndValues(*problem, ElementSize(*problem));
  if (NeedsPartial(*problem, true)) {
    bytes += Padded(Rows(*problem) * problem->key_depth * sizeof(float)) + TakenByKeysAndValues(*problem, sizeof(float));
  }
  return bytes;
}

int stf_attention_cuda_forward(const stf_problem* problem, const stf_tensor* query, const stf_tensor* key, const stf_tensor* value,
                               const stf_tensor* output, float* log_sum_exp, void* workspace, void* stream) {
  if (!Valid(*problem)) return cudaErrorInvalidValue;
  if (Empty(*problem)) return cudaSuccess;
  Arguments args = Common(*problem, {query, key, value, output});
  args.query = *query;
  args.key = *key;
  args.value = *value;
  args.output = *output;
  args.log_sum_exp = log_sum_exp;
  if (NeedsPartial(*problem, false)) {
    char* memory = static_cast<char*>(workspace);
    args.output_partial = Take(*problem, problem->value_depth, sizeof(float), &memory);
  }
  Machine machine;
  if (const int error = FindMachine(*problem, args, &machine)) return error;
  return RunPlan(*problem, *PlanOf(*problem, machine, false), args, machine, stream);
}

int stf_attention_cuda_backward(const stf_problem* problem, const stf_tensor* query, const stf_tensor* key, const stf_tensor* value,
                                const stf_tensor* output, const float* log_sum_exp, const stf_tensor* output_grad,
                                const float* log_sum_exp_grad, const stf_tensor* query_grad, const stf_tensor* key_grad,
                                const stf_tensor* value_grad, void* workspace, void* stream) {
  if (!Valid(*problem)) return cudaErrorInvalidValue;
  if (Empty(*problem)) return cudaSuccess;
  Arguments args = Common(*problem, {query, key, value, output, output_grad, query_grad, key_grad, value_grad});
  args.query = *query;
  args.key = *key;
  args.value = *value;
  args.output = *output;
  args.log_sum_exp = const_cast<float*>(log_sum_exp);
  args.output_grad = *output_grad;
  args.log_sum_exp_grad = log_sum_exp_grad;
  args.query_grad = *query_grad;
  args.key_grad = *key_grad;
  args.value_grad = *value_grad;
  char* memory = static_cast<char*>(workspace);
  args.delta = reinterpret_cast<float*>(memory);
  memory += Padded(Rows(*problem) * sizeof(float));
  if (args.group > 1) {  // each head's own, to be added
    args.key_grad = Take(*problem, problem->key_depth, ElementSize(*problem), &memory);
    args.value_grad = Take(*problem, problem->value_depth, ElementSize(*problem), &memory);
  }
  args.query_partial = args.query_grad;
  args.key_partial = args.key_grad;
  args.value_partial = args.value_grad;
  if (NeedsPartial(*problem, true)) {
    args.query_partial = Take(*problem, problem->key_depth, sizeof(float), &memory);
    args.key_partial = Take(*problem, problem->key_depth, sizeof(float), &memory);
    args.value_partial = Take(*problem, problem->value_depth, sizeof(float), &memory);
  }
  Machine machine;
  if (const int error = FindMachine(*problem, args, &machine)) return error;
  const int error = RunPlan(*problem, *PlanOf(*problem, machine, true), args, machine, stream);
  if (error != cudaSuccess || args.group == 1) return error;
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  const cudaError_t of_keys = SumGroups(*problem, args, args.key_grad, *key_grad, args.key_depth, cuda_stream);
  return of_keys != cudaSuccess ? of_keys : SumGroups(*problem, args, args.value_grad, *value_grad, args.value_depth, cuda_stream);
}

const char* stf_attention_cuda_error(int error) {
  if (error == STF_CUDA_OLD_DEVICE) return "stf's kernels need a GPU of compute capability 8.0 or later";
  if (error == STF_CUDA_UNKNOWN_KERNELS) return "STF_CUDA_KERNELS must be sm80, sm86 or unset";
  return cudaGetErrorString(static_cast<cudaError_t>(error));
}
