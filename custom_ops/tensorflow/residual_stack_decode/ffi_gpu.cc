// Handler of the decode op's custom call. xla_gpu.cc says which operands and results come; the caches among the results are the operands'.
#include <cuda_runtime_api.h>

#include <string>
#include <vector>

#include "custom_ops/tensorflow/attention/ffi.h"
#include "custom_ops/tensorflow/residual_stack/stack.h"
#include "custom_ops/tensorflow/residual_stack_decode/decode.h"

namespace stf {
namespace {

int32_t DtypeOf(ffi::DataType type) {
  return type == ffi::DataType::F32 ? STF_FLOAT32 : type == ffi::DataType::BF16 ? STF_BFLOAT16 : STF_FLOAT16;
}

ffi::Error Decode(cudaStream_t stream, ffi::RemainingArgs args, ffi::RemainingRets results, int64_t heads, int64_t key_depth, float epsilon,
                  float scale, ffi::Span<const int32_t> first_program, ffi::Span<const int32_t> first_part,
                  ffi::Span<const int64_t> part_reads) {
  auto at = [&](size_t place) { return *args.get<AnyBuffer>(place); };
  auto result = [&](size_t place) { return **results.get<AnyBuffer>(place); };
  const AnyBuffer input = at(kDecodeInput), output_kernel = at(kDecodeWeights + 2), hidden_kernel = at(kDecodeWeights + 4);
  const int64_t blocks = hidden_kernel.dimensions()[0], period = first_program.size() - 1, count = part_reads.size();
  std::vector<stf_cache_part> parts(count);
  for (int64_t pattern = 0; pattern < period; pattern++) {
    const int64_t layers = (blocks - pattern + period - 1) / period;
    const int begin = first_part[first_program[pattern]], end = first_part[first_program[pattern + 1]];
    for (int t = begin; t < end; t++) {
      const AnyBuffer keys = result(1 + t), values = result(1 + count + t);
      parts[t] = {keys.untyped_data(), values.untyped_data(), layers ? keys.dimensions()[0] / layers : 0, part_reads[t]};
    }
  }
  const int32_t dtype = DtypeOf(input.element_type());
  const stf_decode decode = {blocks,
                             input.dimensions()[0],
                             input.dimensions()[1],
                             hidden_kernel.dimensions()[2],
                             heads,
                             key_depth,
                             output_kernel.dimensions()[1] / heads,
                             dtype,
                             count ? DtypeOf(at(kDecodeCaches).element_type()) : dtype,
                             epsilon,
                             scale,
                             static_cast<int32_t>(period),
                             first_program.begin(),
                             first_part.begin(),
                             parts.data(),
                             static_cast<const int32_t*>(at(kDecodeReads).untyped_data()),
                             static_cast<const int32_t*>(at(kDecodeWrites).untyped_data())};
  void* data[kStackWeights];
  for (int i = 0; i < kStackWeights; i++) data[i] = at(kDecodeWeights + i).untyped_data();
  const stf_stack_weights weights = StackWeights(data);
  const char* const error = stf_stack_cuda_decode(&decode, &weights, input.untyped_data(), result(0).untyped_data(),
                                                  result(1 + 2 * count).untyped_data(), stream);
  return error ? ffi::Error::Internal(std::string("StfResidualStackDecode: ") + error) : ffi::Error::Success();
}

// Not for XLA's command buffers: it is one launch, and all of its thread blocks must run at a time.
XLA_FFI_DEFINE_HANDLER(kDecode, Decode,
                       ffi::Ffi::Bind()
                           .Ctx<ffi::PlatformStream<cudaStream_t>>()
                           .RemainingArgs()
                           .RemainingRets()
                           .Attr<int64_t>("num_heads")
                           .Attr<int64_t>("key_depth")
                           .Attr<float>("epsilon")
                           .Attr<float>("scale")
                           .Attr<ffi::Span<const int32_t>>("first_program")
                           .Attr<ffi::Span<const int32_t>>("first_part")
                           .Attr<ffi::Span<const int64_t>>("part_reads"));
XLA_FFI_REGISTER_HANDLER(ffi::GetXlaFfiApi(), kDecodeCall, "CUDA", kDecode);

}  // namespace
}  // namespace stf
