// The planner on the GPU: one block per plan, a layer's state in device memory, nothing decided on the host.
//
// A plan is bookkeeping as if its copies had landed. Three things make that true before the layer's kernel runs: the
// gather kernel, next on the same stream, copies `loads`; it waits for `late`; and slots of prefetches that have not
// landed are never given away.
//
// The state, the ids and the loads are worked on in shared memory: a plan is a chain of some dozen short steps, and a
// round trip to global memory costs more than each of them.
#pragma once

#include "../record.h"
#include "../residency.h"
#include "../slot_state.h"

#ifdef __CUDACC__
#define VEP_DYNAMIC_SHARED(name) extern __shared__ int64_t name[]
#define VEP_WARP_THREADS 32
__device__ inline int32_t load_relaxed(const int32_t* place) {
  return *const_cast<const volatile int32_t*>(place);
}
#endif  // else tests/native/cpp/cuda_on_host.h: a block of host threads

namespace vep {
namespace {

constexpr int kWarp = VEP_WARP_THREADS;
constexpr int kMaxWarps = 32;
constexpr int kMaxExperts = 1024;
constexpr int kMaxGhosts = 4;

// The lanes are the threads of a block.
template <int kThreads>
class Block {
 public:
  __device__ explicit Block(int64_t* sums) : sums_(sums) {}
  __device__ int rank() const { return static_cast<int>(threadIdx.x); }
  __device__ int size() const { return kThreads; }
  __device__ void sync() const { __syncthreads(); }
  __device__ int64_t sum(int64_t value, int64_t* total) const {
    const int lane = rank() % kWarp, warp = rank() / kWarp;
    int64_t inclusive = value;
    for (int distance = 1; distance < kWarp; distance *= 2) {
      const int64_t other = __shfl_up_sync(~0u, inclusive, distance);
      if (lane >= distance) inclusive += other;
    }
    __syncthreads();
    if (lane == kWarp - 1) sums_[warp] = inclusive;
    __syncthreads();
    int64_t before = 0, all = 0;
    for (int i = 0; i < kThreads / kWarp; ++i) {
      before += i < warp ? sums_[i] : 0;
      all += sums_[i];
    }
    *total = all;
    return before + inclusive - value;
  }
  // A look first: where many lanes ask for one place, most find that it holds enough already.
  __device__ void lower(int32_t* place, int32_t value) const {
    if (load_relaxed(place) > value) atomicMin(place, value);
  }
  __device__ void raise(int32_t* place, int32_t value) const {
    if (load_relaxed(place) < value) atomicMax(place, value);
  }

 private:
  int64_t* sums_;  // shared, one per warp
};

// A layer in device memory. `num_words` of `state`; `rows`: (E) words of slot_state.h; `errors`, `queued`: as in
// record.h's Board and Lane; `mirror`: kHeaderWords in host memory, or null.
struct LayerMemory {
  int64_t* state;
  int num_words;
  int32_t* rows;
  const int32_t* errors;
  int32_t* queued;
  int64_t* mirror;
};

// Routed ids, `per_token` of each token, of which the first `num_counting` count; those of padding tokens are as -1.
// `real` is negative for padding: vLLM's slot mapping, which is on the device, also while a graph with more tokens than
// requests is replayed.
template <class Id>
struct TokenIds {
  const Id* ids;
  const int64_t* real;  // (tokens)
  int per_token;
  int num_counting;
  __device__ Id operator[](int i) const {
    return real[i / per_token] < 0 || i % per_token >= num_counting ? Id{-1} : ids[i];
  }
};

// Predicted ids, laid out in the same way and read column by column, as in MostWantedFirst.
template <class Id>
struct PredictedIds {
  TokenIds<Id> tokens;
  int num_tokens;
  __device__ Id operator[](int i) const { return tokens[i % num_tokens * tokens.per_token + i / num_tokens]; }
};

// What a plan leaves for the kernels that copy. `loads` has room for E pairs (expert, row).
struct Orders {
  int32_t* loads;
  int32_t* num_loads;  // (1)
  int32_t* extra;      // (E) demand: late rows to wait for; prefetch: the tickets of `loads`
  int32_t* num_extra;  // (1), demand only
};

// Larger caches of a layer, which hold no records: what they would find is counted, and nothing is ever on its way to
// them. Their states lie one after another, their words in host memory likewise.
struct Ghosts {
  int64_t* states = nullptr;
  int64_t* mirror = nullptr;
  int number = 0;
  int num_words[kMaxGhosts] = {};

