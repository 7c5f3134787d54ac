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
  Pass kind;
  uint64_t members;
  int64_t sequences, sequence_stride, stride;
  int packed_rows;
  bool sm90;                                         // whether warpgroups do it
  bool summary_keys;                                 // whether keys are a summary's, not all
  bool first, last, key_first, key_last, key_write;  // see Launch

  bool Alike(const PlannedPass& other) const {
    return kind == other.kind && sequences == other.sequences && sequence_stride == other.sequence_stride && stride == other.stride &&
           packed_rows == other.packed_rows && sm90 == other.sm90 && first == other.first && last == other.last &&
           key_first == other.key_first && key_last == other.key_last && key_write == other.key_write;
  }
};

constexpr int kPersistentColumns = 2048;  // columns that a row visits at the most where a block does not stop after one tile

constexpr int kTogether = 4;  // sequences of all heads for each multiprocessor from which on a sequence's tiles follow one another

class Planner {
 public:
  Planner(const stf_problem& problem, const Machine& machine) : problem_(problem), depths_(FindDepths(problem)), machine_(machine) {}

  Plan Make(bool backward) const {
    std::vector<std::deque<PlannedPass>> programs;
    for (int32_t p = 0; p < problem_.programs; p++) {
      programs.push_back(PassesOfProgram(p, backward));
      MarkEnds(&programs.back());
    }
    Plan plan;
    while (true) {  // programs go on together as long as their next passes are alike
      const auto front = std::find_if(programs.begin(), programs.end(), [](const auto& left) { return !left.empty(); });
      if (front == programs.end()) return plan;
      const PlannedPass pass = front->front();
      Launch launch = Begin(pass);
      for (int32_t p = 0; p < problem_.programs; p++) {
        if (programs[p].empty() || !programs[p].front().Alike(pass) || !Add(p, programs[p].front(), &launch)) continue;
        programs[p].pop_front();
      }
      End(pass, &launch);
      plan.push_back({pass.kind, launch});
    }
  }

 private:
  const stf_component* Components(int32_t program) const { return problem_.components + problem_.program_begin[program]; }
  int Count(int32_t program) const { return problem_.program_begin[program + 1] - problem_.program_begin[program]; }

  // Makes a pass over sequences of `length` positions a packed one, where they are short enough.
  void Pack(const stf_component& component, int64_t length, bool backward, PlannedPass* pass) const {
    pass->sm90 = machine_.sm90 && component.exclude == 0 && length <= kMaxPackedRows;
    pass->packed_rows =
        pass->sm90 ? static_cast<int>(length) : Sm80PackedRows(ElementBytes(problem_.dtype), kDepths[depths_], length, machine_.memory);
    if (pass->packed_rows) pass->kind = backward ? kPackedBackward : kPackedForward;
  }

  std::deque<PlannedPass> PassesOfProgram(int32_t program, bool backward) const {
    const stf_component* components = Components(program);
    const int64_t positions = problem_.positions;
    std::deque<PlannedPass> passes;
    for (const ComponentPass& from : PassesOf(components, Count(program))) {
      if (!from.strided) {
        // Nothing else but strided ones, and blocks that are the same in every document.
        const bool block = from.members == 1 && components[0].kind == STF_OWN_BLOCK && !(problem_.documents && Restarts(components[0]));
        const int64_t size = block ? std::min(components[0].a, positions) : positions;
        PlannedPass pass = {kForward, from.members, (positions + size - 1) / size, size, 1};
        if (block) Pack(components[0], size, backward, &pass);
        if (pass.packed_rows) {
          passes.push_back(pass);
        } else {
          AddPlain(program, from.members, backward, &passes);
        }
        continue;
      }
      const int64_t stride = std::min(from.stride, positions), length = (positions + stride - 1) / stride;
      PlannedPass pass = {kForward, from.members, stride, 1, stride};
      Pack(components[__builtin_ctzll(from.members)], length, backward, &pass);
      if (pass.packed_rows) {
        passes.push_back(pass);
        continue;
      }
      pass.sm90 = machine_.sm90;
      if (backward && InOnePass(program, from.members, length)) {
        pass.kind = kBackward;
        passes.push_back(pass);
      } else if (backward) {
        pass.kind = kQueryGrad;
        passes.push_back(pass);
        pass.kind = kKeyGrad;
        passes.push_back(pass);
      } else {
        passes.push_back(pass);
      }
    }
    return passes;
  }

