// The plan kernels as blocks of host threads decide exactly as one thread does with csrc/residency.h: narrow steps and
// wide ones, of few ids and of many, with padding, prefetches in every state, and late records taken over. Under TSan
// this is also the race check of the planner's teams.

// Before the rest: what the kernels are written in.
#include "cuda_on_host.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <thread>
#include <utility>
#include <vector>

#include "cuda/plan_kernels.cuh"

namespace {

using namespace vep;

constexpr int kThreads = 4;

#define REQUIRE(condition)                                               \
  if (!(condition)) {                                                    \
    std::fprintf(stderr, "line %d: not so: %s\n", __LINE__, #condition); \
    std::_Exit(1);                                                       \
  }

std::mt19937 random_source(7);

int pick(int low, int high) {
  return low + static_cast<int>(random_source() % static_cast<unsigned>(high - low + 1));
}

// Runs `kernel` as one block, number `block`.
template <class Kernel>
void launch(int64_t shared_size, Kernel kernel, unsigned block = 0) {
  std::vector<int64_t> shared(static_cast<size_t>(shared_size / 8 + 1), 0x5A5A5A5A5A5A5A5A);
  std::barrier<> barrier(kThreads);
  std::vector<std::thread> threads;
  for (unsigned rank = 0; rank < kThreads; ++rank) {
    threads.emplace_back([&, rank] {
      threadIdx.x = rank;
      blockIdx.x = block;
      dynamic_shared = shared.data();
      block_barrier = &barrier;
      kernel();
    });
  }
  for (std::thread& thread : threads) thread.join();
}

// What a plan leaves for the kernels that copy, and the rows of a step.
struct Outcome {
  Outcome(int num_experts, size_t num_ids)
      : loads(static_cast<size_t>(2 * num_experts)), extra(static_cast<size_t>(num_experts)), rows(num_ids, -9) {}
  Orders orders() { return {loads.data(), &num_loads, extra.data(), &num_extra}; }
  std::vector<std::pair<int, int>> listed() const {
    std::vector<std::pair<int, int>> pairs;
    for (size_t m = 0; m < static_cast<size_t>(num_loads); ++m) pairs.emplace_back(loads[2 * m], loads[2 * m + 1]);
    return pairs;
  }

  std::vector<int32_t> loads, extra, rows;
  int32_t num_loads = -1, num_extra = -1;
};

struct TestLayer {
  TestLayer(int num_experts, int num_slots, int top_k, int policy)
      : state(static_cast<size_t>(Layer::words(num_experts, num_slots))), words(static_cast<size_t>(num_experts)) {
    state[kNumExperts] = num_experts;
    state[kNumSlots] = state[kNumFree] = num_slots;
    state[kTopK] = top_k;
    state[kPolicy] = policy;
    for (int expert = 0; expert < num_experts; ++expert) layer().row_of()[expert] = layer().expert_in()[expert] = kNone;
    for (int slot = 0; slot < num_slots; ++slot) layer().free_slots()[slot] = num_slots - 1 - slot;
  }
  Layer layer() { return {state.data()}; }
  LayerMemory memory(int64_t* mirror) {
    return {state.data(), static_cast<int>(state.size()), words.data(), &errors, &queued, mirror};
  }
  bool same(const TestLayer& other) const { return state == other.state && words == other.words; }
  int32_t count_queued() const {
    return static_cast<int32_t>(
        std::count_if(words.begin(), words.end(), [](int32_t word) { return state_of(word) == SlotState::kQueued; }));
  }

  std::vector<int64_t> state;
  std::vector<int32_t> words;
  int32_t queued = 0, errors = 0;  // as the kernels count
};

// One thread that does what the kernels do.
struct Reference {
  Reference(TestLayer& made, int num_ids)
      : made(made),
        layer(made.layer()),
        num_experts(layer.num_experts()),
        memory(static_cast<size_t>(Scratch::bytes(num_experts, layer.num_slots())) / 8 + 1),
        loads(static_cast<size_t>(2 * std::max(num_experts, num_ids))),
        scratch(Scratch::at(memory.data(), num_experts, layer.num_slots())) {}

  void step(const TokenIds<int32_t>& ids, int num_ids, bool is_speculated, Outcome& out) {
    Alone team;
    SlotWords lane{made.words.data()};
    const StepCounts counts = plan_step(team, layer, lane, ids, num_ids, scratch, loads.data());
    out.num_loads = counts.num_misses;
    out.num_extra = 0;
    for (int m = 0; m < counts.num_misses; ++m) begin_load(&made.words[static_cast<size_t>(loads[2 * m + 1])]);
    for (int i = 0; i < counts.num_late + counts.num_awaited; ++i) {
      const int32_t expert = scratch.late[i];
      const int32_t row = row_after(layer, scratch, expert);
      int32_t* word = &made.words[static_cast<size_t>(row)];
      if (claim(word)) {
        loads[2 * out.num_loads] = expert;
        loads[2 * out.num_loads++ + 1] = row;
        layer.header[kClaimed] += 1;
        layer.header[kDemanded] += 1;
      } else {
        request(word);
        out.extra[static_cast<size_t>(out.num_extra++)] = row;
      }
    }
    write_rows(team, layer, ids, ids.ids, num_ids, out.rows.data(), scratch);
    count_step(layer, counts, is_speculated);
    layer.header[kErrors] = made.errors;
    std::copy_n(loads.begin(), 2 * out.num_loads, out.loads.begin());
  }

  // `num_preloaded`: of how many ids, if they ask for more experts than slots, a plan_preload is made.
  void prefetch(const PredictedIds<int32_t>& ids, int num_ids, int budget, bool is_far, int num_preloaded,
                Outcome& out) {
    Alone team;
    SlotWords lane{made.words.data()};
    TokenIds<int32_t> tokens = ids.tokens;
    tokens.num_counting = static_cast<int>(layer.header[kTopK]);
    find_first(team, layer, tokens, num_preloaded, false, scratch);
    if (count_needed(team, layer, scratch) > layer.num_slots()) {
      out.num_loads = plan_preload(team, layer, lane, tokens, num_preloaded, scratch, loads.data());
    } else {
      out.num_loads = plan_prefetch(team, layer, lane, ids, num_ids, budget, is_far, scratch, loads.data());
    }
    for (int m = 0; m < out.num_loads; ++m) {
      const auto slot = static_cast<size_t>(loads[2 * m + 1]);
      out.extra[static_cast<size_t>(m)] = static_cast<int32_t>(enqueue(&made.words[slot]));
    }
    std::copy_n(loads.begin(), 2 * out.num_loads, out.loads.begin());
  }

  TestLayer& made;
  Layer layer;
  int num_experts;
  std::vector<int64_t> memory;
  std::vector<int32_t> loads;
  Scratch scratch;
};

// Some queued copies start, some running ones land; all that steps wait for or copy has landed.
void play_lane(TestLayer& layer) {
  for (int32_t& word : layer.words) {
    SlotState state = state_of(word);
    if (state == SlotState::kClaimed || state == SlotState::kUrgent) state = SlotState::kReady;
    const int chance = pick(0, 2);
    if (state == SlotState::kQueued && chance > 0) state = SlotState::kCopying;
    if (state == SlotState::kCopying && chance > 1) state = SlotState::kReady;
    word = word_of(ticket_of(word), state);
  }
  layer.queued = layer.count_queued();
}

struct Totals {
  int64_t wide = 0, overflow = 0, claimed = 0, late = 0, cancelled = 0, used = 0, many_ids = 0, held_back = 0,
          preloaded = 0, shut = 0, ghost_hits = 0;
};

void walk(Totals& totals) {
  const int num_experts = pick(2, 40), top_k = pick(1, std::min(num_experts, 8));
  TestLayer one(num_experts, pick(top_k, num_experts), top_k, pick(0, 3));
  std::vector<TestLayer> larger;
  for (int i = 0; i < 2; ++i) {
    larger.emplace_back(num_experts, pick(one.layer().num_slots(), num_experts), top_k, pick(0, 3));
  }
  const int64_t shared = shared_bytes(num_experts, num_experts);
  for (int number = 0; number < 40; ++number) {
    TestLayer other = one;
    const int num_tokens = pick(1, pick(0, 1) ? 3 : 20), spread = pick(0, 1) ? num_experts : (num_experts + 2) / 3;
    std::vector<int32_t> ids;
    std::vector<int64_t> real, mirror(kHeaderWords);
    for (int token = 0; token < num_tokens; ++token) real.push_back(pick(0, 5) ? 3 : -1);
    const int per_token = pick(0, 2) ? top_k : pick(0, 1) ? top_k + 1 : std::max(1, top_k / 2);
    const int num_ids = num_tokens * per_token;
    for (int i = 0; i < num_ids; ++i) {
      ids.push_back(pick(0, 9) ? pick(0, spread - 1) : pick(0, 5) ? -1 : num_experts + pick(0, 3));
    }
    Outcome expected(num_experts, ids.size()), found(num_experts, ids.size());
    Reference reference(one, num_ids);
    if (pick(0, 2) == 0) {
      const PredictedIds<int32_t> predicted{{ids.data(), real.data(), per_token, per_token}, num_tokens};
      const bool preloads = pick(0, 2);
      const int32_t wanted[] = {pick(-1, 6), pick(0, per_token + 1)};
      const int num_counting = std::min(wanted[1], per_token) * num_tokens;
      const bool is_far = pick(0, 1);
      const int budget = wanted[0] - (is_far ? one.queued : 0);
      totals.held_back += budget != wanted[0];
      const bool is_asked = preloads && (budget > 0 || num_tokens * top_k > num_experts);
      totals.shut += preloads && !is_asked;
      reference.prefetch(predicted, num_counting, std::min(budget, one.layer().num_slots()), is_far,
                         is_asked ? num_ids : 0, expected);
      totals.preloaded += one.state[kNumPreloaded];
      launch(shared, [&] {
        plan_prefetch_kernel<kThreads, int32_t>(other.memory(nullptr), predicted, num_ids, wanted,
                                                other.layer().num_slots(), is_far, preloads, found.orders());
      });
      found.num_extra = expected.num_extra;
    } else {
      const TokenIds<int32_t> routed{ids.data(), real.data(), per_token, per_token};
      const bool is_speculated = pick(0, 4) == 0;
      reference.step(routed, num_ids, is_speculated, expected);
      std::vector<int64_t> states, ghost_mirror(2 * kHeaderWords);
      for (TestLayer& ghost : larger) states.insert(states.end(), ghost.state.begin(), ghost.state.end());
      const Ghosts ghosts{states.data(),
                          ghost_mirror.data(),
                          2,
                          {static_cast<int>(larger[0].state.size()), static_cast<int>(larger[1].state.size())}};
      for (unsigned block = 0; block < 3; ++block) {
        launch(
            shared,
            [&] {
              plan_step_kernel<kThreads, int32_t>(other.memory(mirror.data()), routed, num_ids, found.rows.data(),
                                                  found.orders(), is_speculated, ghosts);
            },
            block);
      }
      auto* state = states.data();
      auto* shown = ghost_mirror.data();
      for (TestLayer& ghost : larger) {
        Outcome ignored(num_experts, ids.size());
        Reference(ghost, num_ids).step(routed, num_ids, is_speculated, ignored);
        REQUIRE(std::equal(ghost.state.begin(), ghost.state.end(), state));
        REQUIRE(std::equal(shown, shown + kHeaderWords, state));
        state += ghost.state.size();
        shown += kHeaderWords;
        totals.ghost_hits += ghost.state[kHits];
      }
      REQUIRE(std::memcmp(mirror.data(), other.state.data(), sizeof(int64_t) * kHeaderWords) == 0);
      totals.many_ids += num_ids > num_experts;
    }
    auto loads = expected.listed(), other_loads = found.listed();
    if (num_ids > num_experts) {  // late records may then come in any order
      for (auto* list : {&loads, &other_loads}) std::sort(list->begin(), list->end());
      for (auto* list : {&expected.extra, &found.extra}) std::sort(list->begin(), list->end());
    }
    REQUIRE(loads == other_loads);
    REQUIRE(expected.num_extra == found.num_extra && expected.extra == found.extra);
    REQUIRE(expected.rows == found.rows);
    REQUIRE(one.same(other));
    REQUIRE(other.queued == other.count_queued());
    play_lane(one);
    one.errors += pick(0, 1);
  }
  totals.wide += one.state[kWideSteps];
  totals.overflow += one.state[kOverflow];
  totals.claimed += one.state[kClaimed];
  totals.late += one.state[kLate];
  totals.cancelled += one.state[kCancelled];
  totals.used += one.state[kUsed];
}

}  // namespace

int main() {
  Totals totals;
  for (int i = 0; i < 60; ++i) walk(totals);
  REQUIRE(totals.wide > 0 && totals.overflow > 0 && totals.late > totals.claimed && totals.claimed > 0);
  REQUIRE(totals.cancelled > 0 && totals.used > 0 && totals.many_ids > 0 && totals.held_back > 0);
  REQUIRE(totals.preloaded > 0 && totals.shut > 0 && totals.ghost_hits > 0);
  return 0;
}
