// The op under XLA on the GPU.
#include "custom_ops/tensorflow/attention/gpu.h"
#include "custom_ops/tensorflow/attention/xla.h"

namespace stf {
namespace {

STF_REGISTER_XLA("XLA_GPU_JIT", Gpu);

}  // namespace
}  // namespace stf