  // Tiles of 64 queries that a block of kBackwardKeys keys of a component reaches at the most.
  static int64_t Reach(const stf_component& component, int64_t length) {
    const int64_t whole = (length + 63) / 64;
    if (component.kind == STF_LOCAL) return std::min(whole, (kBackwardKeys - 1 + component.a) / 64 + 1);
    if (component.kind == STF_OWN_BLOCK) return std::min(whole, (kBackwardKeys - 1 + component.a - 1) / 64 + 1);
    return whole;
  }

  // Whether a backward pass over sequences of `length` positions is one launch (sm90/backward.cuh).
  bool InOnePass(int32_t program, uint64_t members, int64_t length) const {
    if (!machine_.sm90 || members == 0 || (members & (members - 1)) != 0) return false;
    const stf_component& component = Components(program)[__builtin_ctzll(members)];
    if (component.kind == STF_SUMMARY || Irregular(component) || component.exclude != 0) return false;
    const Sm90BackwardTile tile = FindSm90BackwardTile(kDepths[depths_]);
    return tile.accumulators > 0 && Reach(component, length) <= tile.reach();
  }

  // All components over plain positions. Summaries number their keys in their own way, each.
  void AddPlain(int32_t program, uint64_t plain, bool backward, std::deque<PlannedPass>* passes) const {
    PlannedPass pass = {kForward, plain, 1, 0, 1, 0, machine_.sm90};
    if (!backward) {
      passes->push_back(pass);
      return;
    }
    const stf_component* components = Components(program);
    uint64_t summaries = 0;
    for (int t = 0; t < Count(program); t++) {
      if (components[t].kind == STF_SUMMARY) summaries |= uint64_t{1} << t;
    }
    const uint64_t others = plain & ~summaries;
    // Beside summaries a window alone is faster so, by measurement: an own block is not.
    const bool window = others && components[__builtin_ctzll(others)].kind == STF_LOCAL;
    if ((!summaries || window) && InOnePass(program, others, problem_.positions)) {
      pass.members = others;
      pass.kind = kBackward;
      passes->push_back(pass);
      if (!summaries) return;
      pass.members = summaries;
      pass.kind = kQueryGrad;
      passes->push_back(pass);
    } else {
      pass.kind = kQueryGrad;
      passes->push_back(pass);
      pass.members = others;
      pass.kind = kKeyGrad;
      passes->push_back(pass);  // even without a member: it writes the zeros that summaries add to
    }
    pass.kind = kKeyGrad;
    for (int t = 0; t < Count(program); t++) {
      if (components[t].kind != STF_SUMMARY) continue;
      pass.members = uint64_t{1} << t;
      pass.summary_keys = true;
      passes->push_back(pass);
    }
  }

  // Which passes are a program's first and last for its queries, and for its keys.
  static void MarkEnds(std::deque<PlannedPass>* passes) {
    PlannedPass *query = nullptr, *key = nullptr;
    for (PlannedPass& pass : *passes) {
      pass.first = pass.last = pass.key_first = pass.key_last = false;
      if (pass.kind != kKeyGrad) {
        pass.first = query == nullptr;
        query = &pass;
      }
      if (pass.kind == kKeyGrad || pass.kind == kBackward || pass.kind == kPackedBackward) {
        pass.key_first = key == nullptr;
        key = &pass;
      }
    }
    if (query) query->last = true;
    if (key) key->key_last = true;
    // A summary's pass has a few of the keys only, so that no pass before it can leave the writing to it.
    bool some = false;
    for (auto pass = passes->rbegin(); pass != passes->rend(); ++pass) {
      pass->key_write = pass->key_last || some;
      some = some || pass->summary_keys;
    }
  }

  Launch Begin(const PlannedPass& pass) const {
    Launch launch = {};
    launch.period = problem_.programs;
    launch.sequences = static_cast<int32_t>(pass.sequences);
    launch.sequence_stride = static_cast<int32_t>(pass.sequence_stride);
    launch.stride = static_cast<int32_t>(pass.stride);
    const bool blocks = pass.sequence_stride > 1;
    launch.longest = static_cast<int32_t>(blocks ? pass.sequence_stride : (problem_.positions + pass.stride - 1) / pass.stride);
    launch.first = pass.first;
    launch.last = pass.last;
    launch.key_first = pass.key_first;
    launch.key_last = pass.key_last;
    launch.key_write = pass.key_write;
    launch.packed_rows = pass.packed_rows;
    launch.sm90 = pass.sm90;
    return launch;
  }

