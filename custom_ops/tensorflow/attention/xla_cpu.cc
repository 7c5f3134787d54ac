// The op under XLA on the CPU.
#include "custom_ops/tensorflow/attention/xla.h"

namespace stf {
namespace {

struct Cpu {
  static absl::Status Check(const stf_problem&) { return absl::OkStatus(); }
  static int64_t Workspace(const stf_problem&, bool) { return 0; }  // the kernels see to it themselves
};

STF_REGISTER_XLA("XLA_CPU_JIT", Cpu);

}  // namespace
}  // namespace stf
