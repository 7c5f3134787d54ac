// Handlers of the op's custom calls on the CPU.
#include "custom_ops/attention/cpu/attention.h"
#include "custom_ops/tensorflow/attention/ffi.h"
#include "custom_ops/tensorflow/attention/workers.h"

namespace stf {
namespace {

ffi::Error Launched(int error) {
  if (error == 0) return ffi::Error::Success();
  return ffi::Error(ffi::ErrorCode::kResourceExhausted, "StfAttention: no memory for the CPU kernels' scratch");
}

ffi::Error Forward(ffi::ThreadPool pool, AnyBuffer query, AnyBuffer key, AnyBuffer value, AnyBuffer lengths, AnyBuffer layouts,
                   Result output, Result log_sum_exp, Result, Components components, ProgramBegin begin, float scale) {
  const stf_problem problem = Describe(SizesOf(query, value), query.element_type(), lengths, layouts, components, begin, scale);
  if (const std::string wrong = WrongLength(problem); !wrong.empty()) return ffi::Error::InvalidArgument(wrong);
  const stf_tensor q = Strided(query), k = Strided(key), v = Strided(value), out = Strided(*output);
  const Workers workers(&pool, pool.num_threads());
  return Launched(stf_attention_cpu_forward(&problem, &q, &k, &v, &out, log_sum_exp->typed_data<float>(), workers.get()));
}

ffi::Error Gradient(ffi::ThreadPool pool, AnyBuffer query, AnyBuffer key, AnyBuffer value, AnyBuffer lengths, AnyBuffer layouts,
                    AnyBuffer output, AnyBuffer log_sum_exp, AnyBuffer output_grad, AnyBuffer log_sum_exp_grad, Result query_grad,
                    Result key_grad, Result value_grad, Result, Components components, ProgramBegin begin, float scale) {
  const stf_problem problem = Describe(SizesOf(query, value), query.element_type(), lengths, layouts, components, begin, scale);
  if (const std::string wrong = WrongLength(problem); !wrong.empty()) return ffi::Error::InvalidArgument(wrong);
  const stf_tensor q = Strided(query), k = Strided(key), v = Strided(value), out = Strided(output), grad = Strided(output_grad);
  const stf_tensor grads[] = {Strided(*query_grad), Strided(*key_grad), Strided(*value_grad)};
  const Workers workers(&pool, pool.num_threads());
  return Launched(stf_attention_cpu_backward(&problem, &q, &k, &v, &out, log_sum_exp.typed_data<float>(), &grad,
                                             DataOrNull<float>(log_sum_exp_grad), &grads[0], &grads[1], &grads[2], workers.get()));
}

ffi::Error PackedForward(ffi::ThreadPool pool, AnyBuffer packed, AnyBuffer lengths, AnyBuffer layouts, Result output, Result log_sum_exp,
                         Result, int64_t heads, int64_t key_depth, Components components, ProgramBegin begin, float scale) {
  const stf_problem problem =
      Describe(SizesOfPacked(packed, heads, key_depth), packed.element_type(), lengths, layouts, components, begin, scale);
  if (const std::string wrong = WrongLength(problem); !wrong.empty()) return ffi::Error::InvalidArgument(wrong);
  stf_tensor inputs[3];
  Unpack(problem, packed, inputs);
  const stf_tensor out = Strided(*output);
  const Workers workers(&pool, pool.num_threads());
  return Launched(
      stf_attention_cpu_forward(&problem, &inputs[0], &inputs[1], &inputs[2], &out, log_sum_exp->typed_data<float>(), workers.get()));
}

ffi::Error PackedGradient(ffi::ThreadPool pool, AnyBuffer packed, AnyBuffer lengths, AnyBuffer layouts, AnyBuffer output,
                          AnyBuffer log_sum_exp, AnyBuffer output_grad, Result packed_grad, Result, int64_t heads, int64_t key_depth,
                          Components components, ProgramBegin begin, float scale) {
  const stf_problem problem =
      Describe(SizesOfPacked(packed, heads, key_depth), packed.element_type(), lengths, layouts, components, begin, scale);
  if (const std::string wrong = WrongLength(problem); !wrong.empty()) return ffi::Error::InvalidArgument(wrong);
  stf_tensor inputs[3], grads[3];
  Unpack(problem, packed, inputs);
  Unpack(problem, *packed_grad, grads);
  const stf_tensor out = Strided(output), grad = Strided(output_grad);
  const Workers workers(&pool, pool.num_threads());
  return Launched(stf_attention_cpu_backward(&problem, &inputs[0], &inputs[1], &inputs[2], &out, log_sum_exp.typed_data<float>(), &grad,
                                             nullptr, &grads[0], &grads[1], &grads[2], workers.get()));
}

XLA_FFI_DEFINE_HANDLER(kForward, Forward, BindForward<ffi::ThreadPool>());
XLA_FFI_DEFINE_HANDLER(kGradient, Gradient, BindGradient<ffi::ThreadPool>());
XLA_FFI_DEFINE_HANDLER(kPackedForward, PackedForward, BindPackedForward<ffi::ThreadPool>());
XLA_FFI_DEFINE_HANDLER(kPackedGradient, PackedGradient, BindPackedGradient<ffi::ThreadPool>());
XLA_FFI_REGISTER_HANDLER(ffi::GetXlaFfiApi(), kForwardCall, "Host", kForward);
XLA_FFI_REGISTER_HANDLER(ffi::GetXlaFfiApi(), kGradientCall, "Host", kGradient);
XLA_FFI_REGISTER_HANDLER(ffi::GetXlaFfiApi(), kPackedForwardCall, "Host", kPackedForward);
XLA_FFI_REGISTER_HANDLER(ffi::GetXlaFfiApi(), kPackedGradientCall, "Host", kPackedGradient);

}  // namespace
}  // namespace stf
