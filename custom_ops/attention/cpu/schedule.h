// The plan of a call: each head's passes over its components, and the items of work of each phase.
#ifndef STF_CUSTOM_OPS_ATTENTION_CPU_SCHEDULE_H_
#define STF_CUSTOM_OPS_ATTENTION_CPU_SCHEDULE_H_

#include <vector>

#include "custom_ops/attention/cpu/kernels.h"

namespace stf {
namespace cpu {

// Heads whose sequences are alike in one phase, so that they share a numbering of items.
struct HeadClass {
  int64_t stride;     // there are as many sequences: position r + m * stride is the m-th of sequence r
  bool whole;         // an item is a whole sequence; else one tile of one
  int64_t sequences;  // of each head
  int64_t tiles;      // of the longest sequence
  std::vector<int64_t> heads;
  std::vector<const Pass*> passes;  // of each of `heads`
  int64_t items;                    // tile (outermost), sequence, batch and head (innermost); whole: batch, sequence, head
  int64_t progress;                 // where its tiles' progress begins; unused where whole
};

// A phase runs one pass of every head that has that many. A head's passes run one after another, since each continues the last one's
// softmax, or adds to its gradients.
struct Phase {
  std::vector<HeadClass> classes;
  int64_t items = 0;
  int64_t progress = 0;  // elements in all
};

class Schedule {
 public:
  explicit Schedule(const stf_problem& problem);
  Schedule(const Schedule&) = delete;

  const std::vector<Phase>& phases() const { return phases_; }
  bool whole_only() const { return whole_only_; }  // whether every item is a whole sequence
  bool whole_any() const { return whole_any_; }

  // Item `index` of a phase. Backward takes tiles in order (later ones wait for earlier ones); forward the heaviest first.
  Item ItemAt(const Phase& phase, int64_t index, bool heaviest_first, int64_t* progress) const;

 private:
  void AddPhase(size_t depth);

  const stf_problem& problem_;
  std::vector<std::vector<int32_t>> members_;  // storage behind the passes
  std::vector<std::vector<Pass>> programs_;    // the passes of each program
  std::vector<Phase> phases_;
  bool whole_only_ = true, whole_any_ = false;
};

}  // namespace cpu
}  // namespace stf

#endif  // STF_CUSTOM_OPS_ATTENTION_CPU_SCHEDULE_H_
