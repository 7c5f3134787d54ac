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
  int64_t batch, positions, heads, key_depth, value_depth, key_heads;
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
          DataOrNull<int32_t>(lengths),
          nullptr,
          nullptr,
          sizes.key_heads};
}

inline Sizes SizesOf(const AnyBuffer& query, const AnyBuffer& value) {
  const auto sizes = query.dimensions();
  return {sizes[0], sizes[1], sizes[2], sizes[3], value.dimensions()[3], value.dimensions()[2]};
}

inline Sizes SizesOfPacked(const AnyBuffer& packed, int64_t heads, int64_t key_depth) {
  const auto sizes = packed.dimensions();
  return {sizes[0], sizes[1], heads, key_depth, sizes[2] / heads - 2 * key_depth, heads};
}

// Query, key and value, or their gradients, side by side in a buffer's rows.
inline void Unpack(const stf_problem& problem, const AnyBuffer& packed, stf_tensor tensors[3]) {
  Unpack(problem, packed.untyped_data(), problem.dtype == STF_FLOAT32 ? 4 : 2, tensors);
}

template <typename Device>
ffi::Error Launched(const Device& device, int error) {
  if (error == 0) return ffi::Error::Success();
  return ffi::Error(device.OutOfMemory(error) ? ffi::ErrorCode::kResourceExhausted : ffi::ErrorCode::kInternal, device.Error(error));
}

template <typename Device>
ffi::Error Forward(const Device& device, const stf_problem& problem, const stf_tensor inputs[3], AnyBuffer output, AnyBuffer log_sum_exp,
                   AnyBuffer workspace) {
  if (const std::string wrong = device.Wrong(problem); !wrong.empty()) return ffi::Error::InvalidArgument(wrong);
  const int error = device.Forward(problem, inputs, Strided(output), log_sum_exp.typed_data<float>(), workspace.untyped_data());
  return Launched(device, error);
}

template <typename Device>
ffi::Error Backward(const Device& device, const stf_problem& problem, const stf_tensor inputs[3], AnyBuffer output, AnyBuffer log_sum_exp,
                    AnyBuffer output_grad, const float* log_sum_exp_grad, const stf_tensor grads[3], AnyBuffer workspace) {
  if (const std::string wrong = device.Wrong(problem); !wrong.empty()) return ffi::Error::InvalidArgument(wrong);
  const int error = device.Backward(problem, inputs, Strided(output), log_sum_exp.typed_data<float>(), Strided(output_grad),
                                    log_sum_exp_grad, grads, workspace.untyped_data());
  return Launched(device, error);
}

// The handlers. On::Context is what XLA is to give them, On::Device(context) the device as cpu.h and gpu.h have it.
template <typename On>
struct Handlers {
  using Context = typename On::Context;

  static ffi::Error Forward(typename On::Argument context, AnyBuffer query, AnyBuffer key, AnyBuffer value, AnyBuffer lengths,
                            AnyBuffer layouts, AnyBuffer documents, AnyBuffer sinks, Result output, Result log_sum_exp, Result workspace,
                            Components components, ProgramBegin begin, float scale) {
    stf_problem problem = Describe(SizesOf(query, value), query.element_type(), lengths, layouts, components, begin, scale);
    problem.documents = DataOrNull<int32_t>(documents);
    problem.sinks = DataOrNull<float>(sinks);
    const stf_tensor inputs[] = {Strided(query), Strided(key), Strided(value)};
    return stf::Forward(On::Device(context), problem, inputs, *output, *log_sum_exp, *workspace);
  }

  static ffi::Error Backward(typename On::Argument context, AnyBuffer query, AnyBuffer key, AnyBuffer value, AnyBuffer lengths,
                             AnyBuffer layouts, AnyBuffer output, AnyBuffer log_sum_exp, AnyBuffer output_grad, AnyBuffer log_sum_exp_grad,
                             AnyBuffer documents, Result query_grad, Result key_grad, Result value_grad, Result workspace,
                             Components components, ProgramBegin begin, float scale) {
    stf_problem problem = Describe(SizesOf(query, value), query.element_type(), lengths, layouts, components, begin, scale);
    problem.documents = DataOrNull<int32_t>(documents);
    const stf_tensor inputs[] = {Strided(query), Strided(key), Strided(value)};
    const stf_tensor grads[] = {Strided(*query_grad), Strided(*key_grad), Strided(*value_grad)};
    return stf::Backward(On::Device(context), problem, inputs, output, log_sum_exp, output_grad, DataOrNull<float>(log_sum_exp_grad), grads,
                         *workspace);
  }

  static ffi::Error PackedForward(typename On::Argument context, AnyBuffer packed, AnyBuffer lengths, AnyBuffer layouts, Result output,
                                  Result log_sum_exp, Result workspace, int64_t heads, int64_t key_depth, Components components,
                                  ProgramBegin begin, float scale) {
    const stf_problem problem =
        Describe(SizesOfPacked(packed, heads, key_depth), packed.element_type(), lengths, layouts, components, begin, scale);
    stf_tensor inputs[3];
    Unpack(problem, packed, inputs);
    return stf::Forward(On::Device(context), problem, inputs, *output, *log_sum_exp, *workspace);
  }

  static ffi::Error PackedBackward(typename On::Argument context, AnyBuffer packed, AnyBuffer lengths, AnyBuffer layouts, AnyBuffer output,
                                   AnyBuffer log_sum_exp, AnyBuffer output_grad, Result packed_grad, Result workspace, int64_t heads,
                                   int64_t key_depth, Components components, ProgramBegin begin, float scale) {
    const stf_problem problem =
        Describe(SizesOfPacked(packed, heads, key_depth), packed.element_type(), lengths, layouts, components, begin, scale);
    stf_tensor inputs[3], grads[3];
    Unpack(problem, packed, inputs);
    Unpack(problem, *packed_grad, grads);
    return stf::Backward(On::Device(context), problem, inputs, output, log_sum_exp, output_grad, nullptr, grads, *workspace);
  }

  // Their signatures.
  static auto BindForward() { return Program(Buffers<7, 3>()); }
  static auto BindBackward() { return Program(Buffers<10, 4>()); }
  static auto BindPackedForward() { return Program(Packing(Buffers<3, 3>())); }
  static auto BindPackedBackward() { return Program(Packing(Buffers<6, 2>())); }

 private:
  template <int kArguments, int kResults>
  static auto Buffers() {
    return Returned<kResults>(Taken<kArguments>(ffi::Ffi::Bind().Ctx<Context>()));
  }
  template <int kCount, typename Binding>
  static auto Taken(Binding&& binding) {
    if constexpr (kCount > 1) {
      return Taken<kCount - 1>(std::move(binding).template Arg<AnyBuffer>());
    } else {
      return std::move(binding).template Arg<AnyBuffer>();
    }
  }
  template <int kCount, typename Binding>
  static auto Returned(Binding&& binding) {
    if constexpr (kCount > 1) {
      return Returned<kCount - 1>(std::move(binding).template Ret<AnyBuffer>());
    } else {
      return std::move(binding).template Ret<AnyBuffer>();
    }
  }
  template <typename Binding>
  static auto Packing(Binding&& binding) {
    return std::move(binding).template Attr<int64_t>("num_heads").template Attr<int64_t>("key_depth");
  }
  template <typename Binding>
  static auto Program(Binding&& binding) {
    return std::move(binding)
        .template Attr<Components>("components")
        .template Attr<ProgramBegin>("program_begin")
        .template Attr<float>("scale");
  }
};

}  // namespace stf

#endif  // STF_CUSTOM_OPS_TENSORFLOW_ATTENTION_FFI_H_
