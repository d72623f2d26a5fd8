// A team of threads, as on a GPU, decides exactly as a team of one does. Under TSan this is also the race check of the
// device planner: both run csrc/residency.h.

#include "residency.h"

#include <barrier>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <random>
#include <thread>
#include <vector>

namespace {

class Threads {
 public:
  Threads(int rank, std::vector<int64_t>& sums, std::barrier<>& barrier) : rank_(rank), sums_(sums), barrier_(barrier) {}
  int rank() const { return rank_; }
  int size() const { return static_cast<int>(sums_.size()); }
  void sync() { barrier_.arrive_and_wait(); }
  int64_t sum(int64_t value, int64_t* total) {
    sync();
    sums_[static_cast<size_t>(rank_)] = value;
    sync();
    int64_t before = 0;
    *total = 0;
    for (int i = 0; i < size(); ++i) {
      before += i < rank_ ? sums_[static_cast<size_t>(i)] : 0;
      *total += sums_[static_cast<size_t>(i)];
    }
    return before;
  }

 private:
  int rank_;
  std::vector<int64_t>& sums_;
  std::barrier<>& barrier_;
};

// Prefetches that stand still during a plan: what `standing` says of a slot stays true.
struct Standing {
  const std::vector<int>* standing;  // 0 landed, 1 queued, 2 being copied
  bool landed(int slot) const { return (*standing)[static_cast<size_t>(slot)] == 0; }
  bool drop(int slot) const { return (*standing)[static_cast<size_t>(slot)] == 1; }
};

struct Room {
  explicit Room(const vep::Layer& layer, int num_ids)
      : memory(static_cast<size_t>(vep::Scratch::bytes(layer.num_experts(), layer.num_slots())) / 8 + 1),
        experts(static_cast<size_t>(num_ids) + 1), loads(2 * experts.size()), victims(experts.size()),
        late(experts.size()), slot_ids(experts.size()),
        scratch(vep::Scratch::at(memory.data(), layer.num_experts(), layer.num_slots())),
        lists{experts.data(), loads.data(), victims.data(), late.data()} {}
  std::vector<int64_t> memory;
  std::vector<int32_t> experts, loads, victims, late, slot_ids;
  vep::Scratch scratch;
  vep::WaveLists lists;
  vep::StepCounts counts;
  int result = 0;
};

struct Call {
  bool prefetch;
  std::vector<int32_t> ids;
  int budget;
  std::vector<int> standing;
};

template <class Team>
void run(Team& team, const vep::Layer& layer, const Call& call, Room& room) {
  Standing lane{&call.standing};
  const int num_ids = static_cast<int>(call.ids.size());
  vep::StepCounts counts;
  const int result =
      call.prefetch ? vep::plan_prefetch(team, layer, lane, call.ids.data(), num_ids, call.budget, room.scratch,
                                         room.lists, &counts)
                    : static_cast<int>(vep::plan_narrow(team, layer, lane, call.ids.data(), num_ids,
                                                        room.slot_ids.data(), room.scratch, room.lists, &counts));
  if (team.rank() == 0) {
    room.result = result;
    room.counts = counts;
    if (!call.prefetch && result == vep::kSplitNone) vep::count_step(layer, counts);
  }
  team.sync();
}

void run_in_threads(int num_threads, const vep::Layer& layer, const Call& call, Room& room) {
  std::vector<int64_t> sums(static_cast<size_t>(num_threads));
  std::barrier<> barrier(num_threads);
  std::vector<std::thread> threads;
  for (int rank = 0; rank < num_threads; ++rank) {
    threads.emplace_back([&, rank] {
      Threads team(rank, sums, barrier);
      run(team, layer, call, room);
    });
  }
  for (std::thread& thread : threads) thread.join();
}

void init(std::vector<int64_t>& words, int experts, int slots, int top_k, int policy) {
  words.assign(static_cast<size_t>(vep::Layer::words(experts, slots)), 0);
  words[vep::kNumExperts] = experts;
  words[vep::kNumSlots] = slots;
  words[vep::kTopK] = top_k;
  words[vep::kPolicy] = policy;
  words[vep::kNumFree] = slots;
  const vep::Layer layer{words.data()};
  for (int expert = 0; expert < experts; ++expert) layer.slot_of()[expert] = vep::kNone;
  for (int slot = 0; slot < slots; ++slot) {
    layer.expert_in()[slot] = vep::kNone;
    layer.free_slots()[slot] = slots - 1 - slot;
  }
}

bool same_plan(const Room& one, const Room& other, bool prefetch) {
  if (one.result != other.result || std::memcmp(&one.counts, &other.counts, sizeof one.counts) != 0) return false;
  if (!prefetch && one.result != vep::kSplitNone) return true;
  const auto equal = [](const std::vector<int32_t>& a, const std::vector<int32_t>& b, int count) {
    return std::memcmp(a.data(), b.data(), sizeof(int32_t) * static_cast<size_t>(count)) == 0;
  };
  const int misses = one.counts.num_misses;
  return equal(one.loads, other.loads, 2 * misses) && equal(one.victims, other.victims, misses) &&
         equal(one.experts, other.experts, one.counts.num_needed) &&
         equal(one.late, other.late, one.counts.num_late) &&
         equal(one.slot_ids, other.slot_ids, static_cast<int>(one.slot_ids.size()) - 1);
}

int walk(unsigned seed, int num_steps) {
  std::mt19937 random(seed);
  const auto below = [&](int limit) { return static_cast<int>(random() % static_cast<unsigned>(limit)); };
  const int experts = 2 + below(40), top_k = 1 + below(experts < 8 ? experts : 8);
  const int slots = top_k + below(experts - top_k + 1), threads = 2 + below(4);
  std::vector<int64_t> alone_words, team_words;
  init(alone_words, experts, slots, top_k, below(3));
  team_words = alone_words;
  const vep::Layer alone_layer{alone_words.data()}, team_layer{team_words.data()};
  for (int step = 0; step < num_steps; ++step) {
    Call call{below(3) == 0, {}, below(5), {}};
    const int num_ids = top_k * below(6);
    for (int i = 0; i < num_ids; ++i) call.ids.push_back(below(10) ? below(below(2) ? experts : (experts + 2) / 3) : -1);
    for (int slot = 0; slot < slots; ++slot) call.standing.push_back(below(3));
    Room one(alone_layer, num_ids), other(team_layer, num_ids);
    vep::Alone alone;
    run(alone, alone_layer, call, one);
    run_in_threads(threads, team_layer, call, other);
    if (!same_plan(one, other, call.prefetch) || alone_words != team_words) {
      std::fprintf(stderr, "walk %u differs at step %d: %d experts, %d slots, %d threads\n", seed, step, experts, slots,
                   threads);
      return 1;
    }
  }
  return 0;
}

}  // namespace

int main() {
  for (unsigned seed = 0; seed < 30; ++seed) {
    if (walk(seed, 40)) return 1;
  }
  return 0;
}