  __device__ LayerMemory at(int ghost) const {
    int64_t* state = states;
    int own_words = num_words[0];
    VEP_PRAGMA(unroll)  // an index that is known only as it runs would put the array into local memory
    for (int i = 0; i + 1 < kMaxGhosts; ++i) {
      if (i >= ghost) continue;
      state += num_words[i];
      own_words = num_words[i + 1];
    }
    return {state, own_words, nullptr, nullptr, nullptr, mirror + ghost * kHeaderWords};
  }
};

// The block's shared memory, with a copy of the layer's state in it.
template <int kThreads>
struct Desk {
  Block<kThreads> team;
  Layer layer;
  Scratch scratch;
  int32_t* ids;    // (E): what is planned
  int32_t* loads;  // (E, 2)

  __device__ static Desk open(int64_t* shared, const LayerMemory& memory) {
    Block<kThreads> team(shared);
    int64_t* state = shared + kMaxWarps;
    for (int i = team.rank(); i < memory.num_words; i += team.size()) state[i] = memory.state[i];
    team.sync();
    const Layer layer(state);
    const int num_experts = layer.num_experts(), num_slots = layer.num_slots();
    auto* scratch = reinterpret_cast<char*>(state + memory.num_words);
    auto* ids = reinterpret_cast<int32_t*>(scratch + Scratch::bytes(num_experts, num_slots));
    return {team, layer, Scratch::at(scratch, num_experts, num_slots), ids, ids + num_experts};
  }

  // Prefetches of this layer that a plan has cancelled or claimed, so far.
  __device__ int64_t num_taken_back() const { return layer.header[kCancelled] + layer.header[kClaimed]; }

