#include "wide_plan.h"

#include <algorithm>
#include <cstdint>
#include <optional>
#include <string>
#include <unordered_map>
#include <vector>

namespace vep {
namespace {

using Experts = std::vector<int32_t>;

// A set of experts.
class Mask {
 public:
  explicit Mask(int num_experts) : words_(static_cast<size_t>(num_experts + 63) / 64, 0) {}

  void add(int expert) { words_[static_cast<size_t>(expert / 64)] |= 1ull << (expert % 64); }
  bool has(int expert) const { return words_[static_cast<size_t>(expert / 64)] >> (expert % 64) & 1; }
  bool empty() const {
    return std::all_of(words_.begin(), words_.end(), [](uint64_t word) { return word == 0; });
  }
  bool within(const Mask& other) const {
    for (size_t i = 0; i < words_.size(); ++i) {
      if (words_[i] & ~other.words_[i]) return false;
    }
    return true;
  }
  int size_with(const Mask& other) const {
    int size = 0;
    for (size_t i = 0; i < words_.size(); ++i) size += __builtin_popcountll(words_[i] | other.words_[i]);
    return size;
  }
  void unite(const Mask& other) {
    for (size_t i = 0; i < words_.size(); ++i) words_[i] |= other.words_[i];
  }
  Experts members() const {
    Experts found;
    for (int expert = 0; expert < static_cast<int>(64 * words_.size()); ++expert) {
      if (has(expert)) found.push_back(expert);
    }
    return found;
  }
  std::string key() const { return {reinterpret_cast<const char*>(words_.data()), 8 * words_.size()}; }

 private:
  std::vector<uint64_t> words_;
};

// Tokens that need the same experts, or a wave of them.
struct Group {
  Mask experts;
  std::vector<int32_t> rows;
};

template <class Id>
std::vector<Group> kinds_of_token(const Layer& layer, const Id* ids, int num_ids) {
  std::vector<Group> kinds;
  std::unordered_map<std::string, size_t> index_of;
  const int top_k = static_cast<int>(layer.header[kTopK]);
  for (int start = 0, row = 0; start < num_ids; start += top_k, ++row) {
    Mask mask(layer.num_experts());
    for (int i = start; i < std::min(start + top_k, num_ids); ++i) {
      if (ids[i] >= 0 && ids[i] < layer.num_experts()) mask.add(static_cast<int>(ids[i]));
    }
    if (mask.empty()) continue;
    const auto [place, is_new] = index_of.try_emplace(mask.key(), kinds.size());
    if (is_new) kinds.push_back({mask, {}});
    kinds[place->second].rows.push_back(row);
  }
  return kinds;
}

// First fit, at most C experts each; the first group is what the resident experts can serve.
std::optional<std::vector<Group>> group_tokens(const Layer& layer, const std::vector<Group>& kinds) {
  Mask resident(layer.num_experts());
  for (int slot = 0; slot < layer.num_slots(); ++slot) {
    if (layer.expert_in()[slot] != kNone) resident.add(static_cast<int>(layer.expert_in()[slot]));
  }
  std::vector<Group> groups;
  Group covered{Mask(layer.num_experts()), {}};
  for (const Group& kind : kinds) {
    if (!kind.experts.within(resident)) continue;
    covered.experts.unite(kind.experts);
    covered.rows.insert(covered.rows.end(), kind.rows.begin(), kind.rows.end());
  }
  std::sort(covered.rows.begin(), covered.rows.end());
  if (!covered.rows.empty()) groups.push_back(covered);
  for (const Group& kind : kinds) {
    if (kind.experts.within(resident)) continue;
    auto fitting = std::find_if(groups.begin(), groups.end(), [&](const Group& group) {
      return group.experts.size_with(kind.experts) <= layer.num_slots();
    });
    if (fitting == groups.end()) {
      if (static_cast<int64_t>(groups.size()) == layer.header[kMaxTokenWaves]) return std::nullopt;
      groups.push_back(kind);
    } else {
      fitting->experts.unite(kind.experts);
      fitting->rows.insert(fitting->rows.end(), kind.rows.begin(), kind.rows.end());
    }
  }
  return groups;
}

// Writes the waves of one plan, one after another, into the workspace.
class Writer {
 public:
  Writer(const Layer& layer, Workspace& work, Split split) : layer_(layer), work_(work) {
    work_.plan.assign(kPlanHeadWords, 0);
    work_.plan[kPlanSplit] = split;
  }

