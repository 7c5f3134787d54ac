// Handlers of the stack op's custom calls. xla_gpu.cc says which operands and results come.
#include <cuda_runtime_api.h>

#include "custom_ops/tensorflow/attention/ffi.h"
#include "custom_ops/tensorflow/residual_stack/stack.h"

namespace stf {
namespace {

// Attributes, in the order of Bind.
struct Attributes {
  Components components;
  ProgramBegin begin;
  float scale;
  ffi::Span<const int64_t> first_program;
  int64_t keep, heads, key_depth;
  float epsilon;
  int64_t drop_below;
  float drop_scale;
  ffi::Span<const int64_t> part;
};

// Buffers by their places; what is not there was never lowered so.
template <typename Buffers>
auto At(const Buffers& buffers, size_t place) {
  return *buffers.template get<AnyBuffer>(place);
}

// The stack of a call whose operands from `first` on are the stream or a gradient like it, the weights, the seed and the layouts.
StackOptions Describe(const ffi::RemainingArgs& args, size_t first, const Attributes& a) {
  const auto stream = At(args, first).dimensions(), output_kernel = At(args, first + 3).dimensions(),
             hidden_kernel = At(args, first + 5).dimensions();
  return {output_kernel[0],
          stream[0],
          stream[1],
          stream[2],
          hidden_kernel[2],
          a.heads,
          a.key_depth,
          output_kernel[1] / a.heads,
          At(args, first).element_type() == ffi::DataType::BF16 ? STF_BFLOAT16 : STF_FLOAT16,
          static_cast<int32_t>(a.keep),
          a.epsilon,
          a.scale,
          a.drop_below,
          a.drop_scale,
          {a.part[0], a.part[1], a.part[2], a.part[3]},
          reinterpret_cast<const stf_component*>(a.components.begin()),
          a.begin.begin(),
          a.first_program.begin(),
          static_cast<int64_t>(a.first_program.size()) - 1};
}

template <typename T = void>
T* Data(const AnyBuffer& buffer) {
  return static_cast<T*>(buffer.untyped_data());
}

stf_stack_weights Weights(const ffi::RemainingArgs& args, size_t first) {
  void* data[kStackWeights];
  for (int i = 0; i < kStackWeights; i++) data[i] = Data(At(args, first + i));
  return StackWeights(data);
}

ffi::Error Done(const char* error) {
  return error ? ffi::Error::Internal(std::string("StfResidualStack: ") + error) : ffi::Error::Success();
}

ffi::Error Forward(cudaStream_t stream, ffi::RemainingArgs args, ffi::RemainingRets results, Components components, ProgramBegin begin,
                   float scale, ffi::Span<const int64_t> first_program, int64_t keep, int64_t heads, int64_t key_depth, float epsilon,
                   int64_t drop_below, float drop_scale, ffi::Span<const int64_t> part) {
  const Attributes attributes = {components, begin, scale, first_program, keep, heads, key_depth, epsilon, drop_below, drop_scale, part};
  const Stack stack(Describe(args, 0, attributes), Data<uint8_t>(At(args, kStackWeights + 2)), Data<int32_t>(At(args, kStackWeights + 1)));
  const stf_stack_weights weights = Weights(args, 1);
  return Done(stf_stack_cuda_forward(stack.get(), &weights, Data(At(args, 0)), Data(*At(results, 0)), Data(*At(results, 1)),
                                     Data<float>(*At(results, 2)), Data(*At(results, 3)), stream));
}

ffi::Error Gradient(cudaStream_t stream, ffi::RemainingArgs args, ffi::RemainingRets results, Components components, ProgramBegin begin,
                    float scale, ffi::Span<const int64_t> first_program, int64_t keep, int64_t heads, int64_t key_depth, float epsilon,
                    int64_t drop_below, float drop_scale, ffi::Span<const int64_t> part) {
  const Attributes attributes = {components, begin, scale, first_program, keep, heads, key_depth, epsilon, drop_below, drop_scale, part};
  const Stack stack(Describe(args, 2, attributes), Data<uint8_t>(At(args, kStackWeights + 4)), Data<int32_t>(At(args, kStackWeights + 3)));
  const stf_stack_weights weights = Weights(args, 3);
  void* data[kStackWeights];
  for (int i = 0; i < kStackWeights; i++) data[i] = Data(*At(results, 1 + i));
  const stf_stack_weights grads = StackWeights(data);
  return Done(stf_stack_cuda_backward(stack.get(), &weights, Data(At(args, 0)), Data<float>(At(args, 1)), Data(At(args, 2)),
                                      Data(*At(results, 0)), &grads, Data(*At(results, 1 + kStackWeights)), stream));
}

auto Bind() {
  return ffi::Ffi::Bind()
      .Ctx<ffi::PlatformStream<cudaStream_t>>()
      .RemainingArgs()
      .RemainingRets()
      .Attr<Components>("components")
      .Attr<ProgramBegin>("program_begin")
      .Attr<float>("scale")
      .Attr<ffi::Span<const int64_t>>("first_program")
      .Attr<int64_t>("keep")
      .Attr<int64_t>("num_heads")
      .Attr<int64_t>("key_depth")
      .Attr<float>("epsilon")
      .Attr<int64_t>("drop_below")
      .Attr<float>("drop_scale")
      .Attr<ffi::Span<const int64_t>>("part");
}

// Not for XLA's command buffers: a stack's thousands of kernels in a CUDA graph were no faster than launched one by one (H100), and had to
// be recorded again whenever a buffer had moved.
XLA_FFI_DEFINE_HANDLER(kForward, Forward, Bind());
XLA_FFI_DEFINE_HANDLER(kGradient, Gradient, Bind());
XLA_FFI_REGISTER_HANDLER(ffi::GetXlaFfiApi(), kStackForwardCall, "CUDA", kForward);
XLA_FFI_REGISTER_HANDLER(ffi::GetXlaFfiApi(), kStackGradientCall, "CUDA", kGradient);

}  // namespace
}  // namespace stf
