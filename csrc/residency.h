// Which expert of one MoE layer is where, for host and device: the decisions of vllm_expert_prefetch/residency, which is
// the specification, on flat integer arrays.
//
// Every function here is run by a team: one thread on the host, a block of threads on a GPU. Lanes of a team see each
// other's writes after `sync()`, and results do not depend on the team's size. A team has
//   rank(), size(), sync(), sum(value, &total): the exclusive prefix sum over lanes, and the total for everyone.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define VEP_HD __host__ __device__
#else
#define VEP_HD
#endif

#if !defined(__CUDA_ARCH__)
#include <algorithm>
#endif

namespace vep {

constexpr int kNone = -1;
constexpr int kNever = 0x7fffffff;

enum class Policy : int64_t { kLru = 0, kLfu = 1, kLfru = 2 };

// How a step is served; negative: not planned. The values are those of residency.Split.
enum Split : int { kSplitNone = 0, kSplitTokens = 1, kSplitExperts = 2, kSplitStream = 3, kMustSettle = -1, kWide = -2 };

// The words in front of a layer's state.
enum Word : int {
  kNumExperts,
  kNumSlots,
  kTopK,
  kPolicy,
  kMaxTokenWaves,
  kHasStream,
  kTick,      // touches so far
  kColdTick,  // minus the number of cold insertions so far
  kNumFree,
  kNumInFlight,
  // Totals since the start.
  kSteps,
  kHits,
  kLate,
  kMisses,
  kEvictions,
  kUsed,
  kUnused,
  kDisplacedHits,  // misses on experts that a prefetch had evicted
  kIssued,
  kCancelled,
  kOutOfRange,  // routed ids >= num_experts, which are ignored
  kStreamSteps,   // of the steps, those that were streamed
  kStreamMisses,  // of the misses, those of streamed steps
  kClaimed,       // of the late ones, those whose copy had not started: the step copied them (counted on a GPU only)
  kHeaderWords = 24,
};

// kUntouched: brought by a prefetch, needed by no step yet. kDisplaced: evicted by a prefetch, not needed since.
enum Flag : int64_t { kRanked = 1, kCold = 2, kInFlight = 4, kUntouched = 8, kDisplaced = 16 };

// A view of one layer's state: `words(E, C)` int64 words, all of it in one allocation.
struct Layer {
  int64_t* header;

  VEP_HD static int64_t words(int64_t num_experts, int64_t num_slots) {
    return kHeaderWords + 4 * num_experts + 2 * num_slots;
  }
  VEP_HD int num_experts() const { return static_cast<int>(header[kNumExperts]); }
  VEP_HD int num_slots() const { return static_cast<int>(header[kNumSlots]); }
  VEP_HD Policy policy() const { return static_cast<Policy>(header[kPolicy]); }
  VEP_HD int64_t* slot_of() const { return header + kHeaderWords; }             // (E): slot or -1
  VEP_HD int64_t* flags() const { return slot_of() + header[kNumExperts]; }     // (E): bits of Flag
  VEP_HD int64_t* last() const { return flags() + header[kNumExperts]; }        // (E): tick of the last touch
  VEP_HD int64_t* count() const { return last() + header[kNumExperts]; }        // (E): touches, kept after eviction
  VEP_HD int64_t* expert_in() const { return count() + header[kNumExperts]; }   // (C): expert or -1
  VEP_HD int64_t* free_slots() const { return expert_in() + header[kNumSlots]; }  // (C): a stack of num_free slots

  VEP_HD void rank_cold(int64_t expert, int64_t order) const {
    // lru puts a cold expert in front of all others; the frequency policies note the tick.
    last()[expert] = policy() == Policy::kLru ? header[kColdTick] - 1 - order : header[kTick];
    flags()[expert] = (flags()[expert] & kUntouched) | kRanked | kCold;
  }
  VEP_HD void rank_hot(int64_t expert, int64_t order) const {
    last()[expert] = header[kTick] + 1 + order;
    count()[expert] += 1;
    flags()[expert] = kRanked;
  }
};

// Who leaves first: the smaller one.
struct VictimKey {
  uint64_t first;
  uint64_t second;
  int64_t slot;

