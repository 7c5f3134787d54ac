// The kernels for one instruction set, which this file's compiler flags choose.
#include "custom_ops/attention/cpu/table.h"

namespace stf {
namespace cpu {

const Kernels kGenericKernels = STF_ISA::Table("generic");

}  // namespace cpu
}  // namespace stf
