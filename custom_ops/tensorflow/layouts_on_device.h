// Bits of block layouts in device memory, for kernels that read them there.
#ifndef STF_CUSTOM_OPS_TENSORFLOW_LAYOUTS_ON_DEVICE_H_
#define STF_CUSTOM_OPS_TENSORFLOW_LAYOUTS_ON_DEVICE_H_

#include <cuda_runtime_api.h>

#include <string>

#include "tensorflow/core/framework/op_kernel.h"
#include "tensorflow/core/platform/errors.h"
#include "tensorflow/core/platform/mutex.h"

namespace stf {

// One kernel's layouts: they go to the device once.
class LayoutsOnDevice {
 public:
  // `layouts` is null where there are none.
  absl::Status Get(tensorflow::OpKernelContext* context, const std::string& bits, const uint8_t** layouts) {
    *layouts = nullptr;
    if (bits.empty()) return absl::OkStatus();
    tensorflow::mutex_lock lock(mutex_);
    if (!copied_) {
      TF_RETURN_IF_ERROR(
          context->allocate_temp(tensorflow::DT_UINT8, tensorflow::TensorShape({static_cast<int64_t>(bits.size())}), &bits_));
      const cudaError_t error = cudaMemcpyAsync(bits_.flat<uint8_t>().data(), bits.data(), bits.size(), cudaMemcpyHostToDevice,
                                                context->eigen_gpu_device().stream());
      if (error != cudaSuccess) return tensorflow::errors::Internal("block layouts could not be copied: ", cudaGetErrorString(error));
      copied_ = true;
    }
    *layouts = bits_.flat<uint8_t>().data();
    return absl::OkStatus();
  }

 private:
  tensorflow::mutex mutex_;
  tensorflow::Tensor bits_ TF_GUARDED_BY(mutex_);
  bool copied_ TF_GUARDED_BY(mutex_) = false;
};

}  // namespace stf

#endif  // STF_CUSTOM_OPS_TENSORFLOW_LAYOUTS_ON_DEVICE_H_
