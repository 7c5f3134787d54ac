// TensorFlow 2.19's headers include LLVM's, which its wheel lacks. They use these two types in declarations that stf has no part in.
#ifndef STF_THIRD_PARTY_TENSORFLOW_2_19_LLVM_ADT_ARRAYREF_H_
#define STF_THIRD_PARTY_TENSORFLOW_2_19_LLVM_ADT_ARRAYREF_H_

#include <vector>

#include "absl/types/span.h"

namespace llvm {
template <typename T>
using ArrayRef = absl::Span<const T>;
template <typename T>
using SmallVector = std::vector<T>;
}  // namespace llvm

#endif  // STF_THIRD_PARTY_TENSORFLOW_2_19_LLVM_ADT_ARRAYREF_H_
