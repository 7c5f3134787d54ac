// Handlers of the op's custom calls on the GPU. Compiled where the CUDA kernels are.
#include "custom_ops/tensorflow/attention/ffi.h"
#include "custom_ops/tensorflow/attention/gpu.h"

namespace stf {
namespace {

struct OnGpu {
  using Context = ffi::PlatformStream<cudaStream_t>;
  using Argument = cudaStream_t;
  static Gpu Device(cudaStream_t stream) { return Gpu(stream); }
};

using H = Handlers<OnGpu>;

// Each call launches the same kernels, so that XLA may record them among its own (CUDA graphs).
#define STF_HANDLER(name, function, binding, target)                                    \
  XLA_FFI_DEFINE_HANDLER(name, function, binding, {ffi::Traits::kCmdBufferCompatible}); \
  XLA_FFI_REGISTER_HANDLER(ffi::GetXlaFfiApi(), target, "CUDA", name, XLA_FFI_HANDLER_TRAITS_COMMAND_BUFFER_COMPATIBLE)

STF_HANDLER(kForward, H::Forward, H::BindForward(), kForwardCall);
STF_HANDLER(kBackward, H::Backward, H::BindBackward(), kGradientCall);
STF_HANDLER(kPackedForward, H::PackedForward, H::BindPackedForward(), kPackedForwardCall);
STF_HANDLER(kPackedBackward, H::PackedBackward, H::BindPackedBackward(), kPackedGradientCall);
#undef STF_HANDLER

}  // namespace
}  // namespace stf
