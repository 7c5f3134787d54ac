#include "custom_ops/attention/cuda/plan.h"

#include <algorithm>
#include <deque>

#include "custom_ops/attention/cuda/cache.h"
#include "custom_ops/attention/passes.h"

namespace stf {
namespace cuda {
namespace {

// A pass of one program over some of its components, whose queries (or, in the pass over keys, whose keys) share a numbering.
struct PlannedPass {
  Pass pass;
  uint64_t members;
  int64_t sequences, sequence_step, step;
  int packed_rows;
  bool sm90;                                         // whether warpgroups do it
  bool summary_keys;                                 // whether keys are a summary's, not all
  bool first, last, key_first, key_last, key_write;  // see Launch

  bool Alike(const PlannedPass& other) const {
    return pass == other.pass && sequences == other.sequences && sequence_step == other.sequence_step && step == other.step &&
           packed_rows == other.packed_rows && sm90 == other.sm90 && first == other.first && last == other.last &&
           key_first == other.key_first && key_last == other.key_last && key_write == other.key_write;
  }
};

constexpr int kPersistentColumns = 2048;  // columns that a row visits at the most where a block does not stop after one tile

class Planner {
 public:
  Planner(const stf_problem& problem, const Machine& machine) : problem_(problem), depths_(FindDepths(problem)), machine_(machine) {}

  Plan Make(bool backward) const {
    std::vector<std::deque<PlannedPass>> steps;
    for (int32_t p = 0; p < problem_.programs; p++) {
      steps.push_back(StepsOf(p, backward));
      MarkEnds(&steps.back());
    }
    Plan plan;
    while (true) {  // programs go on together as long as their next steps are alike
      const auto front = std::find_if(steps.begin(), steps.end(), [](const auto& s) { return !s.empty(); });
      if (front == steps.end()) return plan;
      const PlannedPass step = front->front();
      Launch launch = Begin(step);
      for (int32_t p = 0; p < problem_.programs; p++) {
        if (steps[p].empty() || !steps[p].front().Alike(step) || !Add(p, steps[p].front(), &launch)) continue;
        steps[p].pop_front();
      }
      End(step, &launch);
      plan.push_back({step.pass, launch});
    }
  }

 private:
  const stf_component* Components(int32_t program) const { return problem_.components + problem_.program_begin[program]; }
  int Count(int32_t program) const { return problem_.program_begin[program + 1] - problem_.program_begin[program]; }

  // Makes a step over sequences of `length` positions a packed one, where they are short enough.
  void Pack(const stf_component& component, int64_t length, bool backward, PlannedPass* step) const {
    step->sm90 = machine_.sm90 && component.exclude == 0 && length <= kMaxPackedRows;
    step->packed_rows =
        step->sm90 ? static_cast<int>(length) : Sm80PackedRows(ElementBytes(problem_.dtype), kDepths[depths_], length, machine_.memory);
    if (step->packed_rows) step->pass = backward ? kPackedBackward : kPackedForward;
  }

  std::deque<PlannedPass> StepsOf(int32_t program, bool backward) const {
    const stf_component* components = Components(program);
    const int64_t positions = problem_.positions;
    std::deque<PlannedPass> steps;
    for (const ComponentPass& pass : PassesOf(components, Count(program))) {
      if (!pass.strided) {
        const bool block = pass.members == 1 && components[0].kind == STF_OWN_BLOCK;  // and nothing else but strided ones
        const int64_t size = block ? std::min(components[0].a, positions) : positions;
        PlannedPass step = {kForward, pass.members, (positions + size - 1) / size, size, 1};
        if (block) Pack(components[0], size, backward, &step);
        if (step.packed_rows) {
          steps.push_back(step);
        } else {
          AddPlain(program, pass.members, backward, &steps);
        }
        continue;
      }
      const int64_t stride = std::min(pass.stride, positions), length = (positions + stride - 1) / stride;
      PlannedPass step = {kForward, pass.members, stride, 1, stride};
      Pack(components[__builtin_ctzll(pass.members)], length, backward, &step);
      if (step.packed_rows) {
        steps.push_back(step);
        continue;
      }
      step.sm90 = machine_.sm90;
      if (backward) {
        step.pass = kQueryGrad;
        steps.push_back(step);
        step.pass = kKeyGrad;
        steps.push_back(step);
      } else {
        steps.push_back(step);
      }
    }
    return steps;
  }

  // All components over plain positions. Summaries number their keys in their own way, each.
  void AddPlain(int32_t program, uint64_t plain, bool backward, std::deque<PlannedPass>* steps) const {
    PlannedPass step = {kForward, plain, 1, 0, 1, 0, machine_.sm90};
    if (!backward) {
      steps->push_back(step);
      return;
    }
    step.pass = kQueryGrad;
    steps->push_back(step);
    step.pass = kKeyGrad;
    const stf_component* components = Components(program);
    for (int t = 0; t < Count(program); t++) {
      if (components[t].kind == STF_SUMMARY) step.members &= ~(uint64_t{1} << t);
    }
    steps->push_back(step);  // even without a member: it writes the zeros that summaries add to
    for (int t = 0; t < Count(program); t++) {
      if (components[t].kind != STF_SUMMARY) continue;
      step.members = uint64_t{1} << t;
      step.summary_keys = true;
      steps->push_back(step);
    }
  }