  // `num_queued`: by how many more or fewer prefetches wait for their copy.
  __device__ void close(const LayerMemory& memory, int64_t num_queued) const {
    team.sync();
    if (team.rank() == 0 && num_queued) atomicAdd(memory.queued, static_cast<int32_t>(num_queued));
    for (int i = team.rank(); i < memory.num_words; i += team.size()) memory.state[i] = layer.header[i];
    if (memory.mirror) {
      volatile int64_t* mirror = memory.mirror;
      for (int i = team.rank(); i < kHeaderWords; i += team.size()) mirror[i] = layer.header[i];
    }
  }
};

inline int64_t shared_bytes(int64_t num_experts, int64_t num_slots) {
  const int64_t words = kMaxWarps + Layer::words(num_experts, num_slots);
  return 8 * words + Scratch::bytes(static_cast<int>(num_experts), static_cast<int>(num_slots)) + 12 * num_experts;
}

// Puts what is to be planned into desk.ids, and returns how many: the ids as they are, or, where these are more than
// experts, each needed expert once, in the order that decides: that of first appearance, or, where there are too few
// slots and it `may_be_wide`, of last appearance. `entry` then receives the index of the first id that asks for any
// expert, else kNever.
template <class Desk, class Ids>
__device__ int list_ids(Desk& desk, const Ids& ids, int num_ids, bool is_step, bool may_be_wide, int32_t* entry) {
  auto& team = desk.team;
  const Layer& layer = desk.layer;
  const int num_experts = layer.num_experts();
  *entry = kNever;
  if (num_ids <= num_experts) {
    for (int i = team.rank(); i < num_ids; i += team.size()) {
      const int64_t expert = static_cast<int64_t>(ids[i]);
      desk.ids[i] = static_cast<int32_t>(expert < 0 ? kNone : expert < num_experts ? expert : num_experts);
    }
    team.sync();
    return num_ids;
  }
  find_first(team, layer, ids, num_ids, is_step, desk.scratch);
  *entry = *desk.scratch.entry;
  const int num_needed = count_needed(team, layer, desk.scratch);
  const bool by_last = may_be_wide && num_needed > layer.num_slots();
  if (by_last) find_last(team, layer, ids, num_ids, desk.scratch);
  const int32_t* at = by_last ? desk.scratch.last : desk.scratch.first;
  for (int expert = team.rank(); expert < num_experts; expert += team.size()) {
    if (desk.scratch.first[expert] == kNever) continue;
    int place = by_last ? num_needed - num_experts : 0;  // the others' last is before all
    for (int other = 0; other < num_experts; ++other) place += at[other] < at[expert];
    desk.ids[place] = expert;
  }
  team.sync();
  return num_needed;
}

// Records that a prefetch brings and that must be there before the kernel: one that has not started becomes a load of
// ours, any other is waited for. `num_misses` loads stand in the list already. Returns how many there are then.
template <class Desk>
__device__ int take_over_late(Desk& desk, int32_t* rows, const StepCounts& step, const Orders& orders) {
  constexpr int64_t kWaits = 1ll << 32;
  auto& team = desk.team;
  const Layer& layer = desk.layer;
  int begin, end;
  share_of(team, step.num_late + step.num_awaited, &begin, &end);
  int64_t mine = 0;
  for (int i = begin; i < end; ++i) {
    const int32_t row = row_after(layer, desk.scratch, desk.scratch.late[i]);
    const bool ours = claim(&rows[row]);
    if (!ours) request(&rows[row]);
    desk.scratch.settled[i] = ours;
    mine += ours ? 1 : kWaits;
  }
  int64_t total = 0;
  int64_t before = team.sum(mine, &total);
  for (int i = begin; i < end; ++i) {
    const int32_t expert = desk.scratch.late[i];
    const int32_t row = row_after(layer, desk.scratch, expert);
    if (desk.scratch.settled[i]) {
      const int64_t m = step.num_misses + before % kWaits;
      desk.loads[2 * m] = expert;
      desk.loads[2 * m + 1] = row;
      before += 1;
    } else {
      orders.extra[before / kWaits] = row;
      before += kWaits;
    }
  }
  if (team.rank() == 0) {
    *orders.num_loads = static_cast<int32_t>(step.num_misses + total % kWaits);
    *orders.num_extra = static_cast<int32_t>(total / kWaits);
    layer.header[kClaimed] += total % kWaits;
    layer.header[kDemanded] += total % kWaits;
  }
  team.sync();
  return static_cast<int>(step.num_misses + total % kWaits);
}

template <class Desk>
__device__ void write_loads(const Desk& desk, int num_loads, const Orders& orders) {
  for (int i = desk.team.rank(); i < 2 * num_loads; i += desk.team.size()) orders.loads[i] = desk.loads[i];
}

// `row_ids` receives the row of each id. Block 0 plans the layer's step; each block behind it plans and counts the same
// step for one of the `ghosts`, and leaves no orders.
template <int kThreads, class Id>
__global__ void __launch_bounds__(kThreads, 1)
    plan_step_kernel(const LayerMemory own, const TokenIds<Id> ids, const int num_ids, Id* row_ids, const Orders orders,
                     const bool is_speculated, const Ghosts ghosts) {
  VEP_DYNAMIC_SHARED(shared);
  const bool is_ghost = blockIdx.x > 0;
  // Asked for at both ends: held all the while, it would take registers that there are too few of.
  const auto memory = [&] { return is_ghost ? ghosts.at(static_cast<int>(blockIdx.x) - 1) : own; };
  auto desk = Desk<kThreads>::open(shared, memory());
  auto& team = desk.team;
  const Layer& layer = desk.layer;
  SlotWords lane{own.rows};  // of which a ghost asks for none
  const int64_t taken_back_before = desk.num_taken_back();
  int32_t entry;
  const int num_listed = list_ids(desk, ids, num_ids, true, true, &entry);
  const StepCounts step =
      plan_step(team, layer, lane, const_cast<const int32_t*>(desk.ids), num_listed, desk.scratch, desk.loads);
  if (!is_ghost) {
    if (team.rank() == 0 && entry != kNever) *desk.scratch.entry = entry;
    for (int m = team.rank(); m < step.num_misses; m += team.size()) begin_load(&own.rows[desk.loads[2 * m + 1]]);
    write_loads(desk, take_over_late(desk, own.rows, step, orders), orders);
    write_rows(team, layer, ids, ids.ids, num_ids, row_ids, desk.scratch);
  }
  team.sync();
  if (team.rank() == 0) {
    count_step(layer, step, is_speculated);
    if (!is_ghost) layer.header[kErrors] = load_relaxed(own.errors);
  }
  desk.close(memory(), taken_back_before - desk.num_taken_back());
}

// At most `wanted[0]` and at most `most` loads, of the first `wanted[1]` guesses of each token. `is_far`: as in
// residency.h, and what is queued already counts towards wanted[0]. `preloads`: where the first top-k guesses are more
// experts than there are slots, plan_preload of these instead; where nothing is wanted, only ahead of a step with more
// routed ids than experts.
template <int kThreads, class Id>
__global__ void __launch_bounds__(kThreads, 1)
    plan_prefetch_kernel(const LayerMemory memory, const PredictedIds<Id> ids, const int num_ids,
                         const volatile int32_t* wanted, const int most, const bool is_far, const bool preloads,
                         const Orders orders) {
  VEP_DYNAMIC_SHARED(shared);
  if (threadIdx.x == 0) {  // by one thread, once: the host may change them in between
    shared[0] = wanted[0] - (is_far ? max(0, load_relaxed(memory.queued)) : 0);
    shared[1] = wanted[1];
  }
  auto desk = Desk<kThreads>::open(shared, memory);
  auto& team = desk.team;
  const int budget = min(static_cast<int>(shared[0]), most);
  const int num_counting = min(num_ids, max(0, static_cast<int>(shared[1])) * ids.num_tokens);
  SlotWords lane{memory.rows};
  const int64_t taken_back_before = desk.num_taken_back();
  const auto* listed = const_cast<const int32_t*>(desk.ids);
  int32_t entry;
  int num_loads;
  int num_needed = 0, num_preloaded = 0;
  TokenIds<Id> tokens = ids.tokens;
  tokens.num_counting = static_cast<int>(desk.layer.header[kTopK]);
  if (preloads && (budget > 0 || ids.num_tokens * tokens.num_counting > desk.layer.num_experts())) {
    num_preloaded = list_ids(desk, tokens, num_ids, false, true, &entry);
    find_first(team, desk.layer, listed, num_preloaded, false, desk.scratch);
    num_needed = count_needed(team, desk.layer, desk.scratch);
  }
  if (num_needed > desk.layer.num_slots()) {
    num_loads = plan_preload(team, desk.layer, lane, listed, num_preloaded, desk.scratch, desk.loads);
  } else {
    const int num_listed = list_ids(desk, ids, num_counting, false, false, &entry);
    num_loads = plan_prefetch(team, desk.layer, lane, listed, num_listed, budget, is_far, desk.scratch, desk.loads);
  }
  for (int m = team.rank(); m < num_loads; m += team.size()) {
    orders.extra[m] = static_cast<int32_t>(enqueue(&memory.rows[desk.loads[2 * m + 1]]));
  }
  if (team.rank() == 0) *orders.num_loads = num_loads;
  write_loads(desk, num_loads, orders);
  const LayerMemory unseen{memory.state, memory.num_words, memory.rows, memory.errors, memory.queued, nullptr};
  desk.close(unseen, num_loads + taken_back_before - desk.num_taken_back());
}

}  // namespace
}  // namespace vep