  VEP_HD bool operator<(const VictimKey& other) const {
    return first != other.first ? first < other.first : second < other.second;
  }
};

VEP_HD inline uint64_t bits_of(double value) {
  union {
    double number;
    uint64_t bits;
  } both;
  both.number = value;
  return both.bits;
}

VEP_HD inline VictimKey victim_key(const Layer& layer, int64_t slot) {
  const int64_t expert = layer.expert_in()[slot];
  const int64_t last = layer.last()[expert];
  if (layer.policy() == Policy::kLru) {
    return {static_cast<uint64_t>(last) ^ (1ull << 63), 0, slot};
  }
  double weight = static_cast<double>(layer.count()[expert]);
  if (layer.policy() == Policy::kLfru) {
    weight /= static_cast<double>(layer.header[kTick] - last + 1);
  }
  // A double that is not negative orders as its bits do, and leaves the top bit for "cold ones first".
  const uint64_t hot = layer.flags()[expert] & kCold ? 0 : 1ull << 63;
  return {hot | bits_of(weight), (static_cast<uint64_t>(last) << 16) | static_cast<uint64_t>(expert), slot};
}

constexpr VictimKey kNoVictim = {~0ull, ~0ull, kNone};

VEP_HD inline int power_of_two_from(int value) {
  int power = 1;
  while (power < value) power *= 2;
  return power;
}

// What a step works with: on the GPU, shared memory. `keys` has room for power_of_two_from(C).
struct Scratch {
  int32_t* first;   // (E): index of the first entry that asks for the expert, or kNever
  int32_t* settled;  // (C): what became of the prefetch in that slot
  VictimKey* keys;

