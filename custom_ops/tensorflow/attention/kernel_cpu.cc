// The attention op and its gradient on the CPU.
#include "custom_ops/tensorflow/attention/cpu.h"
#include "custom_ops/tensorflow/attention/kernel.h"
#include "tensorflow/core/lib/core/threadpool.h"

namespace stf {
namespace {

struct OnCpu {
  static auto Device(tensorflow::OpKernelContext* context) {
    const auto* threads = context->device()->tensorflow_cpu_worker_threads();
    return Cpu<tensorflow::thread::ThreadPool>(threads->workers, threads->num_threads);
  }
};

STF_REGISTER_ATTENTION(tensorflow::DEVICE_CPU, OnCpu);

}  // namespace
}  // namespace stf
