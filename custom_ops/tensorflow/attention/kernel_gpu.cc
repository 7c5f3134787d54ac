// The attention op and its gradient on the GPU, launched on the op's stream. Compiled where the CUDA kernels are.
#define EIGEN_USE_GPU
#include "custom_ops/tensorflow/attention/gpu.h"
#include "custom_ops/tensorflow/attention/kernel.h"

namespace stf {
namespace {

struct OnGpu {
  static Gpu Device(tensorflow::OpKernelContext* context) { return Gpu(context->eigen_gpu_device().stream()); }
};

STF_REGISTER_ATTENTION(tensorflow::DEVICE_GPU, OnGpu);

}  // namespace
}  // namespace stf
