// The names of the op's custom calls under XLA.
#ifndef STF_CUSTOM_OPS_TENSORFLOW_ATTENTION_TARGETS_H_
#define STF_CUSTOM_OPS_TENSORFLOW_ATTENTION_TARGETS_H_

namespace stf {

constexpr char kForwardCall[] = "stf_attention", kGradientCall[] = "stf_attention_gradient";
constexpr char kPackedForwardCall[] = "stf_packed_attention", kPackedGradientCall[] = "stf_packed_attention_gradient";

}  // namespace stf

#endif  // STF_CUSTOM_OPS_TENSORFLOW_ATTENTION_TARGETS_H_