  VEP_HD static int64_t bytes(int num_experts, int num_slots) {
    return static_cast<int64_t>(sizeof(VictimKey)) * power_of_two_from(num_slots) +
           static_cast<int64_t>(sizeof(int32_t)) * (num_experts + num_slots);
  }
  VEP_HD static Scratch at(void* memory, int num_experts, int num_slots) {
    auto* keys = static_cast<VictimKey*>(memory);
    auto* first = reinterpret_cast<int32_t*>(keys + power_of_two_from(num_slots));
    return {first, first + num_experts, keys};
  }
};

// The lists of one wave. Every array has room for min(entries, E) items; `loads` holds (expert, slot) pairs.
struct WaveLists {
  int32_t* experts;
  int32_t* loads;
  int32_t* victims;
  int32_t* late;
};

struct StepCounts {
  int num_needed = 0;
  int num_hits = 0;
  int num_late = 0;
  int num_misses = 0;
  int num_evictions = 0;
  int num_used = 0;
  int num_unused = 0;
  int num_displaced = 0;
};

// The lanes' share of `count` items in their order: lane by lane, contiguous.
template <class Team>
VEP_HD void share_of(const Team& team, int count, int* begin, int* end) {
  const int each = (count + team.size() - 1) / team.size();
  *begin = team.rank() * each < count ? team.rank() * each : count;
  *end = *begin + each < count ? *begin + each : count;
}

VEP_HD inline void atomic_min(int32_t* place, int32_t value) {
#ifdef __CUDA_ARCH__
  atomicMin(place, value);
#else
  int32_t seen = __atomic_load_n(place, __ATOMIC_RELAXED);
  while (value < seen && !__atomic_compare_exchange_n(place, &seen, value, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
  }
#endif
}

// Sorts the first `count` keys so far that the smallest `wanted` stand in front, in order. Bitonic, for any team.
template <class Team>
VEP_HD void smallest_first(Team& team, VictimKey* keys, int count, int wanted) {
  const int size = power_of_two_from(count);
  for (int i = count + team.rank(); i < size; i += team.size()) keys[i] = kNoVictim;
  team.sync();
  (void)wanted;
  for (int span = 2; span <= size; span *= 2) {
    for (int distance = span / 2; distance > 0; distance /= 2) {
      for (int i = team.rank(); i < size / 2; i += team.size()) {
        const int low = i / distance * distance * 2 + i % distance;
        const int high = low + distance;
        const bool ascending = (low & span) == 0;
        if ((keys[high] < keys[low]) == ascending) {
          const VictimKey kept = keys[low];
          keys[low] = keys[high];
          keys[high] = kept;
        }
      }
      team.sync();
    }
  }
}

// A team of one.
struct Alone {
  VEP_HD int rank() const { return 0; }
  VEP_HD int size() const { return 1; }
  VEP_HD void sync() const {}
  VEP_HD int64_t sum(int64_t value, int64_t* total) const {
    *total = value;
    return 0;
  }
};

#if !defined(__CUDA_ARCH__)
inline void smallest_first(Alone&, VictimKey* keys, int count, int wanted) {
  std::partial_sort(keys, keys + wanted, keys + count);
}
#endif

// Notes in `scratch.first` which experts are asked for, and where first. `ids` here and below: a pointer to integers, or
// whatever else has [].
template <class Team, class Ids>
VEP_HD void find_first(Team& team, const Layer& layer, const Ids& ids, int num_ids, const Scratch& scratch) {
  const int num_experts = layer.num_experts();
  for (int expert = team.rank(); expert < num_experts; expert += team.size()) scratch.first[expert] = kNever;
  team.sync();
  int64_t out_of_range = 0;
  for (int i = team.rank(); i < num_ids; i += team.size()) {
    const int64_t expert = static_cast<int64_t>(ids[i]);
    if (expert >= num_experts) {
      ++out_of_range;
    } else if (expert >= 0) {
      atomic_min(&scratch.first[expert], i);
    }
  }
  int64_t total = 0;
  team.sum(out_of_range, &total);
  if (team.rank() == 0) layer.header[kOutOfRange] += total;
  team.sync();
}

template <class Ids>
VEP_HD bool is_first(const Layer& layer, const Ids& ids, int i, const Scratch& scratch) {
  const int64_t expert = static_cast<int64_t>(ids[i]);
  return expert >= 0 && expert < layer.num_experts() && scratch.first[expert] == i;
}

// Prefetches that have landed become RESIDENT (cold), and those that this step does not need and whose copy has not
// started are cancelled. `lane`: landed(slot), drop(slot) -> whether it was in time. Needs `scratch.first`.
template <class Team, class CopyLane>
VEP_HD void settle(Team& team, const Layer& layer, CopyLane& lane, const Scratch& scratch, bool drop_unneeded) {
  if (layer.header[kNumInFlight] == 0) return;
  constexpr int64_t kDropped = 1ll << 32;
  int begin, end;
  share_of(team, layer.num_slots(), &begin, &end);
  int64_t mine = 0;
  for (int slot = begin; slot < end; ++slot) {
    const int64_t expert = layer.expert_in()[slot];
    scratch.settled[slot] = 0;
    if (expert == kNone || !(layer.flags()[expert] & kInFlight)) continue;
    if (lane.landed(slot)) {
      scratch.settled[slot] = 1;
      mine += 1;
    } else if (drop_unneeded && scratch.first[expert] == kNever && lane.drop(slot)) {
      scratch.settled[slot] = 2;
      mine += kDropped;
    }
  }
  int64_t total = 0;
  int64_t before = team.sum(mine, &total);
  for (int slot = begin; slot < end; ++slot) {
    const int64_t expert = layer.expert_in()[slot];
    if (scratch.settled[slot] == 1) {
      layer.rank_cold(expert, before % kDropped);
      before += 1;
    } else if (scratch.settled[slot] == 2) {
      layer.slot_of()[expert] = kNone;
      layer.expert_in()[slot] = kNone;
      layer.flags()[expert] = 0;
      layer.free_slots()[layer.header[kNumFree] + before / kDropped] = slot;
      before += kDropped;
    }
  }
  team.sync();
  if (team.rank() == 0) {
    layer.header[kColdTick] -= total % kDropped;
    layer.header[kNumFree] += total / kDropped;
    layer.header[kCancelled] += total / kDropped;
    layer.header[kNumInFlight] -= total % kDropped + total / kDropped;
  }
  team.sync();
}

// Puts the `wanted` slots to leave first in front of `scratch.keys`, none of an expert that is asked for.
template <class Team>
VEP_HD void choose_victims(Team& team, const Layer& layer, const Scratch& scratch, int wanted) {
  for (int slot = team.rank(); slot < layer.num_slots(); slot += team.size()) {
    const int64_t expert = layer.expert_in()[slot];
    const bool may_leave = expert != kNone && (layer.flags()[expert] & kRanked) && scratch.first[expert] == kNever;
    scratch.keys[slot] = may_leave ? victim_key(layer, slot) : kNoVictim;
  }
  team.sync();
  smallest_first(team, scratch.keys, layer.num_slots(), wanted);
}

// Gives load number `m` its slot: a free one, else that of victim number m - num_free, which is left with the flags
// `evicted`. Returns whether the victim was a prefetch that no step has needed. Each lane calls it for its own loads.
VEP_HD inline bool place(const Layer& layer, const Scratch& scratch, const WaveLists& lists, int m,
                         int64_t evicted = 0) {
  const int64_t num_free = layer.header[kNumFree];
  const int64_t expert = lists.loads[2 * m];
  bool unused = false;
  int64_t slot, victim = kNone;
  if (m < num_free) {
    slot = layer.free_slots()[num_free - 1 - m];
  } else {
    slot = scratch.keys[m - num_free].slot;
    victim = layer.expert_in()[slot];
    unused = (layer.flags()[victim] & kUntouched) != 0;
    layer.slot_of()[victim] = kNone;
    layer.flags()[victim] = evicted;
  }
  layer.slot_of()[expert] = slot;
  layer.expert_in()[slot] = expert;
  lists.loads[2 * m + 1] = static_cast<int32_t>(slot);
  lists.victims[m] = static_cast<int32_t>(victim);
  return unused;
}

// Plans one step that needs at most C experts, and does its bookkeeping as if its copies had landed: whoever runs the
// step makes sure of it before the kernel. `ids`: `num_ids` routed ids, negative ones are padding. `slot_ids` (num_ids)
// receives a valid slot for every entry. Returns kSplitNone, or kWide or kMustSettle, and then only prefetches that
// have landed or could be cancelled are settled.
template <class Team, class Ids, class Id, class CopyLane>
VEP_HD Split plan_narrow(Team& team, const Layer& layer, CopyLane& lane, const Ids& ids, int num_ids, Id* slot_ids,
                         const Scratch& scratch, const WaveLists& lists, StepCounts* counts) {
  find_first(team, layer, ids, num_ids, scratch);
  settle(team, layer, lane, scratch, true);
  constexpr int64_t kMiss = 1ll << 15, kWait = 1ll << 30, kUse = 1ll << 45, kField = kMiss - 1;
  int begin, end;
  share_of(team, num_ids, &begin, &end);
  int64_t mine = 0;
  for (int i = begin; i < end; ++i) {
    if (!is_first(layer, ids, i, scratch)) continue;
    const int64_t flags = layer.flags()[ids[i]];
    mine += flags & kRanked ? 1 : flags & kInFlight ? kWait : kMiss;
    mine += flags & kUntouched ? kUse : 0;
  }
  int64_t total = 0;
  int64_t before = team.sum(mine, &total);
  StepCounts step;
  step.num_hits = static_cast<int>(total & kField);
  step.num_misses = static_cast<int>(total / kMiss & kField);
  step.num_late = static_cast<int>(total / kWait & kField);
  step.num_used = static_cast<int>(total / kUse & kField);
  step.num_needed = step.num_hits + step.num_misses + step.num_late;
  if (step.num_needed > layer.num_slots()) return kWide;
  if (step.num_needed + layer.header[kNumInFlight] - step.num_late > layer.num_slots()) return kMustSettle;

  const int hits = step.num_hits, late = step.num_late;
  constexpr int64_t kDisplacedOne = 1ll << 32;
  int64_t unused = 0;
  for (int i = begin; i < end; ++i) {
    if (!is_first(layer, ids, i, scratch)) continue;
    const int expert = static_cast<int>(ids[i]);
    const int hit = static_cast<int>(before & kField), miss = static_cast<int>(before / kMiss & kField),
              wait = static_cast<int>(before / kWait & kField);
    lists.experts[hit + miss + wait] = expert;
    const int64_t flags = layer.flags()[expert];
    if (flags & kRanked) {
      layer.rank_hot(expert, hit);
      before += 1;
    } else if (flags & kInFlight) {
      lists.late[wait] = expert;
      layer.rank_hot(expert, hits + wait);
      before += kWait;
    } else {
      lists.loads[2 * miss] = expert;
      unused += flags & kDisplaced ? kDisplacedOne : 0;
      before += kMiss;
    }
  }
  team.sync();
  if (team.rank() == 0) layer.header[kTick] += hits;  // the age of a victim counts this step's hits
  team.sync();
  const int num_free = static_cast<int>(layer.header[kNumFree]);
  step.num_evictions = step.num_misses > num_free ? step.num_misses - num_free : 0;
  if (step.num_evictions) choose_victims(team, layer, scratch, step.num_evictions);
  for (int m = team.rank(); m < step.num_misses; m += team.size()) unused += place(layer, scratch, lists, m);
  team.sum(unused, &total);
  step.num_unused = static_cast<int>(total % kDisplacedOne);
  step.num_displaced = static_cast<int>(total / kDisplacedOne);
  for (int m = team.rank(); m < step.num_misses; m += team.size()) layer.rank_hot(lists.loads[2 * m], late + m);
  team.sync();
  if (team.rank() == 0) {
    layer.header[kTick] += late + step.num_misses;
    layer.header[kNumFree] -= step.num_misses - step.num_evictions;
    layer.header[kNumInFlight] -= late;
  }
  for (int i = team.rank(); i < num_ids; i += team.size()) {
    const int64_t expert = static_cast<int64_t>(ids[i]);
    const bool known = expert >= 0 && expert < layer.num_experts() && layer.slot_of()[expert] != kNone;
    slot_ids[i] = static_cast<Id>(known ? layer.slot_of()[expert] : 0);
  }
  *counts = step;
  return kSplitNone;
}

// Adds a step to the totals; one lane calls it.
VEP_HD inline void count_step(const Layer& layer, const StepCounts& step) {
  layer.header[kSteps] += step.num_needed > 0;
  layer.header[kHits] += step.num_hits;
  layer.header[kLate] += step.num_late;
  layer.header[kMisses] += step.num_misses;
  layer.header[kEvictions] += step.num_evictions;
  layer.header[kUsed] += step.num_used;
  layer.header[kUnused] += step.num_unused;
  layer.header[kDisplacedHits] += step.num_displaced;
}

// Plans copies for `predicted` experts, most wanted first, at most `budget` of them, and marks them in flight.
// Prefetches that have landed are settled first, none is cancelled. Returns the number of loads.
template <class Team, class Ids, class CopyLane>
VEP_HD int plan_prefetch(Team& team, const Layer& layer, CopyLane& lane, const Ids& predicted, int num_predicted,
                         int budget, const Scratch& scratch, const WaveLists& lists, StepCounts* counts) {
  find_first(team, layer, predicted, num_predicted, scratch);
  settle(team, layer, lane, scratch, false);
  int begin, end;
  share_of(team, num_predicted, &begin, &end);
  int64_t mine = 0;
  for (int i = begin; i < end; ++i) {
    mine += is_first(layer, predicted, i, scratch) && layer.slot_of()[predicted[i]] == kNone;
  }
  int64_t num_absent = 0;
  int64_t before = team.sum(mine, &num_absent);
  int64_t may_leave = 0;
  for (int slot = team.rank(); slot < layer.num_slots(); slot += team.size()) {
    const int64_t expert = layer.expert_in()[slot];
    may_leave += expert != kNone && (layer.flags()[expert] & kRanked) && scratch.first[expert] == kNever;
  }
  int64_t num_may_leave = 0;
  team.sum(may_leave, &num_may_leave);
  const int64_t num_free = layer.header[kNumFree];
  int64_t num_loads = num_absent < budget ? num_absent : budget > 0 ? budget : 0;
  if (num_loads > num_free + num_may_leave) num_loads = num_free + num_may_leave;
  for (int i = begin; i < end && before < num_loads; ++i) {
    if (is_first(layer, predicted, i, scratch) && layer.slot_of()[predicted[i]] == kNone) {
      lists.loads[2 * before++] = static_cast<int32_t>(predicted[i]);
    }
  }
  team.sync();
  StepCounts step;
  step.num_misses = static_cast<int>(num_loads);
  step.num_evictions = static_cast<int>(num_loads > num_free ? num_loads - num_free : 0);
  if (step.num_evictions) choose_victims(team, layer, scratch, step.num_evictions);
  int64_t unused = 0, total = 0;
  for (int m = team.rank(); m < num_loads; m += team.size()) {
    unused += place(layer, scratch, lists, m, kDisplaced);
    layer.flags()[lists.loads[2 * m]] = kInFlight | kUntouched;
  }
  team.sum(unused, &total);
  step.num_unused = static_cast<int>(total);
  if (team.rank() == 0) {
    layer.header[kNumFree] -= num_loads - step.num_evictions;
    layer.header[kNumInFlight] += num_loads;
    layer.header[kIssued] += num_loads;
    layer.header[kEvictions] += step.num_evictions;
    layer.header[kUnused] += step.num_unused;
  }
  team.sync();
  *counts = step;
  return static_cast<int>(num_loads);
}

}  // namespace vep
