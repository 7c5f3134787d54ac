// cuBLASLt is the framework's: its library is looked for in the process, then by name. So this library needs none to be loaded, and no
// header of it to be built. Names and numbers below are of cublasLt.h, the same in CUDA 11, 12 and 13.
#include "custom_ops/residual_stack/cuda/matmul.h"

#include <dlfcn.h>

#include <map>
#include <mutex>
#include <tuple>

namespace stf {
namespace cuda {
namespace {

using Handle = void*;
struct Algorithm {  // cublasLtMatmulAlgo_t
  uint64_t data[8];
};
struct Heuristic {  // cublasLtMatmulHeuristicResult_t
  Algorithm algorithm;
  size_t workspace;
  int state;
  float waves;
  int reserved[4];
};

constexpr int kComputeFloat32 = 68;                           // CUBLAS_COMPUTE_32F
constexpr int kFloat32 = 0, kFloat16 = 2, kBfloat16 = 14;     // CUDA_R_32F, CUDA_R_16F, CUDA_R_16BF
constexpr int kTransposeA = 3, kTransposeB = 4;               // CUBLASLT_MATMUL_DESC_TRANSA, _TRANSB
constexpr int kEpilogue = 7, kBiasPointer = 8;                // CUBLASLT_MATMUL_DESC_EPILOGUE, _BIAS_POINTER
constexpr int kEpilogueBias = 4;                              // CUBLASLT_EPILOGUE_BIAS
constexpr int kWorkspaceBytes = 1, kReductionSchemeMask = 3;  // CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, _REDUCTION_SCHEME_MASK
constexpr uint32_t kFloat32Reduction = 2;                     // CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE: split sums in float32, in order

constexpr int kMatrices[] = {5, 6, 7, 8};  // CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES ... D
constexpr uint32_t kAlignment = 16;        // bytes, of all tensors

// What is used of cuBLASLt. Every function returns 0, or what refused.
struct Library {
  int (*create)(Handle*);
  int (*desc_create)(void**, int compute, int scale_type);
  int (*desc_set)(void*, int attribute, const void*, size_t);
  int (*layout_create)(void**, int type, uint64_t rows, uint64_t columns, int64_t leading);
  int (*preference_create)(void**);
  int (*preference_set)(void*, int attribute, const void*, size_t);
  int (*preference_destroy)(void*);
  int (*heuristic)(Handle, void*, void*, void*, void*, void*, void*, int, Heuristic*, int*);
  int (*matmul)(Handle, void*, const void*, const void*, void*, const void*, void*, const void*, const void*, void*, void*, void*,
                const Algorithm*, void*, size_t, cudaStream_t);
  const char* error = nullptr;

  Library() {
    void* file = nullptr;
    for (const int mode : {RTLD_LAZY | RTLD_NOLOAD, RTLD_LAZY}) {
      for (const char* name : {"libcublasLt.so.12", "libcublasLt.so.13", "libcublasLt.so"}) {
        if (!file) file = dlopen(name, mode);
      }
    }
    if (!file) {
      error = "libcublasLt.so (CUDA 12 or 13) was not found: install tensorflow[and-cuda], or name its folder in LD_LIBRARY_PATH";
      return;
    }
    Find(file, "cublasLtCreate", &create);
    Find(file, "cublasLtMatmulDescCreate", &desc_create);
    Find(file, "cublasLtMatmulDescSetAttribute", &desc_set);
    Find(file, "cublasLtMatrixLayoutCreate", &layout_create);
    Find(file, "cublasLtMatmulPreferenceCreate", &preference_create);
    Find(file, "cublasLtMatmulPreferenceSetAttribute", &preference_set);
    Find(file, "cublasLtMatmulPreferenceDestroy", &preference_destroy);
    Find(file, "cublasLtMatmulAlgoGetHeuristic", &heuristic);
    Find(file, "cublasLtMatmul", &matmul);
  }

