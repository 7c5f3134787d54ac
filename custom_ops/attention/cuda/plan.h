// The plan of a call: which launches compute it, in order.
#ifndef STF_CUSTOM_OPS_ATTENTION_CUDA_PLAN_H_
#define STF_CUSTOM_OPS_ATTENTION_CUDA_PLAN_H_

#include <utility>
#include <vector>

#include "custom_ops/attention/cuda/kernels.h"

namespace stf {
namespace cuda {

using Plan = std::vector<std::pair<Pass, Launch>>;

// Whether some head's gradients are summed over several launches, of whichever machine.
bool SumsOverLaunches(const stf_problem& problem);

// For kernels of a machine: machine.sm90 says whether Hopper's do what they can.
Plan PlanForward(const stf_problem& problem, const Machine& machine);
Plan PlanBackward(const stf_problem& problem, const Machine& machine);

}  // namespace cuda
}  // namespace stf

#endif  // STF_CUSTOM_OPS_ATTENTION_CUDA_PLAN_H_
