// The plan of a call: which launches compute it, in order.
#ifndef STF_CUSTOM_OPS_ATTENTION_CUDA_PLAN_H_
#define STF_CUSTOM_OPS_ATTENTION_CUDA_PLAN_H_

#include <memory>
#include <utility>
#include <vector>

#include "custom_ops/attention/cuda/kernels.h"

namespace stf {
namespace cuda {

using Plan = std::vector<std::pair<Pass, Launch>>;

// How many launches a head's output (backward: one of its gradients) is summed over at the most, on whichever machine.
int LaunchesOf(const stf_problem& problem, bool backward);

// The plan for kernels of a machine, where machine.sm90 says whether Hopper's do what they can: made once.
std::shared_ptr<const Plan> PlanOf(const stf_problem& problem, const Machine& machine, bool backward);

}  // namespace cuda
}  // namespace stf

#endif  // STF_CUSTOM_OPS_ATTENTION_CUDA_PLAN_H_
