// Which expert of one MoE layer is where, for host and device: the decisions of vllm_expert_prefetch/residency, which
// is the specification, on flat integer arrays.
//
// Every function here is run by a team: one thread on the host, a block of threads on a GPU. Lanes of a team see each
// other's writes after `sync()`, and results do not depend on the team's size. A team has
//   rank(), size(), sync(); sum(value, &total): the exclusive prefix sum over lanes, and the total for everyone;
//   lower(place, value), raise(place, value): the minimum or maximum of both stays in `place`, whoever else does so.
#pragma once

#include <cstdint>

#include "host_device.h"

#if !defined(__CUDA_ARCH__)
#include <algorithm>
#endif

namespace vep {

constexpr int kNone = -1;
constexpr int kNever = 0x7fffffff;
constexpr int kPaddingRow = -1;
constexpr int kStaleRounds = 8;  // residency.STALE_ROUNDS
constexpr int kFarRounds = 1;    // residency.FAR_ROUNDS
constexpr int kHalfLife = 12;    // residency.HALF_LIFE, in steps
constexpr int64_t kTouch = 1 << 20;

enum class Policy : int64_t { kLru, kLfu, kLfru, kEwma, kNumPolicies };  // as in residency.POLICIES

// The words in front of a layer's state, by the names that Python knows them by (cache/words.py).
#define VEP_WORDS(WORD)                                                                            \
  WORD(kNumExperts, num_experts)                                                                   \
  WORD(kNumSlots, num_slots)                                                                       \
  WORD(kTopK, top_k)                                                                               \
  WORD(kPolicy, policy)                                                                            \
  WORD(kTick, tick)          /* touches so far */                                                  \
  WORD(kColdTick, cold_tick) /* minus the number of experts that came cold */                      \
  WORD(kNumFree, num_free)                                                                         \
  WORD(kNumInFlight, num_in_flight)                                                                \
  WORD(kNumPreloaded, num_preloaded) /* of these or landed, those in overflow rows */              \
  /* Totals since the start. */                                                                    \
  WORD(kSteps, steps)          /* that needed an expert */                                         \
  WORD(kWideSteps, wide_steps) /* of these, those that needed more experts than slots */           \
  WORD(kHits, hits)                                                                                \
  WORD(kLate, late)                                                                                \
  WORD(kMisses, misses)                                                                            \
  WORD(kSpeculated, speculated) /* lookups of steps that executed a guess */                       \
  WORD(kOverflow, overflow)     /* records copied into overflow rows */                            \
  WORD(kEvictions, evictions)                                                                      \
  WORD(kUsed, used)                                                                                \
  WORD(kUnused, unused)                                                                            \
  WORD(kDisplaced, displaced) /* misses on experts that a prefetch had evicted */                  \
  WORD(kIssued, issued)                                                                            \
  WORD(kCancelled, cancelled)                                                                      \
  WORD(kClaimed, claimed)         /* late ones whose copy had not started: the step copied them */ \
  WORD(kDemanded, demanded)       /* records that steps copied, claimed ones included */           \
  WORD(kOutOfRange, out_of_range) /* routed ids >= num_experts, which are ignored */               \
  WORD(kErrors, errors)           /* as record.h's Board counts them, before this step's copies */ \
  WORD(kStallNs, stall_ns)        /* that steps waited for records; on the host only */            \
  WORD(kLateNs, late_ns)          /* of these, for prefetches whose copy ran */

enum Word : int {
#define VEP_WORD(constant, name) constant,
  VEP_WORDS(VEP_WORD)
#undef VEP_WORD
      kHeaderWords,
};

#define VEP_WORD(constant, name) #name " "
constexpr const char* kWordNames = VEP_WORDS(VEP_WORD);
#undef VEP_WORD

// kUntouched: brought by a prefetch, needed by no step yet. kWasDisplaced: evicted by a
// prefetch, not needed since.
enum Flag : int64_t { kRanked = 1, kCold = 2, kInFlight = 4, kUntouched = 8, kWasDisplaced = 16 };

// A view of one layer's state: `words(E, C)` int64 words, all of it in one allocation. Its sizes are read once:
// compilers must read them anew after every write to the state otherwise.
struct Layer {
  int64_t* header;
  int64_t experts;
  int64_t slots;

