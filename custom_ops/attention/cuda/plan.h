// The plan of a call: which launches compute it, in order.
#ifndef STF_CUSTOM_OPS_ATTENTION_CUDA_PLAN_H_
#define STF_CUSTOM_OPS_ATTENTION_CUDA_PLAN_H_

#include <utility>
#include <vector>

#include "custom_ops/attention/cuda/kernels.h"

namespace stf {
namespace cuda {

using Plan = std::vector<std::pair<Pass, Launch>>;

// `groups`: whether warpgroups do what they can.
Plan PlanForward(const stf_problem& problem, bool groups);
Plan PlanBackward(const stf_problem& problem, bool groups);

}  // namespace cuda
}  // namespace stf

#endif  // STF_CUSTOM_OPS_ATTENTION_CUDA_PLAN_H_