  // Brings what is absent of `experts`, evicting nothing in `kept`, and writes the wave. The loads rank as cold.
  void bring(const Experts& experts, const std::vector<int32_t>* rows, const Mask* kept) {
    Scratch& scratch = work_.scratch;
    for (int expert = 0; expert < layer_.num_experts(); ++expert) {
      scratch.first[expert] = kept && kept->has(expert) ? 0 : kNever;
    }
    int num_loads = 0;
    for (const int32_t expert : experts) {
      scratch.first[expert] = 0;
      if (layer_.slot_of()[expert] == kNone) work_.lists.loads[2 * num_loads++] = expert;
    }
    const int num_free = static_cast<int>(layer_.header[kNumFree]);
    const int num_evictions = std::max(0, num_loads - num_free);
    Alone team;
    if (num_evictions) choose_victims(team, layer_, scratch, num_evictions);
    for (int m = 0; m < num_loads; ++m) work_.plan[kPlanUnused] += place(layer_, scratch, work_.lists, m);
    layer_.header[kNumFree] -= num_loads - num_evictions;
    for (int m = 0; m < num_loads; ++m) layer_.rank_cold(work_.lists.loads[2 * m], m);
    layer_.header[kColdTick] -= num_loads;
    last_loads_.assign(work_.lists.loads, work_.lists.loads + 2 * num_loads);

    head(experts.size(), num_loads, 0, rows ? static_cast<int32_t>(rows->size()) : kNone);
    put(experts);
    for (const int32_t expert : experts) work_.plan.push_back(static_cast<int32_t>(layer_.slot_of()[expert]));
    for (int m = 0; m < num_loads; ++m) {
      put({work_.lists.loads[2 * m], work_.lists.loads[2 * m + 1], work_.lists.victims[m]});
    }
    if (rows) put(*rows);
    work_.plan[kPlanHits] += static_cast<int32_t>(experts.size()) - num_loads;
    work_.plan[kPlanMisses] += num_loads;
    work_.plan[kPlanEvictions] += num_evictions;
  }

  void stream(const Experts& experts, const Experts& absent, const Experts& late) {
    head(experts.size(), static_cast<int>(absent.size()), static_cast<int>(late.size()), kNone);
    put(experts);
    for (const int32_t expert : experts) work_.plan.push_back(static_cast<int32_t>(layer_.slot_of()[expert]));
    for (const int32_t expert : absent) put({expert, expert, kNone});
    put(late);
    work_.plan[kPlanHits] = static_cast<int32_t>(experts.size() - absent.size() - late.size());
    work_.plan[kPlanLate] = static_cast<int32_t>(late.size());
    work_.plan[kPlanMisses] = static_cast<int32_t>(absent.size());
  }

  // Every resident expert but those of the last wave's loads; nothing when there is no such wave.
  std::optional<Mask> all_but_last_loads() const {
    if (last_loads_.empty()) return std::nullopt;
    Mask kept(layer_.num_experts());
    for (int slot = 0; slot < layer_.num_slots(); ++slot) {
      const int expert = static_cast<int>(layer_.expert_in()[slot]);
      bool is_last = false;
      for (size_t i = 0; i < last_loads_.size(); i += 2) is_last |= last_loads_[i] == expert;
      if (expert != kNone && !is_last) kept.add(expert);
    }
    return kept;
  }

 private:
  void head(size_t num_experts, int num_loads, int num_late, int num_rows) {
    work_.plan[kPlanNumWaves] += 1;
    put({static_cast<int32_t>(num_experts), num_loads, num_late, num_rows});
  }
  void put(const std::vector<int32_t>& words) { work_.plan.insert(work_.plan.end(), words.begin(), words.end()); }