  VEP_HD Layer(int64_t* state) : header(state), experts(state[kNumExperts]), slots(state[kNumSlots]) {}

  VEP_HD static int64_t words(int64_t num_experts, int64_t num_slots) {
    return kHeaderWords + 5 * num_experts + num_slots;
  }
  VEP_HD int num_experts() const { return static_cast<int>(experts); }
  VEP_HD int num_slots() const { return static_cast<int>(slots); }
  VEP_HD Policy policy() const { return static_cast<Policy>(header[kPolicy]); }
  VEP_HD int64_t* row_of() const { return header + kHeaderWords; }      // (E): row or -1
  VEP_HD int64_t* flags() const { return row_of() + experts; }          // (E): bits of Flag
  VEP_HD int64_t* last() const { return flags() + experts; }            // (E): tick of the last touch
  VEP_HD int64_t* count() const { return last() + experts; }            // (E): touches, kept after eviction; see faded
  VEP_HD int64_t* expert_in() const { return count() + experts; }       // (E): expert or -1
  VEP_HD int64_t* free_slots() const { return expert_in() + experts; }  // (C): a stack of num_free slots

  // Rows that may hold an expert now.
  VEP_HD int num_rows() const { return static_cast<int>(header[kNumPreloaded] ? experts : slots); }
  VEP_HD bool is_coming(int64_t expert) const { return (flags()[expert] & kInFlight) != 0; }
  VEP_HD bool is_here(int64_t expert) const { return row_of()[expert] != kNone && !is_coming(expert); }
  VEP_HD void put(int64_t expert, int64_t row) const {
    row_of()[expert] = row;
    expert_in()[row] = expert;
  }

  // The order-th of several experts that come cold at once.
  VEP_HD void rank_cold(int64_t expert, int64_t order) const {
    last()[expert] = header[kColdTick] - 1 - order;
    flags()[expert] = (flags()[expert] & kUntouched) | kRanked | kCold;
  }
  // The order-th of several experts that a narrow step touches at once.
  VEP_HD void rank_hot(int64_t expert, int64_t order) const {
    last()[expert] = header[kTick] + 1 + order;
    count()[expert] = policy() == Policy::kEwma ? header[kSteps] << 32 | (faded(expert) + kTouch) : count()[expert] + 1;
    flags()[expert] = kRanked;
  }
  // The weight of the expert's touches as of now: half for every kHalfLife steps, straight in between. Under kEwma a
  // count is the weight at the last touch, in units of 2^-20, and above its 32 bits the lower 32 of that step. Below
  // 2^25, so that products stay within them.
  VEP_HD int64_t faded(int64_t expert) const {
    const int64_t weight = count()[expert] & 0xffffffff, age = (header[kSteps] - (count()[expert] >> 32)) & 0xffffffff;
    const int64_t num_halvings = age / kHalfLife, rest = age % kHalfLife;
    return num_halvings > 32 ? 0 : weight * (2 * kHalfLife - rest) / (2 * kHalfLife) >> num_halvings;
  }
  // An expert with a slot that a wide step of `num_needed` needs: as hot as before, or as a touched one if it was cold.
  VEP_HD void keep_hot(int64_t expert, int64_t num_needed) const {
    const bool is_hot = (flags()[expert] & (kRanked | kCold)) == kRanked;
    last()[expert] = (is_hot ? last()[expert] : header[kTick]) + num_needed;
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
    return {static_cast<uint64_t>(last) ^ (1ull << 63), static_cast<uint64_t>(expert), slot};
  }
  double weight = static_cast<double>(layer.policy() == Policy::kEwma ? layer.faded(expert) : layer.count()[expert]);
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
  int32_t* first;    // (E): index of the first entry that asks for the expert, or kNever
  int32_t* last;     // (E): index of the last one; then the overflow row of a needed expert that has no slot
  int32_t* missing;  // (E): experts without a slot, in order of first appearance
  int32_t* late;     // (E): experts whose prefetch has not landed: needed ones, then others in overflow rows
  int32_t* settled;  // (E): what became of the prefetch in that row; then the overflow rows that hold nothing
  int32_t* entry;    // (1): index of the first entry that asks for any expert, or kNever
  VictimKey* keys;

