// The op under XLA: what the handlers of its custom calls share. XLA calls them with buffers and attributes; xla.h says which.
#ifndef STF_CUSTOM_OPS_TENSORFLOW_ATTENTION_FFI_H_
#define STF_CUSTOM_OPS_TENSORFLOW_ATTENTION_FFI_H_

#include "custom_ops/attention/problem.h"
#include "custom_ops/tensorflow/attention/packed.h"
#include "custom_ops/tensorflow/attention/targets.h"
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

// Packed forward: query_key_value, lengths, layouts -> output, log_sum_exp, workspace.
template <typename Context>
auto BindPackedForward() {
  return ffi::Ffi::Bind()
      .Ctx<Context>()
      .template Arg<AnyBuffer>()
      .template Arg<AnyBuffer>()
      .template Arg<AnyBuffer>()
      .template Ret<AnyBuffer>()
      .template Ret<AnyBuffer>()
      .template Ret<AnyBuffer>()
      .template Attr<int64_t>("num_heads")
      .template Attr<int64_t>("key_depth")
      .template Attr<Components>("components")
      .template Attr<ProgramBegin>("program_begin")
      .template Attr<float>("scale");
}

// Packed gradient: query_key_value, lengths, layouts, output, log_sum_exp, output_grad -> query_key_value_grad, workspace.
template <typename Context>
auto BindPackedGradient() {
  return ffi::Ffi::Bind()
      .Ctx<Context>()
      .template Arg<AnyBuffer>()
      .template Arg<AnyBuffer>()
      .template Arg<AnyBuffer>()
      .template Arg<AnyBuffer>()
      .template Arg<AnyBuffer>()
      .template Arg<AnyBuffer>()
      .template Ret<AnyBuffer>()
      .template Ret<AnyBuffer>()
      .template Attr<int64_t>("num_heads")
      .template Attr<int64_t>("key_depth")
      .template Attr<Components>("components")
      .template Attr<ProgramBegin>("program_begin")
      .template Attr<float>("scale");
}

inline stf_tensor Strided(const AnyBuffer& buffer) {
  const auto sizes = buffer.dimensions();
  return {buffer.untyped_data(), sizes[1] * sizes[2] * sizes[3], sizes[2] * sizes[3], sizes[3]};
}

// The elements of an operand that a call may lack: null where there is none.
template <typename T>
const T* DataOrNull(const AnyBuffer& buffer) {
  return buffer.element_count() ? static_cast<const T*>(buffer.untyped_data()) : nullptr;
}

// What a call's sizes and attributes describe. It points into the arguments.
struct Sizes {
  int64_t batch, positions, heads, key_depth, value_depth;
};

inline stf_problem Describe(const Sizes& sizes, ffi::DataType type, const AnyBuffer& lengths, const AnyBuffer& layouts,
                            Components components, ProgramBegin begin, float scale) {
  static_assert(sizeof(stf_component) == 6 * sizeof(int64_t), "a component is a record of six integers");
  const int32_t dtype = type == ffi::DataType::F32 ? STF_FLOAT32 : type == ffi::DataType::BF16 ? STF_BFLOAT16 : STF_FLOAT16;
  return {sizes.batch,
          sizes.positions,
          sizes.heads,
          sizes.key_depth,
          sizes.value_depth,
          dtype,
          scale,
          static_cast<int32_t>(begin.size()) - 1,
          begin.begin(),
          reinterpret_cast<const stf_component*>(components.begin()),
          DataOrNull<uint8_t>(layouts),
          DataOrNull<int32_t>(lengths)};
}

inline Sizes SizesOf(const AnyBuffer& query, const AnyBuffer& value) {
  const auto sizes = query.dimensions();
  return {sizes[0], sizes[1], sizes[2], sizes[3], value.dimensions()[3]};
}

inline Sizes SizesOfPacked(const AnyBuffer& packed, int64_t heads, int64_t key_depth) {
  const auto sizes = packed.dimensions();
  return {sizes[0], sizes[1], heads, key_depth, sizes[2] / heads - 2 * key_depth};
}

// Query, key and value, or their gradients, side by side in a buffer's rows.
inline void Unpack(const stf_problem& problem, const AnyBuffer& packed, stf_tensor tensors[3]) {
  Unpack(problem, packed.untyped_data(), problem.dtype == STF_FLOAT32 ? 4 : 2, tensors);
}

}  // namespace stf

#endif  // STF_CUSTOM_OPS_TENSORFLOW_ATTENTION_FFI_H_
