// In which order kernels take a program's components, on every device.
#ifndef STF_CUSTOM_OPS_ATTENTION_PASSES_H_
#define STF_CUSTOM_OPS_ATTENTION_PASSES_H_

#include <vector>

#include "custom_ops/attention/problem.h"

namespace stf {

// Components whose queries share a numbering: those over plain positions, or one strided component, each of whose sequences is one.
struct ComponentPass {
  uint64_t members;  // bit t: the program's component t
  int64_t stride;    // of positions; plain: 1
  bool strided;
};

// The passes of one head: first all of the plain components, in one softmax, then each strided one. A program without a component has an
// empty plain pass, which writes the results of no key.
inline std::vector<ComponentPass> PassesOf(const stf_component* components, int count) {
  std::vector<ComponentPass> passes = {{0, 1, false}};
  for (int t = 0; t < count; t++) {
    if (components[t].kind == STF_STRIDED) {
      passes.push_back({uint64_t{1} << t, components[t].a, true});
    } else {
      passes[0].members |= uint64_t{1} << t;
    }
  }
  if (passes[0].members == 0 && passes.size() > 1) passes.erase(passes.begin());
  return passes;
}

}  // namespace stf

#endif  // STF_CUSTOM_OPS_ATTENTION_PASSES_H_
