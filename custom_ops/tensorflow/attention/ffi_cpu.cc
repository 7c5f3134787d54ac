// Handlers of the op's custom calls on the CPU.
#include "custom_ops/tensorflow/attention/cpu.h"
#include "custom_ops/tensorflow/attention/ffi.h"

namespace stf {
namespace {

struct OnCpu {
  using Context = ffi::ThreadPool;
  using Argument = ffi::ThreadPool;
  static auto Device(ffi::ThreadPool& pool) { return Cpu<ffi::ThreadPool>(&pool, pool.num_threads()); }
};

using H = Handlers<OnCpu>;

XLA_FFI_DEFINE_HANDLER(kForward, H::Forward, H::BindForward());
XLA_FFI_DEFINE_HANDLER(kBackward, H::Backward, H::BindBackward());
XLA_FFI_DEFINE_HANDLER(kPackedForward, H::PackedForward, H::BindPackedForward());
XLA_FFI_DEFINE_HANDLER(kPackedBackward, H::PackedBackward, H::BindPackedBackward());
XLA_FFI_REGISTER_HANDLER(ffi::GetXlaFfiApi(), kForwardCall, "Host", kForward);
XLA_FFI_REGISTER_HANDLER(ffi::GetXlaFfiApi(), kGradientCall, "Host", kBackward);
XLA_FFI_REGISTER_HANDLER(ffi::GetXlaFfiApi(), kPackedForwardCall, "Host", kPackedForward);
XLA_FFI_REGISTER_HANDLER(ffi::GetXlaFfiApi(), kPackedGradientCall, "Host", kPackedBackward);

}  // namespace
}  // namespace stf