 private:
  template <typename Function>
  void Find(void* file, const char* name, Function* function) {
    *function = reinterpret_cast<Function>(dlsym(file, name));
    if (!*function) error = "libcublasLt.so lacks a function that stf needs: CUDA 12 or 13 is needed";
  }
};

const Library& Lt() {
  static const Library* library = new Library;
  return *library;
}

// A product of one shape on one device, prepared. The descriptor holds the bias' address, which differs from call to call.
struct Plan {
  void *desc, *a, *b, *c;
  Algorithm algorithm;
  const char* error = nullptr;
};

using Key = std::tuple<int32_t, bool, bool, bool, int64_t, int64_t, int64_t>;

// A device's handle and plans: for good, as a program's shapes are few.
struct Cache {
  std::mutex mutex;
  Handle handle = nullptr;
  std::map<Key, Plan> plans;
};

// One a device, so that no replica waits for another's launches.
Cache& CacheOf(int device) {
  static std::mutex* mutex = new std::mutex;
  static auto* caches = new std::map<int, Cache>;  // whose elements stay where they are
  std::lock_guard<std::mutex> lock(*mutex);
  return (*caches)[device];
}

Plan Prepare(Handle handle, int32_t dtype, bool transpose_a, bool transpose_b, bool bias, int64_t m, int64_t n, int64_t k) {
  const Library& lt = Lt();
  const int type = dtype == STF_BFLOAT16 ? kBfloat16 : kFloat16;
  const int32_t op_a = transpose_a, op_b = transpose_b, epilogue = kEpilogueBias;
  const size_t workspace = kMatmulWorkspace;
  const void* aligned = reinterpret_cast<const void*>(uintptr_t{kAlignment});
  Plan plan = {};
  void* preference = nullptr;
  Heuristic found = {};
  int count = 0;
  int refused = lt.desc_create(&plan.desc, kComputeFloat32, kFloat32) || lt.desc_set(plan.desc, kTransposeA, &op_a, sizeof(op_a)) ||
                lt.desc_set(plan.desc, kTransposeB, &op_b, sizeof(op_b));
  if (bias && !refused) {
    refused =
        lt.desc_set(plan.desc, kEpilogue, &epilogue, sizeof(epilogue)) || lt.desc_set(plan.desc, kBiasPointer, &aligned, sizeof(aligned));
  }
  refused = refused || lt.layout_create(&plan.a, type, transpose_a ? k : m, transpose_a ? m : k, transpose_a ? k : m) ||
            lt.layout_create(&plan.b, type, transpose_b ? n : k, transpose_b ? k : n, transpose_b ? n : k) ||
            lt.layout_create(&plan.c, type, m, n, m) || lt.preference_create(&preference) ||
            lt.preference_set(preference, kWorkspaceBytes, &workspace, sizeof(workspace)) ||
            lt.preference_set(preference, kReductionSchemeMask, &kFloat32Reduction, sizeof(kFloat32Reduction));
  for (const int matrix : kMatrices) refused = refused || lt.preference_set(preference, matrix, &kAlignment, sizeof(kAlignment));
  refused = refused || lt.heuristic(handle, plan.desc, plan.a, plan.b, plan.c, plan.c, preference, 1, &found, &count);
  if (preference) lt.preference_destroy(preference);
  if (refused || count < 1) plan.error = "cuBLASLt has no algorithm for a product of the stack's shape";
  plan.algorithm = found.algorithm;
  return plan;
}

}  // namespace

void Matmul::Run(bool transpose_a, bool transpose_b, int64_t m, int64_t n, int64_t k, const void* a, const void* b, const void* bias,
                 void* c) {
  if (error_) return;
  const Library& lt = Lt();
  if ((error_ = lt.error)) return;
  int device;
  if (cudaGetDevice(&device) != cudaSuccess) {
    error_ = "no CUDA device";
    return;
  }
  Cache& cache = CacheOf(device);
  // Held over the launch, as a plan's descriptor takes the bias of one call.
  std::lock_guard<std::mutex> lock(cache.mutex);
  if (!cache.handle && lt.create(&cache.handle)) {
    error_ = "cuBLASLt could not be initialized";
    return;
  }
  const Key key(dtype_, transpose_a, transpose_b, bias != nullptr, m, n, k);
  auto plan = cache.plans.find(key);
  if (plan == cache.plans.end()) {
    plan = cache.plans.emplace(key, Prepare(cache.handle, dtype_, transpose_a, transpose_b, bias != nullptr, m, n, k)).first;
  }
  const Plan& p = plan->second;
  if ((error_ = p.error)) return;
  const float one = 1, zero = 0;
  if ((bias && lt.desc_set(p.desc, kBiasPointer, &bias, sizeof(bias))) ||
      lt.matmul(cache.handle, p.desc, &one, a, p.a, b, p.b, &zero, c, p.c, c, p.c, &p.algorithm, workspace_, kMatmulWorkspace, stream_)) {
    error_ = "cuBLASLt refused a product";
  }
}

// A row-major matrix is its transpose, column-major.
void Matmul::Forward(const void* a, const void* b, const void* bias, void* c, int64_t m, int64_t k, int64_t n) {
  Run(false, false, n, m, k, b, a, bias, c);
}

void Matmul::InputGradient(const void* c_grad, const void* b, void* a_grad, int64_t m, int64_t k, int64_t n) {
  Run(true, false, k, m, n, b, c_grad, nullptr, a_grad);
}

void Matmul::KernelGradient(const void* a, const void* c_grad, void* b_grad, int64_t m, int64_t k, int64_t n) {
  Run(false, true, n, k, m, c_grad, a, nullptr, b_grad);
}

}  // namespace cuda
}  // namespace stf
