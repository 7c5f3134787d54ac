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
  members_.reserve(problem.program_begin[problem.programs] + problem.programs);  // groups keep pointers into it
  size_t depth = 0;
  for (int32_t p = 0; p < problem.programs; p++) {
    const stf_component* program = problem.components + problem.program_begin[p];
    const int32_t count = problem.program_begin[p + 1] - problem.program_begin[p];
    const std::vector<ComponentPass> passes = PassesOf(program, count);
    std::vector<Group> groups;
    for (size_t g = 0; g < passes.size(); g++) {
      std::vector<int32_t>& members = members_.emplace_back();
      for (int32_t i = 0; i < count; i++) {
        if (passes[g].members >> i & 1) members.push_back(i);
      }
      groups.push_back({program, members.data(), static_cast<int>(members.size()), passes[g].stride, g == 0, g + 1 == passes.size()});
    }
    depth = std::max(depth, groups.size());
    programs_.push_back(std::move(groups));
  }
  for (size_t d = 0; d < depth; d++) AddPhase(d);
}

void Schedule::AddPhase(size_t depth) {
  const stf_problem& p = problem_;
  Phase phase;
  for (int64_t head = 0; head < p.heads; head++) {
    const std::vector<Group>& groups = programs_[head % p.programs];
    if (depth >= groups.size()) continue;
    const Group& group = groups[depth];
    const bool strided = group.count > 0 && group.program[group.members[0]].kind == STF_STRIDED;
    const int64_t sequences = std::min(group.stride, p.positions);
    const int64_t length = (p.positions + group.stride - 1) / group.stride;
    const bool whole = strided && length <= kWholeLimit && p.batch * p.heads * sequences >= kFewestWhole;
    auto same = [&](const HeadClass& c) { return c.stride == group.stride && c.whole == whole; };
    auto found = std::find_if(phase.classes.begin(), phase.classes.end(), same);
    if (found == phase.classes.end()) {
      phase.classes.push_back({group.stride, whole, sequences, (length + kLanes - 1) / kLanes, {}, {}, 0, 0});
      found = phase.classes.end() - 1;
    }
    found->heads.push_back(head);
    found->groups.push_back(&group);
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
  item.group = c->groups[head];
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
