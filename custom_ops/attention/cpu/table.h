// The table of the kernels compiled for one instruction set.
#ifndef STF_CUSTOM_OPS_ATTENTION_CPU_TABLE_H_
#define STF_CUSTOM_OPS_ATTENTION_CPU_TABLE_H_

#include "custom_ops/attention/cpu/backward.h"

namespace stf {
namespace cpu {
namespace STF_ISA {

inline size_t ForwardBytes(const stf_problem& problem, bool whole) { return ForwardScratch(problem, nullptr, whole).bytes; }
inline size_t BackwardBytes(const stf_problem& problem, bool whole) { return BackwardScratch(problem, nullptr, whole).bytes; }

constexpr Kernels Table(const char* name) { return {name, ForwardBytes, BackwardBytes, ForwardItem, BackwardItem, WriteRow}; }

}  // namespace STF_ISA
}  // namespace cpu
}  // namespace stf

#endif  // STF_CUSTOM_OPS_ATTENTION_CPU_TABLE_H_
