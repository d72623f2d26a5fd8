// Plans of one layer's steps on the host: narrow ones as on the device, and wide ones, which only the host splits.
#pragma once

#include <cstdint>
#include <vector>

#include "../residency.h"

namespace vep {

// A plan as int32 words: the head, then its waves. A wave is [num_experts, num_loads, num_late, num_rows or -1], then
// its experts, their slots, its loads (expert, slot, victim), its late experts and its rows.
enum PlanWord : int {
  kPlanSplit,
  kPlanNumWaves,
  kPlanHits,
  kPlanLate,
  kPlanMisses,
  kPlanEvictions,
  kPlanUsed,
  kPlanUnused,
  kPlanDisplaced,
  kPlanHeadWords,
};

// Where prefetches of a layer stand. The planner asks; whoever copies answers.
class CopyLane {
 public:
  virtual ~CopyLane() = default;
  virtual bool landed(int slot) = 0;
  // Cancels the copy into `slot` unless it has started; whether it was in time.
  virtual bool drop(int slot) = 0;
};

// Buffers of one thread, reused from step to step.
class Workspace {
 public:
  // Room for a layer and a step of `num_ids` entries.
  void fit(const Layer& layer, int num_ids);

  Scratch scratch;
  WaveLists lists;
  std::vector<int32_t> plan;

 private:
  std::vector<VictimKey> memory_;
  std::vector<int32_t> lists_;
};

// Writes a fresh state: every slot free, every expert ABSENT. Throws std::invalid_argument with the numbers.
void init_layer(int64_t* words, int64_t num_experts, int64_t num_slots, int64_t top_k, int64_t policy,
                int64_t max_token_waves, bool has_stream);

// Puts experts 0 to C - 1 into slots 0 to C - 1, as cold residents, in a layer whose slots are all free.
void fill_layer(const Layer& layer);

// Plans one step of `num_tokens` x top_k ids and leaves the plan in `work.plan`; see plan_narrow. `slot_ids` is written
// for narrow steps only. Returns a Split >= 0, or kMustSettle when every prefetch has to land first.
template <class Id>
Split plan_step(const Layer& layer, CopyLane& lane, const Id* ids, int num_ids, Id* slot_ids, Workspace& work);

// Plans a prefetch and leaves (expert, slot, victim) triples behind [num_loads, num_evictions, num_unused] in
// `work.plan`. Returns the number of loads; their pairs (expert, slot) are in `work.lists.loads`.
template <class Id>
int plan_prefetch_step(const Layer& layer, CopyLane& lane, const Id* predicted, int num_predicted, int budget,
                       Workspace& work);

}  // namespace vep
