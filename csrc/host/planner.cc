#include "planner.h"

#include <cstring>
#include <stdexcept>
#include <string>

#include "wide_plan.h"

namespace vep {

void Workspace::fit(const Layer& layer, int num_ids) {
  const int num_experts = layer.num_experts(), num_slots = layer.num_slots();
  const size_t bytes = static_cast<size_t>(Scratch::bytes(num_experts, num_slots));
  const size_t keys = (bytes + sizeof(VictimKey) - 1) / sizeof(VictimKey);
  if (memory_.size() < keys) memory_.resize(keys);
  scratch = Scratch::at(memory_.data(), num_experts, num_slots);
  const int items = num_ids < num_experts ? num_ids : num_experts;
  if (lists_.size() < static_cast<size_t>(5 * items)) lists_.resize(static_cast<size_t>(5 * items));
  int32_t* list = lists_.data();
  lists = {list, list + items, list + 3 * items, list + 4 * items};
}

void init_layer(int64_t* words, int64_t num_experts, int64_t num_slots, int64_t top_k, int64_t policy,
                int64_t max_token_waves, bool has_stream) {
  if (num_experts < 1 || num_experts > 4096 || num_slots < 1 || num_slots > num_experts || top_k < 1 ||
      top_k > num_slots || policy < 0 || policy > 2 || max_token_waves < 0) {
    throw std::invalid_argument("planner of " + std::to_string(num_experts) + " experts (1 to 4096), " +
                                std::to_string(num_slots) + " slots (top-k to experts), top-k " +
                                std::to_string(top_k) + ", policy " + std::to_string(policy) +
                                " (0 lru, 1 lfu, 2 lfru), " + std::to_string(max_token_waves) + " token waves");
  }
  std::memset(words, 0, sizeof(int64_t) * static_cast<size_t>(Layer::words(num_experts, num_slots)));
  const Layer layer{words};
  words[kNumExperts] = num_experts;
  words[kNumSlots] = num_slots;
  words[kTopK] = top_k;
  words[kPolicy] = policy;
  words[kMaxTokenWaves] = max_token_waves;
  words[kHasStream] = has_stream;
  words[kNumFree] = num_slots;
  for (int64_t expert = 0; expert < num_experts; ++expert) layer.slot_of()[expert] = kNone;
  for (int64_t slot = 0; slot < num_slots; ++slot) {
    layer.expert_in()[slot] = kNone;
    layer.free_slots()[slot] = num_slots - 1 - slot;
  }
}

void fill_layer(const Layer& layer) {
  if (layer.header[kNumFree] != layer.num_slots()) throw std::invalid_argument("only an empty layer can be filled");
  for (int slot = 0; slot < layer.num_slots(); ++slot) {
    layer.slot_of()[slot] = slot;
    layer.expert_in()[slot] = slot;
    layer.rank_cold(slot, slot);
  }
  layer.header[kColdTick] -= layer.num_slots();
  layer.header[kNumFree] = 0;
}

namespace {

void write_narrow(const Layer& layer, const StepCounts& step, Workspace& work) {
  auto& plan = work.plan;
  const bool any = step.num_needed > 0;
  const int words = any ? 4 + 2 * step.num_needed + 3 * step.num_misses + step.num_late : 0;
  plan.resize(static_cast<size_t>(kPlanHeadWords + words));
  int32_t* out = plan.data();
  out[kPlanSplit] = kSplitNone;
  out[kPlanNumWaves] = any;
  out[kPlanHits] = step.num_hits;
  out[kPlanLate] = step.num_late;
  out[kPlanMisses] = step.num_misses;
  out[kPlanEvictions] = step.num_evictions;
  out[kPlanUsed] = step.num_used;
  out[kPlanUnused] = step.num_unused;
  out[kPlanDisplaced] = step.num_displaced;
  if (!any) return;
  out += kPlanHeadWords;
  *out++ = step.num_needed;
  *out++ = step.num_misses;
  *out++ = step.num_late;
  *out++ = kNone;
  for (int i = 0; i < step.num_needed; ++i) *out++ = work.lists.experts[i];
  for (int i = 0; i < step.num_needed; ++i) *out++ = static_cast<int32_t>(layer.slot_of()[work.lists.experts[i]]);
  for (int m = 0; m < step.num_misses; ++m) {
    *out++ = work.lists.loads[2 * m];
    *out++ = work.lists.loads[2 * m + 1];
    *out++ = work.lists.victims[m];
  }
  for (int i = 0; i < step.num_late; ++i) *out++ = work.lists.late[i];
}

}  // namespace

template <class Id>
Split plan_step(const Layer& layer, CopyLane& lane, const Id* ids, int num_ids, Id* slot_ids, Workspace& work) {
  work.fit(layer, num_ids);
  Alone team;
  StepCounts step;
  const Split split = plan_narrow(team, layer, lane, ids, num_ids, slot_ids, work.scratch, work.lists, &step);
  if (split == kSplitNone) {
    write_narrow(layer, step, work);
    count_step(layer, step);
    return split;
  }
  if (split == kMustSettle) return split;
  return plan_wide(layer, ids, num_ids, work);
}

template <class Id>
int plan_prefetch_step(const Layer& layer, CopyLane& lane, const Id* predicted, int num_predicted, int budget,
                       Workspace& work) {
  work.fit(layer, num_predicted);
  Alone team;
  StepCounts step;
  const int num_loads =
      plan_prefetch(team, layer, lane, predicted, num_predicted, budget, work.scratch, work.lists, &step);
  work.plan.assign({num_loads, step.num_evictions, step.num_unused});
  for (int m = 0; m < num_loads; ++m) {
    work.plan.push_back(work.lists.loads[2 * m]);
    work.plan.push_back(work.lists.loads[2 * m + 1]);
    work.plan.push_back(work.lists.victims[m]);
  }
  return num_loads;
}

template Split plan_step(const Layer&, CopyLane&, const int32_t*, int, int32_t*, Workspace&);
template Split plan_step(const Layer&, CopyLane&, const int64_t*, int, int64_t*, Workspace&);
template int plan_prefetch_step(const Layer&, CopyLane&, const int32_t*, int, int, Workspace&);
template int plan_prefetch_step(const Layer&, CopyLane&, const int64_t*, int, int, Workspace&);

}  // namespace vep
