// The device at hand: what it has, and which kernels run on it.
#ifndef STF_CUSTOM_OPS_ATTENTION_CUDA_MACHINE_H_
#define STF_CUSTOM_OPS_ATTENTION_CUDA_MACHINE_H_

namespace stf {
namespace cuda {

struct Machine {
  int memory;           // bytes of shared memory that a block may have
  int multiprocessors;  // at least 1
  bool sm90;            // whether Hopper's kernels run on it, and are to
};

// Finds the current device's. STF_CUDA_KERNELS in the environment asks for other kernels than its best: "sm80" for those that every card
// runs, "sm86" for those with tiles for cards with less shared memory. Returns 0, a cudaError_t or an stf_cuda_refusal.
int FindMachine(Machine* machine);

}  // namespace cuda
}  // namespace stf

#endif  // STF_CUSTOM_OPS_ATTENTION_CUDA_MACHINE_H_