  // Which steps are a program's first and last for its queries, and for its keys.
  static void MarkEnds(std::deque<PlannedPass>* steps) {
    PlannedPass *query = nullptr, *key = nullptr;
    for (PlannedPass& step : *steps) {
      step.first = step.last = step.key_first = step.key_last = false;
      if (step.pass != kKeyGrad) {
        step.first = query == nullptr;
        query = &step;
      }
      if (step.pass == kKeyGrad || step.pass == kPackedBackward) {
        step.key_first = key == nullptr;
        key = &step;
      }
    }
    if (query) query->last = true;
    if (key) key->key_last = true;
    // A summary's step has a few of the keys only, so that no step before it can leave the writing to it.
    bool some = false;
    for (auto step = steps->rbegin(); step != steps->rend(); ++step) {
      step->key_write = step->key_last || some;
      some = some || step->summary_keys;
    }
  }

  Launch Begin(const PlannedPass& step) const {
    Launch launch = {};
    launch.period = problem_.programs;
    launch.sequences = static_cast<int32_t>(step.sequences);
    launch.sequence_step = static_cast<int32_t>(step.sequence_step);
    launch.step = static_cast<int32_t>(step.step);
    const bool blocks = step.sequence_step > 1;
    launch.longest = static_cast<int32_t>(blocks ? step.sequence_step : (problem_.positions + step.step - 1) / step.step);
    launch.first = step.first;
    launch.last = step.last;
    launch.key_first = step.key_first;
    launch.key_last = step.key_last;
    launch.key_write = step.key_write;
    launch.packed_rows = step.packed_rows;
    launch.sm90 = step.sm90;
    return launch;
  }

  bool Add(int32_t program, const PlannedPass& step, Launch* launch) const {
    const int count = Count(program), slot = launch->programs, begin = launch->component_count;
    if (slot == kMaxPrograms || begin + count > kMaxComponents) return false;
    for (int t = 0; t < count; t++) {
      const stf_component& from = Components(program)[t];
      launch->components[begin + t] = ComponentOf(from, problem_.positions);
      if (step.members >> t & 1 && (from.kind == STF_BLOCKS || from.exclude != 0)) launch->general = true;
    }
    if (step.sequence_step > 1 && step.packed_rows) {  // own blocks, seen as sequences
      launch->components[begin] = {STF_STRIDED, 1, 0, 0, 0, 0, static_cast<uint64_t>(Components(program)[0].exclude)};
    }
    launch->members[slot] = step.members;
    launch->begin[slot] = static_cast<int16_t>(begin);
    launch->number[slot] = program;
    launch->programs++;
    launch->component_count += count;
    return true;
  }

  void End(const PlannedPass& step, Launch* launch) const {
    const int64_t heads = problem_.heads;
    int64_t most = 0, longest = 0;
    for (int slot = 0; slot < launch->programs; slot++) {
      longest = std::max(longest, Longest(*launch, slot, step));
      most = std::max(most, (heads - launch->number[slot] + launch->period - 1) / launch->period);
    }
    launch->head_slots = static_cast<int32_t>(most * launch->programs);
    if (step.packed_rows) {
      const int tile = step.packed_rows <= 64 ? 64 : kMaxPackedRows;
      const int packs = step.sm90 ? tile / step.packed_rows : step.packed_rows <= 32 ? 2 : 1;
      launch->tiles = static_cast<int32_t>((step.sequences + packs - 1) / packs);
      return;
    }
    const int rows = TileRows(step.pass, problem_.dtype, depths_, machine_);
    launch->tiles = static_cast<int32_t>((longest + rows - 1) / rows);
    launch->work_tiles = int64_t{launch->tiles} * launch->sequences * launch->head_slots * problem_.batch;
    launch->persistent = true;
    for (int slot = 0; slot < launch->programs; slot++) {
      for (uint64_t left = launch->members[slot]; left; left &= left - 1) {
        const Component& c = launch->components[launch->begin[slot] + __builtin_ctzll(left)];
        const bool bounded = c.kind == STF_LOCAL || c.kind == STF_OWN_BLOCK;
        if ((bounded ? c.a : launch->longest) > kPersistentColumns) launch->persistent = false;
      }
    }
  }

  // Rows of a program's longest sequence of queries, or of its keys.
  int64_t Longest(const Launch& launch, int slot, const PlannedPass& step) const {
    if (step.pass != kKeyGrad || step.members == 0) return launch.longest;
    const Component& c = launch.components[launch.begin[slot] + __builtin_ctzll(step.members)];
    if (c.kind != STF_SUMMARY) return launch.longest;
    return (problem_.positions / c.a + 1) * (c.c - c.b);
  }

  const stf_problem& problem_;
  const int depths_;
  const Machine machine_;
};

}  // namespace

int LaunchesOf(const stf_problem& problem, bool backward) {
  int most = 0;
  for (int32_t p = 0; p < problem.programs; p++) {
    const stf_component* components = problem.components + problem.program_begin[p];
    const int count = problem.program_begin[p + 1] - problem.program_begin[p];
    int launches = static_cast<int>(PassesOf(components, count).size());
    const auto summary = [](const stf_component& c) { return c.kind == STF_SUMMARY; };
    if (backward) launches += static_cast<int>(std::count_if(components, components + count, summary));  // its keys have their own
    most = std::max(most, launches);
  }
  return most;
}

std::shared_ptr<const Plan> PlanOf(const stf_problem& problem, const Machine& machine, bool backward) {
  static Cache<Plan, 1024> plans;
  Key key;
  key.Add(problem.batch, problem.positions, problem.heads, int64_t{FindDepths(problem)}, problem.dtype, machine.memory)
      .Add(machine.sm90, backward)
      .AddAll(problem.program_begin, problem.programs + 1)
      .AddAll(problem.components + problem.program_begin[0], problem.program_begin[problem.programs] - problem.program_begin[0]);
  std::shared_ptr<const Plan> plan;
  plans.Get(key, &plan, [&](Plan* made) {
    *made = Planner(problem, machine).Make(backward);
    return 0;
  });
  return plan;
}

}  // namespace cuda
}  // namespace stf
