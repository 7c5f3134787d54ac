// The kernels of one dtype and pair of depths: compiled once for each, with STF_DTYPE (stf_dtype) and STF_DEPTHS (index into kDepths).
#include "custom_ops/attention/cuda/launch.cuh"

namespace stf {
namespace cuda {

#if STF_DTYPE == 0
using Element = float;
#elif STF_DTYPE == 1
using Element = __nv_bfloat16;
#else
using Element = __half;
#endif

template cudaError_t Run<Element, STF_DEPTHS>(Pass pass, const Arguments& args, const Launch& launch, const Machine& machine,
                                              cudaStream_t stream);
#if STF_DEPTHS == 0
template cudaError_t SumGroups<Element>(const Arguments& args, const stf_tensor& from, const stf_tensor& to, int depth,
                                        cudaStream_t stream);
#endif

}  // namespace cuda
}  // namespace stf
