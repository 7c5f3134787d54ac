// Handlers of the op's custom calls on the GPU. Compiled where the CUDA kernels are.
#include <cuda_runtime_api.h>

#include "custom_ops/attention/cuda/attention.h"
#include "custom_ops/tensorflow/attention/ffi.h"

namespace stf {
namespace {

using Stream = ffi::PlatformStream<cudaStream_t>;

ffi::Error Launched(int error) {
  if (error == cudaSuccess) return ffi::Error::Success();
  return ffi::Error::Internal(std::string("StfAttention: CUDA refused a launch: ") + stf_attention_cuda_error(error));
}

ffi::Error Forward(cudaStream_t stream, AnyBuffer query, AnyBuffer key, AnyBuffer value, AnyBuffer lengths, AnyBuffer layouts,
                   Result output, Result log_sum_exp, Result workspace, Components components, ProgramBegin begin, float scale) {
  const stf_problem problem = Describe(SizesOf(query, value), query.element_type(), lengths, layouts, components, begin, scale);
  const stf_tensor q = Strided(query), k = Strided(key), v = Strided(value), out = Strided(*output);
  return Launched(
      stf_attention_cuda_forward(&problem, &q, &k, &v, &out, log_sum_exp->typed_data<float>(), workspace->untyped_data(), stream));
}

ffi::Error Gradient(cudaStream_t stream, AnyBuffer query, AnyBuffer key, AnyBuffer value, AnyBuffer lengths, AnyBuffer layouts,
                    AnyBuffer output, AnyBuffer log_sum_exp, AnyBuffer output_grad, AnyBuffer log_sum_exp_grad, Result query_grad,
                    Result key_grad, Result value_grad, Result workspace, Components components, ProgramBegin begin, float scale) {
  const stf_problem problem = Describe(SizesOf(query, value), query.element_type(), lengths, layouts, components, begin, scale);
  const stf_tensor q = Strided(query), k = Strided(key), v = Strided(value), out = Strided(output), grad = Strided(output_grad);
  const stf_tensor grads[] = {Strided(*query_grad), Strided(*key_grad), Strided(*value_grad)};
  return Launched(stf_attention_cuda_backward(&problem, &q, &k, &v, &out, log_sum_exp.typed_data<float>(), &grad,
                                              DataOrNull<float>(log_sum_exp_grad), &grads[0], &grads[1], &grads[2],
                                              workspace->untyped_data(), stream));
}

ffi::Error PackedForward(cudaStream_t stream, AnyBuffer packed, AnyBuffer lengths, AnyBuffer layouts, Result output, Result log_sum_exp,
                         Result workspace, int64_t heads, int64_t key_depth, Components components, ProgramBegin begin, float scale) {
  const stf_problem problem =
      Describe(SizesOfPacked(packed, heads, key_depth), packed.element_type(), lengths, layouts, components, begin, scale);
  stf_tensor inputs[3];
  Unpack(problem, packed, inputs);
  const stf_tensor out = Strided(*output);
  return Launched(stf_attention_cuda_forward(&problem, &inputs[0], &inputs[1], &inputs[2], &out, log_sum_exp->typed_data<float>(),
                                             workspace->untyped_data(), stream));
}

ffi::Error PackedGradient(cudaStream_t stream, AnyBuffer packed, AnyBuffer lengths, AnyBuffer layouts, AnyBuffer output,
                          AnyBuffer log_sum_exp, AnyBuffer output_grad, Result packed_grad, Result workspace, int64_t heads,
                          int64_t key_depth, Components components, ProgramBegin begin, float scale) {
  const stf_problem problem =
      Describe(SizesOfPacked(packed, heads, key_depth), packed.element_type(), lengths, layouts, components, begin, scale);
  stf_tensor inputs[3], grads[3];
  Unpack(problem, packed, inputs);
  Unpack(problem, *packed_grad, grads);
  const stf_tensor out = Strided(output), grad = Strided(output_grad);
  return Launched(stf_attention_cuda_backward(&problem, &inputs[0], &inputs[1], &inputs[2], &out, log_sum_exp.typed_data<float>(), &grad,
                                              nullptr, &grads[0], &grads[1], &grads[2], workspace->untyped_data(), stream));
}

// Each call launches the same kernels, so that XLA may record them among its own (CUDA graphs).
#define STF_HANDLER(name, function, binding, target)                                    \
  XLA_FFI_DEFINE_HANDLER(name, function, binding, {ffi::Traits::kCmdBufferCompatible}); \
  XLA_FFI_REGISTER_HANDLER(ffi::GetXlaFfiApi(), target, "CUDA", name, XLA_FFI_HANDLER_TRAITS_COMMAND_BUFFER_COMPATIBLE)

STF_HANDLER(kForward, Forward, BindForward<Stream>(), kForwardCall);
STF_HANDLER(kGradient, Gradient, BindGradient<Stream>(), kGradientCall);
STF_HANDLER(kPackedForward, PackedForward, BindPackedForward<Stream>(), kPackedForwardCall);
STF_HANDLER(kPackedGradient, PackedGradient, BindPackedGradient<Stream>(), kPackedGradientCall);

}  // namespace
}  // namespace stf
