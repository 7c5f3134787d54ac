// The op under XLA on the CPU.
#include "custom_ops/tensorflow/attention/cpu.h"
#include "custom_ops/tensorflow/attention/xla.h"
#include "tensorflow/core/lib/core/threadpool.h"

namespace stf {
namespace {

STF_REGISTER_XLA("XLA_CPU_JIT", Cpu<tensorflow::thread::ThreadPool>);

}  // namespace
}  // namespace stf