  const Layer& layer_;
  Workspace& work_;
  std::vector<int32_t> last_loads_;
};

void plan_stream(const Layer& layer, const Experts& needed, Writer& writer) {
  Experts absent, late;
  for (const int32_t expert : needed) {
    if (layer.slot_of()[expert] == kNone) absent.push_back(expert);
    if (layer.flags()[expert] & kInFlight) late.push_back(expert);
  }
  writer.stream(needed, absent, late);
  for (const int32_t expert : late) {
    layer.rank_cold(expert, 0);
    layer.header[kColdTick] -= 1;
    layer.header[kNumInFlight] -= 1;
  }
}

// First what is resident, where it lies; then the rest through at most half of the slots.
void plan_by_experts(const Layer& layer, const Experts& needed, Writer& writer) {
  Experts present, absent;
  for (const int32_t expert : needed) (layer.slot_of()[expert] == kNone ? absent : present).push_back(expert);
  if (!present.empty()) writer.bring(present, nullptr, nullptr);
  const size_t window = std::max<size_t>(1, static_cast<size_t>(layer.num_slots()) / 2);
  for (size_t start = 0; start < absent.size(); start += window) {
    const auto begin = absent.begin() + static_cast<int64_t>(start);
    const Experts chunk(begin, begin + static_cast<int64_t>(std::min(window, absent.size() - start)));
    const std::optional<Mask> kept = writer.all_but_last_loads();
    writer.bring(chunk, nullptr, kept ? &*kept : nullptr);
  }
}

}  // namespace

template <class Id>
Split plan_wide(const Layer& layer, const Id* ids, int num_ids, Workspace& work) {
  const bool has_stream = layer.header[kHasStream] != 0;
  if (!has_stream && layer.header[kNumInFlight] > 0) return kMustSettle;
  Experts needed;
  int num_used = 0, num_displaced = 0;
  for (int i = 0; i < num_ids; ++i) {
    if (!is_first(layer, ids, i, work.scratch)) continue;
    const int32_t expert = static_cast<int32_t>(ids[i]);
    needed.push_back(expert);
    num_used += (layer.flags()[expert] & kUntouched) != 0;
    num_displaced += (layer.flags()[expert] & kDisplaced) != 0;
    layer.flags()[expert] &= ~static_cast<int64_t>(kUntouched | kDisplaced);
  }
  Split split = kSplitStream;
  std::optional<std::vector<Group>> groups;
  if (!has_stream) {
    if (layer.header[kMaxTokenWaves]) groups = group_tokens(layer, kinds_of_token(layer, ids, num_ids));
    split = groups ? kSplitTokens : kSplitExperts;
  }
  Writer writer(layer, work, split);
  work.plan[kPlanUsed] = num_used;
  work.plan[kPlanDisplaced] = num_displaced;
  if (split == kSplitStream) plan_stream(layer, needed, writer);
  if (split == kSplitExperts) plan_by_experts(layer, needed, writer);
  if (groups) {
    for (const Group& group : *groups) writer.bring(group.experts.members(), &group.rows, nullptr);
  }
  StepCounts step;
  step.num_needed = static_cast<int>(needed.size());
  step.num_hits = work.plan[kPlanHits];
  step.num_late = work.plan[kPlanLate];
  step.num_misses = work.plan[kPlanMisses];
  step.num_evictions = work.plan[kPlanEvictions];
  step.num_used = num_used;
  step.num_unused = work.plan[kPlanUnused];
  step.num_displaced = num_displaced;
  count_step(layer, step);
  if (split == kSplitStream) {
    layer.header[kStreamSteps] += 1;
    layer.header[kStreamMisses] += step.num_misses;
  }
  return split;
}

template Split plan_wide(const Layer&, const int32_t*, int, Workspace&);
template Split plan_wide(const Layer&, const int64_t*, int, Workspace&);

}  // namespace vep
