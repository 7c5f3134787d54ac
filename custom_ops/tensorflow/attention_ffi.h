// The op under XLA: what the handlers of its custom calls share. XLA calls them with buffers and attributes; attention_xla.cc says which.
#ifndef STF_CUSTOM_OPS_TENSORFLOW_ATTENTION_FFI_H_
#define STF_CUSTOM_OPS_TENSORFLOW_ATTENTION_FFI_H_

#include "custom_ops/attention/problem.h"
#include "custom_ops/tensorflow/attention_calls.h"
#include "xla/ffi/api/ffi.h"

namespace xla::ffi {
const XLA_FFI_Api* GetXlaFfiApi();  // its own header needs others that TensorFlow's wheel does not carry
}

namespace stf {

namespace ffi = xla::ffi;

using ffi::AnyBuffer;
using Result = ffi::Result<AnyBuffer>;
using Components = ffi::Span<const int64_t>;
using ProgramBegin = ffi::Span<const int32_t>;

// Handlers' signatures. Context is what a device's kernels run on.
// Forward: query, key, value, lengths, layouts -> output, log_sum_exp, workspace.
template <typename Context>
auto BindForward() {
  return ffi::Ffi::Bind()
      .Ctx<Context>()
      .template Arg<AnyBuffer>()
      .template Arg<AnyBuffer>()
      .template Arg<AnyBuffer>()
      .template Arg<AnyBuffer>()
      .template Arg<AnyBuffer>()
      .template Ret<AnyBuffer>()
      .template Ret<AnyBuffer>()
      .template Ret<AnyBuffer>()
      .template Attr<Components>("components")
      .template Attr<ProgramBegin>("program_begin")
      .template Attr<float>("scale");
}

// Gradient: query, key, value, lengths, layouts, output, log_sum_exp, output_grad, log_sum_exp_grad
//   -> query_grad, key_grad, value_grad, workspace.
template <typename Context>
auto BindGradient() {
  return ffi::Ffi::Bind()
      .Ctx<Context>()
      .template Arg<AnyBuffer>()
      .template Arg<AnyBuffer>()
      .template Arg<AnyBuffer>()
      .template Arg<AnyBuffer>()
      .template Arg<AnyBuffer>()
      .template Arg<AnyBuffer>()
      .template Arg<AnyBuffer>()
      .template Arg<AnyBuffer>()
      .template Arg<AnyBuffer>()
      .template Ret<AnyBuffer>()
      .template Ret<AnyBuffer>()
      .template Ret<AnyBuffer>()
      .template Ret<AnyBuffer>()
      .template Attr<Components>("components")
      .template Attr<ProgramBegin>("program_begin")
      .template Attr<float>("scale");
}

inline stf_tensor Strided(const AnyBuffer& buffer) {
  const auto sizes = buffer.dimensions();
  return {buffer.untyped_data(), sizes[1] * sizes[2] * sizes[3], sizes[2] * sizes[3], sizes[3]};
}

// The call's problem. It points into the arguments.
inline stf_problem Describe(const AnyBuffer& query, const AnyBuffer& value, const AnyBuffer& lengths, const AnyBuffer& layouts,
                            Components components, ProgramBegin begin, float scale) {
  static_assert(sizeof(stf_component) == 6 * sizeof(int64_t), "a component is a record of six integers");
  const auto sizes = query.dimensions();
  const int32_t dtype = query.element_type() == ffi::DataType::F32    ? STF_FLOAT32
                        : query.element_type() == ffi::DataType::BF16 ? STF_BFLOAT16
                                                                      : STF_FLOAT16;
  return {sizes[0],
          sizes[1],
          sizes[2],
          sizes[3],
          value.dimensions()[3],
          dtype,
          scale,
          static_cast<int32_t>(begin.size()) - 1,
          begin.begin(),
          reinterpret_cast<const stf_component*>(components.begin()),
          static_cast<const uint8_t*>(layouts.untyped_data()),
          lengths.element_count() ? static_cast<const int32_t*>(lengths.untyped_data()) : nullptr};
}

}  // namespace stf

#endif  // STF_CUSTOM_OPS_TENSORFLOW_ATTENTION_FFI_H_