  VEP_HD static int64_t bytes(int num_experts, int num_slots) {
    return static_cast<int64_t>(sizeof(VictimKey)) * power_of_two_from(num_slots) +
           static_cast<int64_t>(sizeof(int32_t)) * (5 * num_experts + 1);
  }
  VEP_HD static Scratch at(void* memory, int num_experts, int num_slots) {
    auto* keys = static_cast<VictimKey*>(memory);
    auto* ints = reinterpret_cast<int32_t*>(keys + power_of_two_from(num_slots));
    int32_t* settled = ints + 4 * num_experts;
    return {ints, ints + num_experts, ints + 2 * num_experts, ints + 3 * num_experts, settled, settled + num_experts,
            keys};
  }
};

struct StepCounts {
  int num_needed = 0;
  int num_hits = 0;
  int num_late = 0;
  int num_awaited = 0;  // records that are not needed and on their way into an overflow row
  int num_misses = 0;
  int num_overflow = 0;
  int num_evictions = 0;
  int num_used = 0;
  int num_unused = 0;
  int num_displaced = 0;
  bool is_wide = false;
};

// The lanes' share of `count` items in their order: lane by lane, contiguous.
template <class Team>
VEP_HD void share_of(const Team& team, int count, int* begin, int* end) {
  const int each = (count + team.size() - 1) / team.size();
  *begin = team.rank() * each < count ? team.rank() * each : count;
  *end = *begin + each < count ? *begin + each : count;
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
  VEP_HD void lower(int32_t* place, int32_t value) const { *place = value < *place ? value : *place; }
  VEP_HD void raise(int32_t* place, int32_t value) const { *place = value > *place ? value : *place; }
};

#if !defined(__CUDA_ARCH__)
inline void smallest_first(Alone&, VictimKey* keys, int count, int wanted) {
  std::partial_sort(keys, keys + wanted, keys + count);
}
#endif

// Notes in `scratch` which experts are asked for, and where first; counts stray ids where they are routed ones. `ids`
// here and below: a pointer to integers, or whatever else has []; negative ids are padding.
template <class Team, class Ids>
VEP_HD void find_first(Team& team, const Layer& layer, const Ids& ids, int num_ids, bool are_routed,
                       const Scratch& scratch) {
  const int num_experts = layer.num_experts();
  for (int expert = team.rank(); expert < num_experts; expert += team.size()) scratch.first[expert] = kNever;
  if (team.rank() == 0) *scratch.entry = kNever;
  team.sync();
  int64_t out_of_range = 0;
  for (int i = team.rank(); i < num_ids; i += team.size()) {
    const int64_t expert = static_cast<int64_t>(ids[i]);
    if (expert >= num_experts) {
      ++out_of_range;
    } else if (expert >= 0) {
      team.lower(&scratch.first[expert], i);
      team.lower(scratch.entry, i);
    }
  }
  if (are_routed) {
    int64_t total = 0;
    team.sum(out_of_range, &total);
    if (team.rank() == 0) layer.header[kOutOfRange] += total;
  }
  team.sync();
}

// Notes in `scratch` where each expert is asked for last.
template <class Team, class Ids>
VEP_HD void find_last(Team& team, const Layer& layer, const Ids& ids, int num_ids, const Scratch& scratch) {
  const int num_experts = layer.num_experts();
  for (int expert = team.rank(); expert < num_experts; expert += team.size()) scratch.last[expert] = kNone;
  team.sync();
  for (int i = team.rank(); i < num_ids; i += team.size()) {
    const int64_t expert = static_cast<int64_t>(ids[i]);
    if (expert >= 0 && expert < num_experts) team.raise(&scratch.last[expert], i);
  }
  team.sync();
}

template <class Ids>
VEP_HD bool is_first(const Layer& layer, const Ids& ids, int i, const Scratch& scratch) {
  const int64_t expert = static_cast<int64_t>(ids[i]);
  return expert >= 0 && expert < layer.num_experts() && scratch.first[expert] == i;
}

// Prefetches that have landed become RESIDENT (cold), and those that are not asked for and whose copy has not started
// are cancelled. `lane`: landed(row), drop(row) -> whether it was in time. Needs `scratch.first`.
template <class Team, class CopyLane>
VEP_HD void settle(Team& team, const Layer& layer, CopyLane& lane, const Scratch& scratch) {
  if (layer.header[kNumInFlight] == 0) return;
  constexpr int64_t kLanded = 1, kDropped = 1ll << 16;
  constexpr int kPreloaded = 32;  // in the same way, above the fields of slots
  constexpr int64_t kField = kDropped - 1;
  int begin, end;
  share_of(team, layer.num_rows(), &begin, &end);
  int64_t mine = 0;
  for (int row = begin; row < end; ++row) {
    const int64_t expert = layer.expert_in()[row];
    int64_t outcome = 0;
    if (expert != kNone && layer.is_coming(expert)) {
      if (lane.landed(row)) {
        outcome = kLanded;
      } else if (scratch.first[expert] == kNever && lane.drop(row)) {
        outcome = kDropped;
      }
    }
    scratch.settled[row] = static_cast<int32_t>(outcome);
    mine += row < layer.num_slots() ? outcome : outcome << kPreloaded;
  }
  int64_t total = 0;
  int64_t before = team.sum(mine, &total);
  for (int row = begin; row < end; ++row) {
    const int64_t expert = layer.expert_in()[row];
    const int64_t outcome = scratch.settled[row];
    const bool is_slot = row < layer.num_slots();
    if (outcome == kLanded) {
      if (is_slot) {
        layer.rank_cold(expert, before & kField);
      } else {
        layer.flags()[expert] &= ~static_cast<int64_t>(kInFlight);
      }
    } else if (outcome == kDropped) {
      layer.row_of()[expert] = kNone;
      layer.expert_in()[row] = kNone;
      layer.flags()[expert] = 0;
      if (is_slot) layer.free_slots()[layer.header[kNumFree] + (before / kDropped & kField)] = row;
    }
    if (is_slot) before += outcome;
  }
  team.sync();
  if (team.rank() == 0) {
    const int64_t others = total >> kPreloaded;
    const int64_t num_dropped = (total / kDropped & kField) + others / kDropped;
    layer.header[kColdTick] -= total & kField;
    layer.header[kNumFree] += total / kDropped & kField;
    layer.header[kCancelled] += num_dropped;
    layer.header[kNumInFlight] -= num_dropped + (total & kField) + (others & kField);
    layer.header[kNumPreloaded] -= others / kDropped;
  }
  team.sync();
}

// Puts the slots to leave first in front of `scratch.keys`, at most `wanted`, none of an expert that is asked for;
// `spared_rounds` > 0: nor of one that is hot and was needed within so many rounds. Returns how many.
template <class Team>
VEP_HD int choose_victims(Team& team, const Layer& layer, const Scratch& scratch, int64_t wanted, int spared_rounds) {
  if (wanted <= 0) return 0;
  const int64_t stale = layer.header[kTick] - static_cast<int64_t>(spared_rounds) * layer.num_slots();
  int64_t mine = 0;
  for (int slot = team.rank(); slot < layer.num_slots(); slot += team.size()) {
    const int64_t expert = layer.expert_in()[slot];
    bool may_leave = expert != kNone && (layer.flags()[expert] & kRanked) && scratch.first[expert] == kNever;
    if (may_leave && spared_rounds) {
      may_leave = (layer.flags()[expert] & kCold) || layer.last()[expert] < stale;
    }
    scratch.keys[slot] = may_leave ? victim_key(layer, slot) : kNoVictim;
    mine += may_leave;
  }
  int64_t found = 0;
  team.sum(mine, &found);
  const int chosen = static_cast<int>(found < wanted ? found : wanted);
  team.sync();
  if (chosen) smallest_first(team, scratch.keys, layer.num_slots(), chosen);
  return chosen;
}

// Gives load number `m` its slot: a free one, else that of victim number m - num_free, which is left with the flags
// `evicted`. Returns whether the victim was a prefetch that no step has needed. Each lane calls it for its own loads.
VEP_HD inline bool place(const Layer& layer, const Scratch& scratch, int32_t* loads, int m, int64_t evicted = 0) {
  const int64_t num_free = layer.header[kNumFree];
  const int64_t expert = loads[2 * m];
  bool unused = false;
  int64_t slot;
  if (m < num_free) {
    slot = layer.free_slots()[num_free - 1 - m];
  } else {
    slot = scratch.keys[m - num_free].slot;
    const int64_t victim = layer.expert_in()[slot];
    unused = (layer.flags()[victim] & kUntouched) != 0;
    layer.row_of()[victim] = kNone;
    layer.flags()[victim] = evicted;
  }
  layer.put(expert, slot);
  loads[2 * m + 1] = static_cast<int32_t>(slot);
  return unused;
}

// Notes in `scratch.settled` the overflow rows that hold nothing, in their order.
template <class Team>
VEP_HD void list_overflow_rows(Team& team, const Layer& layer, const Scratch& scratch) {
  const int num_slots = layer.num_slots();
  int begin, end;
  share_of(team, layer.num_experts() - num_slots, &begin, &end);
  int64_t mine = 0, total = 0;
  for (int i = begin; i < end; ++i) mine += layer.expert_in()[num_slots + i] == kNone;
  int64_t before = team.sum(mine, &total);
  for (int i = begin; i < end; ++i) {
    if (layer.expert_in()[num_slots + i] == kNone) scratch.settled[before++] = num_slots + i;
  }
  team.sync();
}

// Writes the `num_misses` experts of `scratch.missing` into `loads`, those first that get a slot first: a wide step's
// by their last appearance, the latest first.
template <class Team>
VEP_HD void order_misses(Team& team, const Scratch& scratch, int num_misses, bool is_wide, int32_t* loads) {
  for (int m = team.rank(); m < num_misses; m += team.size()) {
    const int32_t expert = scratch.missing[m];
    int place = m;
    if (is_wide) {
      place = 0;
      for (int other = 0; other < num_misses; ++other) {
        place += scratch.last[scratch.missing[other]] > scratch.last[expert];
      }
    }
    loads[2 * place] = expert;
  }
  team.sync();
}

// After this step overflow rows hold nothing that the layer knows of. What the step does not need and what is on its
// way there must have landed all the same, before the row is another layer's.
template <class Team>
VEP_HD void give_back(Team& team, const Layer& layer, const Scratch& scratch, StepCounts& step) {
  constexpr int64_t kUnneeded = 1ll << 32;
  const int num_slots = layer.num_slots();
  int begin, end;
  share_of(team, layer.num_experts() - num_slots, &begin, &end);
  const auto is_needed = [&](int64_t expert) { return scratch.first[expert] != kNever; };
  int64_t mine = 0, total = 0;
  for (int row = num_slots + begin; row < num_slots + end; ++row) {
    const int64_t expert = layer.expert_in()[row];
    if (expert != kNone && !is_needed(expert)) mine += kUnneeded + layer.is_coming(expert);
  }
  int64_t before = step.num_late + (team.sum(mine, &total) % kUnneeded);
  for (int row = num_slots + begin; row < num_slots + end; ++row) {
    const int64_t expert = layer.expert_in()[row];
    if (expert == kNone) continue;
    if (!is_needed(expert) && layer.is_coming(expert)) scratch.late[before++] = static_cast<int32_t>(expert);
    scratch.last[expert] = row;
    layer.row_of()[expert] = kNone;
    layer.expert_in()[row] = kNone;
    layer.flags()[expert] = 0;
  }
  step.num_awaited = static_cast<int>(total % kUnneeded);
  step.num_unused += static_cast<int>(total / kUnneeded);
  team.sync();
  if (team.rank() == 0) {
    layer.header[kNumInFlight] -= step.num_awaited;
    layer.header[kNumPreloaded] = 0;
  }
  team.sync();
}

// Plans one step, and does its bookkeeping as if its copies had landed: whoever runs the step makes sure of it before
// the kernel. `ids`: `num_ids` routed ids. `loads`: room for min(num_ids, E) pairs (expert, row), written; rows below C
// are slots, the others overflow rows. `scratch.late` receives the needed experts whose prefetch has not landed, then
// those that are on their way into an overflow row and not needed: `row_after` says where.
template <class Team, class Ids, class CopyLane>
VEP_HD StepCounts plan_step(Team& team, const Layer& layer, CopyLane& lane, const Ids& ids, int num_ids,
                            const Scratch& scratch, int32_t* loads) {
  find_first(team, layer, ids, num_ids, true, scratch);
  settle(team, layer, lane, scratch);
  constexpr int64_t kMiss = 1ll << 15, kWait = 1ll << 30, kUse = 1ll << 45, kField = kMiss - 1;
  int begin, end;
  share_of(team, num_ids, &begin, &end);
  int64_t mine = 0;
  for (int i = begin; i < end; ++i) {
    if (!is_first(layer, ids, i, scratch)) continue;
    const int64_t expert = ids[i];
    mine += layer.is_here(expert) ? 1 : layer.is_coming(expert) ? kWait : kMiss;
    mine += layer.flags()[expert] & kUntouched ? kUse : 0;
  }
  int64_t total = 0;
  int64_t before = team.sum(mine, &total);
  StepCounts step;
  step.num_hits = static_cast<int>(total & kField);
  step.num_misses = static_cast<int>(total / kMiss & kField);
  step.num_late = static_cast<int>(total / kWait & kField);
  step.num_used = static_cast<int>(total / kUse & kField);
  step.num_needed = step.num_hits + step.num_misses + step.num_late;
  step.is_wide = step.num_needed > layer.num_slots();
  if (step.is_wide) find_last(team, layer, ids, num_ids, scratch);

  constexpr int64_t kDisplacedOne = 1ll << 32;
  int64_t unused = 0;
  for (int i = begin; i < end; ++i) {
    if (!is_first(layer, ids, i, scratch)) continue;
    const int expert = static_cast<int>(ids[i]);
    if (layer.is_here(expert)) {
      if (step.is_wide) {
        layer.keep_hot(expert, step.num_needed);
      } else {
        layer.rank_hot(expert, before & kField);
      }
      before += 1;
    } else if (layer.is_coming(expert)) {
      const int64_t wait = before / kWait & kField;
      scratch.late[wait] = expert;
      if (step.is_wide) {
        layer.keep_hot(expert, step.num_needed);
      } else {
        layer.rank_hot(expert, step.num_hits + wait);
      }
      before += kWait;
    } else {
      scratch.missing[before / kMiss & kField] = expert;
      unused += layer.flags()[expert] & kWasDisplaced ? kDisplacedOne : 0;
      layer.flags()[expert] = 0;
      before += kMiss;
    }
  }
  team.sync();
  // The age of a victim counts what this step has touched so far.
  if (team.rank() == 0) layer.header[kTick] += step.is_wide ? step.num_needed : step.num_hits;
  team.sync();
  order_misses(team, scratch, step.num_misses, step.is_wide, loads);
  const int64_t num_free = layer.header[kNumFree];
  step.num_evictions =
      choose_victims(team, layer, scratch, step.num_misses - num_free, step.is_wide ? kStaleRounds : 0);
  const int64_t num_places = num_free + step.num_evictions;
  const int num_in_slots = static_cast<int>(step.num_misses < num_places ? step.num_misses : num_places);
  step.num_overflow = step.num_misses - num_in_slots;
  if (step.num_overflow) list_overflow_rows(team, layer, scratch);
  team.sync();
  for (int m = team.rank(); m < step.num_misses; m += team.size()) {
    if (m < num_in_slots) {
      unused += place(layer, scratch, loads, m);
    } else {
      const int row = scratch.settled[m - num_in_slots];
      loads[2 * m + 1] = row;
      scratch.last[loads[2 * m]] = row;
    }
  }
  team.sum(unused, &total);
  step.num_unused = static_cast<int>(total % kDisplacedOne);
  step.num_displaced = static_cast<int>(total / kDisplacedOne);
  for (int m = team.rank(); m < num_in_slots; m += team.size()) {
    if (step.is_wide) {
      layer.rank_cold(loads[2 * m], m);
    } else {
      layer.rank_hot(loads[2 * m], step.num_late + m);
    }
  }
  team.sync();
  if (team.rank() == 0) {
    layer.header[step.is_wide ? kColdTick : kTick] += step.is_wide ? -num_in_slots : step.num_late + num_in_slots;
    layer.header[kNumFree] -= num_in_slots - step.num_evictions;
    layer.header[kNumInFlight] -= step.num_late;
  }
  team.sync();
  if (layer.header[kNumPreloaded]) give_back(team, layer, scratch, step);
  return step;
}

// Where the step that was planned has `expert`, needed or awaited.
VEP_HD inline int32_t row_after(const Layer& layer, const Scratch& scratch, int64_t expert) {
  const int64_t row = layer.row_of()[expert];
  return row != kNone ? static_cast<int32_t>(row) : scratch.last[expert];
}

// The rows of a planned step: `ids` as they were planned, `routed` the same with the ids of padding. A negative routed
// id stays -1, as in plain vLLM; other padding takes the row of the first needed expert, or row 0: nothing more is
// read.
template <class Team, class Ids, class Id>
VEP_HD void write_rows(Team& team, const Layer& layer, const Ids& ids, const Id* routed, int num_ids, Id* rows,
                       const Scratch& scratch) {
  const auto row_of = [&](int64_t expert) { return static_cast<Id>(row_after(layer, scratch, expert)); };
  const int32_t entry = *scratch.entry;
  const Id spare = entry == kNever ? Id{0} : row_of(static_cast<int64_t>(ids[entry]));
  for (int i = team.rank(); i < num_ids; i += team.size()) {
    const int64_t expert = static_cast<int64_t>(ids[i]);
    const bool is_known = expert >= 0 && expert < layer.num_experts();
    rows[i] = routed[i] < 0 ? Id{kPaddingRow} : is_known ? row_of(expert) : spare;
  }
}

// Adds a step to the totals; one lane calls it. `is_speculated`: it executed a guess.
VEP_HD inline void count_step(const Layer& layer, const StepCounts& step, bool is_speculated = false) {
  layer.header[kSteps] += step.num_needed > 0;
  layer.header[kWideSteps] += step.is_wide;
  if (is_speculated) {
    layer.header[kSpeculated] += step.num_needed;
  } else {
    layer.header[kHits] += step.num_hits;
    layer.header[kLate] += step.num_late;
    layer.header[kMisses] += step.num_misses;
  }
  layer.header[kDemanded] += step.num_misses;
  layer.header[kOverflow] += step.num_overflow;
  layer.header[kEvictions] += step.num_evictions;
  layer.header[kUsed] += step.num_used;
  layer.header[kUnused] += step.num_unused;
  layer.header[kDisplaced] += step.num_displaced;
}

// Gives the experts of `loads` their rows, of which the first `num_in_slots` are slots, and marks them in flight.
template <class Team>
VEP_HD void book_prefetch(Team& team, const Layer& layer, const Scratch& scratch, int num_loads, int num_in_slots,
                          int num_evictions, int32_t* loads) {
  int64_t unused = 0, total = 0;
  for (int m = team.rank(); m < num_loads; m += team.size()) {
    if (m < num_in_slots) {
      unused += place(layer, scratch, loads, m, kWasDisplaced);
    } else {
      loads[2 * m + 1] = scratch.settled[m - num_in_slots];
      layer.put(loads[2 * m], loads[2 * m + 1]);
    }
    layer.flags()[loads[2 * m]] = kInFlight | kUntouched;
  }
  team.sum(unused, &total);
  if (team.rank() == 0) {
    layer.header[kNumFree] -= num_in_slots - num_evictions;
    layer.header[kNumInFlight] += num_loads;
    layer.header[kNumPreloaded] += num_loads - num_in_slots;
    layer.header[kIssued] += num_loads;
    layer.header[kEvictions] += num_evictions;
    layer.header[kUnused] += total;
  }
  team.sync();
}

// Plans copies for `predicted` experts, most wanted first, at most `budget` of them, and marks them in flight.
// Prefetches that have landed are settled first, and those that are predicted no more and have not started are
// cancelled. `is_far`: a guess from more than one layer away, which spares what was needed within a round. `loads`:
// room for min(num_predicted, E) pairs (expert, slot), written. Returns their number.
template <class Team, class Ids, class CopyLane>
VEP_HD int plan_prefetch(Team& team, const Layer& layer, CopyLane& lane, const Ids& predicted, int num_predicted,
                         int budget, bool is_far, const Scratch& scratch, int32_t* loads) {
  find_first(team, layer, predicted, num_predicted, false, scratch);
  settle(team, layer, lane, scratch);
  int begin, end;
  share_of(team, num_predicted, &begin, &end);
  int64_t mine = 0;
  for (int i = begin; i < end; ++i) {
    mine += is_first(layer, predicted, i, scratch) && layer.row_of()[predicted[i]] == kNone;
  }
  int64_t num_absent = 0;
  int64_t before = team.sum(mine, &num_absent);
  const int64_t num_free = layer.header[kNumFree];
  const int64_t num_wanted = num_absent < budget ? num_absent : budget > 0 ? budget : 0;
  const int num_evictions = choose_victims(team, layer, scratch, num_wanted - num_free, is_far ? kFarRounds : 0);
  const int64_t num_places = num_free + num_evictions;
  const int64_t num_loads = num_wanted < num_places ? num_wanted : num_places;
  for (int i = begin; i < end && before < num_loads; ++i) {
    if (is_first(layer, predicted, i, scratch) && layer.row_of()[predicted[i]] == kNone) {
      loads[2 * before++] = static_cast<int32_t>(predicted[i]);
    }
  }
  team.sync();
  book_prefetch(team, layer, scratch, static_cast<int>(num_loads), static_cast<int>(num_loads), num_evictions, loads);
  return static_cast<int>(num_loads);
}

// Predicted ids, `per_token` of each token, read column by column: what each token wants most comes before what any of
// them wants less.
template <class Id>
struct MostWantedFirst {
  const Id* ids;
  int per_token;
  int num_tokens;
  VEP_HD Id operator[](int i) const { return ids[i % num_tokens * per_token + i / num_tokens]; }
};

// How many distinct experts `find_first` has found.
template <class Team>
VEP_HD int count_needed(Team& team, const Layer& layer, const Scratch& scratch) {
  int64_t mine = 0, total = 0;
  for (int expert = team.rank(); expert < layer.num_experts(); expert += team.size()) {
    mine += scratch.first[expert] != kNever;
  }
  team.sum(mine, &total);
  return static_cast<int>(total);
}

// Plans copies for all `predicted` experts, in the order of their tokens, ahead of a wide step. What the last tokens
// want takes slots as in such a step, the others take overflow rows, until the layer's next step gives them back.
// Settles and returns as `plan_prefetch` does.
template <class Team, class Ids, class CopyLane>
VEP_HD int plan_preload(Team& team, const Layer& layer, CopyLane& lane, const Ids& predicted, int num_predicted,
                        const Scratch& scratch, int32_t* loads) {
  find_first(team, layer, predicted, num_predicted, false, scratch);
  settle(team, layer, lane, scratch);
  find_last(team, layer, predicted, num_predicted, scratch);
  int begin, end;
  share_of(team, num_predicted, &begin, &end);
  const auto is_absent = [&](int i) {
    return is_first(layer, predicted, i, scratch) && layer.row_of()[predicted[i]] == kNone;
  };
  int64_t mine = 0, num_absent = 0;
  for (int i = begin; i < end; ++i) mine += is_absent(i);
  int64_t before = team.sum(mine, &num_absent);
  for (int i = begin; i < end; ++i) {
    if (is_absent(i)) scratch.missing[before++] = static_cast<int32_t>(predicted[i]);
  }
  team.sync();
  const int num_loads = static_cast<int>(num_absent);
  order_misses(team, scratch, num_loads, true, loads);
  const int64_t num_free = layer.header[kNumFree];
  const int num_evictions = choose_victims(team, layer, scratch, num_loads - num_free, kStaleRounds);
  const int64_t num_places = num_free + num_evictions;
  list_overflow_rows(team, layer, scratch);
  book_prefetch(team, layer, scratch, num_loads, static_cast<int>(num_loads < num_places ? num_loads : num_places),
                num_evictions, loads);
  return num_loads;
}

}  // namespace vep
