// The kernels for one instruction set, which this file's compiler flags choose.
#include "custom_ops/attention/cpu/table.h"

namespace stf {
namespace cpu {

const Kernels kAvx2Kernels = STF_ISA::Table("avx2");

}  // namespace cpu
}  // namespace stf
