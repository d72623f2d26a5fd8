// One layer's planner on the host: its state, made and checked, and what this thread plans with.
#pragma once

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "../residency.h"
#include "../slot_state.h"
#include "tensors.h"

namespace vep {

// Writes a fresh state: every slot free, every expert ABSENT. Throws std::invalid_argument with the numbers.
inline void init_layer(int64_t* words, int64_t num_experts, int64_t num_slots, int64_t top_k, int64_t policy) {
  if (num_experts < 1 || num_experts > 4096 || num_slots < 1 || num_slots > num_experts || top_k < 1 ||
      top_k > num_slots || policy < 0 || policy >= static_cast<int64_t>(Policy::kNumPolicies)) {
    throw std::invalid_argument("a cache of " + std::to_string(num_experts) + " experts (1 to 4096), " +
                                std::to_string(num_slots) + " slots (top-k to experts), top-k " +
                                std::to_string(top_k) + ", policy " + std::to_string(policy) +
                                " (its place in residency.POLICIES)");
  }
  std::memset(words, 0, sizeof(int64_t) * static_cast<size_t>(Layer::words(num_experts, num_slots)));
  words[kNumExperts] = num_experts;
  words[kNumSlots] = num_slots;
  words[kTopK] = top_k;
  words[kPolicy] = policy;
  words[kNumFree] = num_slots;
  const Layer layer(words);
  for (int64_t expert = 0; expert < num_experts; ++expert) layer.row_of()[expert] = kNone;
  for (int64_t row = 0; row < num_experts; ++row) layer.expert_in()[row] = kNone;
  for (int64_t slot = 0; slot < num_slots; ++slot) layer.free_slots()[slot] = num_slots - 1 - slot;
}

// Buffers of one thread, reused from step to step.
class Workspace {
 public:
  static Workspace& of_this_thread() {
    thread_local Workspace workspace;
    return workspace;
  }

  // Room for a step of this layer.
  void fit(const Layer& layer) {
    const int num_experts = layer.num_experts(), num_slots = layer.num_slots();
    const size_t bytes = static_cast<size_t>(Scratch::bytes(num_experts, num_slots));
    const size_t keys = (bytes + sizeof(VictimKey) - 1) / sizeof(VictimKey);
    if (memory_.size() < keys) memory_.resize(keys);
    scratch = Scratch::at(memory_.data(), num_experts, num_slots);
    if (loads_.size() < static_cast<size_t>(2 * num_experts)) loads_.resize(static_cast<size_t>(2 * num_experts));
    loads = loads_.data();
  }

  Scratch scratch;
  int32_t* loads = nullptr;  // (E, 2): (expert, row)

 private:
  std::vector<VictimKey> memory_;
  std::vector<int32_t> loads_;
};

// Routed ids of which the first `num_real` are those of tokens; the others are padding.
template <class Id>
struct RealIds {
  const Id* ids;
  int num_real;
  Id operator[](int i) const { return i < num_real ? ids[i] : Id{-1}; }
};

// Plans one step of `num_ids` routed ids and counts it, and writes the row of each into `rows`: see residency.h.
template <class Id>
StepCounts plan_on_host(const Layer& layer, SlotWords lane, const Id* routed, int num_ids, int num_real, Id* rows,
                        bool is_speculated, Workspace& work) {
  work.fit(layer);
  Alone team;
  const RealIds<Id> ids{routed, std::min(num_ids, num_real)};
  const StepCounts step = plan_step(team, layer, lane, ids, ids.num_real, work.scratch, work.loads);
  write_rows(team, layer, ids, routed, num_ids, rows, work.scratch);
  count_step(layer, step, is_speculated);
  return step;
}

// A larger cache of a layer that holds no records: what it would find is counted, and nothing is ever on its way to it.
struct Ghost {
  Layer layer;
  int64_t* mirror;  // kHeaderWords

  void show() const { std::memcpy(mirror, layer.header, sizeof(int64_t) * kHeaderWords); }

  template <class Ids>
  void serve(const Ids& ids, int num_ids, bool is_speculated, Workspace& work) const {
    struct {
      bool landed(int) const { return true; }
      bool drop(int) const { return false; }
    } lane;
    work.fit(layer);
    Alone team;
    count_step(layer, plan_step(team, layer, lane, ids, num_ids, work.scratch, work.loads), is_speculated);
    show();
  }
};

}  // namespace vep