  bool Add(int32_t program, const PlannedPass& pass, Launch* launch) const {
    const int count = Count(program), slot = launch->programs, begin = launch->component_count;
    if (slot == kMaxPrograms || begin + count > kMaxComponents) return false;
    for (int t = 0; t < count; t++) {
      const stf_component& from = Components(program)[t];
      launch->components[begin + t] = ComponentOf(from, problem_.positions);
      if (pass.members >> t & 1 && (Irregular(from) || from.exclude != 0)) launch->general = true;
    }
    if (pass.sequence_stride > 1 && pass.packed_rows) {  // own blocks, seen as sequences
      launch->components[begin] = {STF_STRIDED, 1, 0, 0, 0, 0, static_cast<uint64_t>(Components(program)[0].exclude)};
    }
    launch->members[slot] = pass.members;
    launch->begin[slot] = static_cast<int16_t>(begin);
    launch->number[slot] = program;
    launch->programs++;
    launch->component_count += count;
    return true;
  }

  void End(const PlannedPass& pass, Launch* launch) const {
    const int64_t heads = problem_.heads;
    int64_t most = 0, longest = 0;
    for (int slot = 0; slot < launch->programs; slot++) {
      longest = std::max(longest, Longest(*launch, slot, pass));
      most = std::max(most, (heads - launch->number[slot] + launch->period - 1) / launch->period);
    }
    launch->head_slots = static_cast<int32_t>(most * launch->programs);
    if (pass.packed_rows) {
      const int tile = pass.packed_rows <= 64 ? 64 : kMaxPackedRows;
      const int packs = pass.sm90 ? tile / pass.packed_rows : pass.packed_rows <= 32 ? 2 : 1;
      launch->tiles = static_cast<int32_t>((pass.sequences + packs - 1) / packs);
      return;
    }
    if (pass.kind == kBackward) return CutIntoRuns(launch);
    const int rows = TileRows(pass.kind, problem_.dtype, depths_, machine_);
    launch->tiles = static_cast<int32_t>((longest + rows - 1) / rows);
    launch->work_tiles = int64_t{launch->tiles} * launch->sequences * launch->head_slots * problem_.batch;
    launch->together = int64_t{launch->sequences} * launch->head_slots * problem_.batch >= kTogether * machine_.multiprocessors;
    launch->persistent = true;
    for (int slot = 0; slot < launch->programs; slot++) {
      for (uint64_t left = launch->members[slot]; left; left &= left - 1) {
        const Component& c = launch->components[launch->begin[slot] + __builtin_ctzll(left)];
        const bool bounded = c.kind == STF_LOCAL || c.kind == STF_OWN_BLOCK;
        if ((bounded ? c.a : launch->longest) > kPersistentColumns) launch->persistent = false;
      }
    }
  }

  // Cuts the keys of a backward pass in one into runs, so that the blocks of threads, one a multiprocessor, end together. A run walks
  // keys of the run before, too.
  void CutIntoRuns(Launch* launch) const {
    const int64_t blocks = (launch->longest + kBackwardKeys - 1) / kBackwardKeys;
    const int64_t sequences = int64_t{launch->sequences} * launch->head_slots * problem_.batch;
    int64_t reach = 0, least = INT64_MAX;
    for (int slot = 0; slot < launch->programs; slot++) {
      const stf_component* components = Components(launch->number[slot]);
      reach = std::max(reach, Reach(components[__builtin_ctzll(launch->members[slot])], launch->longest));
    }
    for (int64_t runs = 1; runs <= std::min<int64_t>(blocks, 4096); runs++) {
      const int64_t run = (blocks + runs - 1) / runs, work_tiles = (blocks + run - 1) / run * sequences;
      const int64_t rounds = (work_tiles + machine_.multiprocessors - 1) / machine_.multiprocessors;
      const int64_t time = rounds * (2 * run + (run < blocks ? reach / 2 : 0));
      if (time >= least) continue;
      least = time;
      launch->run = static_cast<int32_t>(run);
      launch->tiles = static_cast<int32_t>((blocks + run - 1) / run);
    }
    launch->work_tiles = launch->tiles * sequences;
    launch->persistent = true;
  }

  // Rows of a program's longest sequence of queries, or of its keys.
  int64_t Longest(const Launch& launch, int slot, const PlannedPass& pass) const {
    if (pass.kind != kKeyGrad || pass.members == 0) return launch.longest;
    const Component& c = launch.components[launch.begin[slot] + __builtin_ctzll(pass.members)];
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
      .Add(machine.sm90, machine.multiprocessors, backward, problem.documents != nullptr)
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
