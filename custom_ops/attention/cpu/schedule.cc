#include "custom_ops/attention/cpu/schedule.h"

#include <algorithm>

#include "custom_ops/attention/passes.h"

namespace stf {
namespace cpu {
namespace {

// Fewer sequences than this in a class are worked on tile by tile, so that many threads find work.
constexpr int64_t kFewestWhole = 32;

}  // namespace

Schedule::Schedule(const stf_problem& problem) : problem_(problem) {
  members_.reserve(problem.program_begin[problem.programs] + problem.programs);  // passes keep pointers into it
  size_t depth = 0;
  for (int32_t p = 0; p < problem.programs; p++) {
    const stf_component* program = problem.components + problem.program_begin[p];
    const int32_t count = problem.program_begin[p + 1] - problem.program_begin[p];
    const std::vector<ComponentPass> of_components = PassesOf(program, count);
    std::vector<Pass> passes;
    for (size_t i = 0; i < of_components.size(); i++) {
      std::vector<int32_t>& members = members_.emplace_back();
      for (int32_t t = 0; t < count; t++) {
        if (of_components[i].members >> t & 1) members.push_back(t);
      }
      passes.push_back(
          {program, members.data(), static_cast<int>(members.size()), of_components[i].stride, i == 0, i + 1 == of_components.size()});
    }
    depth = std::max(depth, passes.size());
    programs_.push_back(std::move(passes));
  }
  for (size_t d = 0; d < depth; d++) AddPhase(d);
}

void Schedule::AddPhase(size_t depth) {
  const stf_problem& p = problem_;
  Phase phase;
  for (int64_t head = 0; head < p.heads; head++) {
    const std::vector<Pass>& passes = programs_[head % p.programs];
    if (depth >= passes.size()) continue;
    const Pass& pass = passes[depth];
    const bool strided = pass.count > 0 && pass.program[pass.members[0]].kind == STF_STRIDED;
    const int64_t sequences = std::min(pass.stride, p.positions);
    const int64_t length = (p.positions + pass.stride - 1) / pass.stride;
    const bool whole = strided && length <= kWholeLimit && p.batch * p.heads * sequences >= kFewestWhole;
    auto same = [&](const HeadClass& c) { return c.stride == pass.stride && c.whole == whole; };
    auto found = std::find_if(phase.classes.begin(), phase.classes.end(), same);
    if (found == phase.classes.end()) {
      phase.classes.push_back({pass.stride, whole, sequences, (length + kLanes - 1) / kLanes, {}, {}, 0, 0});
      found = phase.classes.end() - 1;
    }
    found->heads.push_back(head);
    found->passes.push_back(&pass);
  }
  for (HeadClass& c : phase.classes) {
    const int64_t sequences = p.batch * static_cast<int64_t>(c.heads.size()) * c.sequences;
    c.items = c.whole ? sequences : sequences * c.tiles;
    phase.items += c.items;
    (c.whole ? whole_any_ : whole_only_) = c.whole;
    if (!c.whole) {
      c.progress = phase.progress;
      phase.progress += sequences * (c.tiles + 1);
    }
  }
  phases_.push_back(std::move(phase));
}

Item Schedule::ItemAt(const Phase& phase, int64_t index, bool heaviest_first, int64_t* progress) const {
  const HeadClass* c = phase.classes.data();
  while (index >= c->items) index -= (c++)->items;
  const int64_t heads = c->heads.size();
  const int64_t head = index % heads;
  index /= heads;
  Item item = {};
  item.head = c->heads[head];
  item.key_head = problem_.key_heads ? item.head * problem_.key_heads / problem_.heads : item.head;
  item.pass = c->passes[head];
  item.whole = c->whole;
  if (c->whole) {
    item.sequence = index % c->sequences;
    item.batch = index / c->sequences;
    item.tile_end = c->tiles;
    return item;
  }
  item.batch = index % problem_.batch;
  index /= problem_.batch;
  item.sequence = index % c->sequences;
  const int64_t tile = index / c->sequences;
  item.tile_begin = heaviest_first ? c->tiles - 1 - tile : tile;
  item.tile_end = item.tile_begin + 1;
  item.tiles = c->tiles;
  if (progress) {
    const int64_t sequence = (item.sequence * problem_.batch + item.batch) * heads + head;
    item.progress = progress + c->progress + sequence * (c->tiles + 1);
  }
  return item;
}

}  // namespace cpu
}  // namespace stf
