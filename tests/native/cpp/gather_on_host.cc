// The staging kernels as host threads, blocks of one thread: demands and prefetches of random layers race, with fewer
// running blocks than a grid has. Every record that a plan asks for is whole when the demand kernel ends, what was
// cancelled is untouched, bad loads are counted, and all ends.

// Before the rest: what the kernels are written in.
#define VEP_SLOW_COPIES
#include "cuda_on_host.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

#include "cuda/gather_kernels.cuh"

namespace {

using namespace vep;

constexpr int kLayers = 100;
constexpr int kSteps = 4;
constexpr char kPoison = '\xA5';

#define REQUIRE(condition)                                               \
  if (!(condition)) {                                                    \
    std::fprintf(stderr, "line %d: not so: %s\n", __LINE__, #condition); \
    std::_Exit(1);                                                       \
  }

std::mt19937 random_source(7);

int pick(int low, int high) {
  return low + static_cast<int>(random_source() % static_cast<unsigned>(high - low + 1));
}

// A kernel of `num_blocks`, of which `num_running` at a time run.
template <class Kernel>
void launch(std::vector<std::thread>& threads, int num_blocks, int num_running, Kernel kernel) {
  auto next = std::make_shared<std::atomic<int>>(0);
  for (int i = 0; i < num_running; ++i) {
    threads.emplace_back([=] {
      for (int block; (block = next->fetch_add(1)) < num_blocks;) {
        blockIdx.x = static_cast<unsigned>(block);
        gridDim.x = static_cast<unsigned>(num_blocks);
        kernel();
      }
    });
  }
}

void join(std::vector<std::thread>& threads) {
  for (std::thread& thread : threads) thread.join();
}

struct TestLayer {
  RecordLayout layout{};
  std::vector<std::vector<uint4>> memory;
  std::vector<int32_t> words, lane_words = std::vector<int32_t>(lane_ints());
  Board board;
  Lane lane;

  TestLayer() {
    layout.num_experts = pick(3, 12);
    layout.num_segments = pick(1, 4);
    for (int s = 0; s < layout.num_segments; ++s) {
      const int row = pick(1, s == 0 ? 600 : 40), store_stride = row + pick(0, 4);
      memory.emplace_back(static_cast<size_t>(layout.num_experts * store_stride));
      for (uint4& vector : memory.back()) vector = uint4(static_cast<uint32_t>(random_source()));
      auto* store = reinterpret_cast<const char*>(memory.back().data());
      memory.emplace_back(static_cast<size_t>(layout.num_experts * row));
      auto* rows = reinterpret_cast<char*>(memory.back().data());
      // Rows of scales are no multiple of a vector, nor always of four bytes.
      const int row_bytes = s > 0 && pick(0, 2) == 0 ? pick(1, 16 * row) : 16 * row;
      layout.segments[s] = {store, 16 * store_stride, rows, row_bytes};
      layout.record_vectors += static_cast<int32_t>(vectors_of(row_bytes));
    }
    words.resize(static_cast<size_t>(board_ints(layout.num_experts)));
    board = board_at(words.data(), layout.num_experts);
    lane = lane_at(lane_words.data());
  }

  void poison() {
    for (size_t i = 1; i < memory.size(); i += 2) {
      std::memset(static_cast<void*>(memory[i].data()), kPoison, 16 * memory[i].size());
    }
  }

  bool holds(const Load& load) const {
    bool same = is_ready(&board.states[load.row]);
    for (int s = 0; s < layout.num_segments; ++s) {
      const Segment& segment = layout.segments[s];
      same = same && std::memcmp(segment.rows + load.row * segment.row_bytes,
                                 segment.store + load.expert * segment.store_stride,
                                 static_cast<size_t>(segment.row_bytes)) == 0;
    }
    return same;
  }

  bool is_untouched(int number) const {
    for (int s = 0; s < layout.num_segments; ++s) {
      const char* row = layout.segments[s].rows + number * layout.segments[s].row_bytes;
      for (int64_t i = 0; i < layout.segments[s].row_bytes; ++i) {
        if (row[i] != kPoison) return false;
      }
    }
    return true;
  }
};

// A list with room for every row.
template <class Item>
struct List {
  std::vector<Item> items;
  int32_t count = 0;

  explicit List(int room) : items(static_cast<size_t>(room)) {}
  void add(Item item) { items[static_cast<size_t>(count++)] = item; }
  DeviceList<Item> view() const { return {items.data(), &count, static_cast<int32_t>(items.size())}; }
};

struct Totals {
  long late = 0, claimed = 0, dropped = 0;
};

enum class Fate { kIgnored, kNeeded, kDropped };

// What the planner does with a queued record; `queued`: how many are, by its account.
Fate decide(int32_t* word, const Load& load, List<Load>& loads, List<int32_t>& late, Totals& totals, int32_t* queued) {
  const int wish = pick(0, 2);
  if (wish == 1) {
    if (is_ready(word)) return Fate::kNeeded;
    if (claim(word)) {
      loads.add(load);
      ++totals.claimed;
      __atomic_fetch_sub(queued, 1, __ATOMIC_RELAXED);
    } else {
      if (pick(0, 1)) request(word);
      late.add(load.row);
      ++totals.late;
    }
    return Fate::kNeeded;
  }
  if (wish == 2 && drop(word)) {
    ++totals.dropped;
    __atomic_fetch_sub(queued, 1, __ATOMIC_RELAXED);
    return Fate::kDropped;
  }
  return Fate::kIgnored;
}

void run_step(TestLayer& layer, Totals& totals) {
  const int num_experts = layer.layout.num_experts;
  Board& board = layer.board;
  layer.poison();
  std::vector<int> experts(static_cast<size_t>(num_experts)), rows(static_cast<size_t>(num_experts));
  std::iota(experts.begin(), experts.end(), 0);
  std::iota(rows.begin(), rows.end(), 0);
  std::shuffle(experts.begin(), experts.end(), random_source);
  std::shuffle(rows.begin(), rows.end(), random_source);
  std::vector<Load> pairs;  // the first ones are prefetched, the next ones demanded, the others left alone
  for (size_t i = 0; i < rows.size(); ++i) pairs.push_back({experts[i], rows[i]});
  const int num_ahead = pick(0, num_experts), num_demanded = pick(0, num_experts - num_ahead);

  List<Load> ahead(num_experts), loads(num_experts);
  List<int32_t> tickets(num_experts), late(num_experts);
  int num_errors = 0;
  for (int i = 0; i < num_ahead; ++i) {
    ahead.add(pairs[i]);
    tickets.add(static_cast<int32_t>(enqueue(&board.states[pairs[i].row])));
  }
  if (num_ahead < num_experts && pick(0, 3) == 0) {
    ahead.add({num_experts, 0});
    ++num_errors;
  }
  *layer.lane.queued = num_ahead;
  std::vector<std::thread> prefetch, demand;
  const int num_blocks = pick(1, 6), chunk = pick(1, 100), start = pick(0, 2);
  const auto start_prefetch = [&] {
    launch(prefetch, num_blocks, pick(1, num_blocks), [&layer, &ahead, &tickets, chunk] {
      prefetch_kernel(layer.layout, {ahead.view(), tickets.items.data()}, layer.board, layer.lane, chunk);
    });
  };
  if (start > 0) start_prefetch();  // else not before the demand has ended: nothing may rely on it
  if (start == 2) std::this_thread::sleep_for(std::chrono::microseconds(pick(0, 300)));

  for (int i = num_ahead; i < num_ahead + num_demanded; ++i) {
    begin_load(&board.states[pairs[i].row]);
    loads.add(pairs[i]);
  }
  std::vector<Fate> fates;
  for (int i = 0; i < num_ahead; ++i) {
    fates.push_back(decide(&board.states[pairs[i].row], pairs[i], loads, late, totals, layer.lane.queued));
  }
  if (loads.count < num_experts && pick(0, 3) == 0) {
    loads.add({0, num_experts});
    ++num_errors;
  }
  const int num_demand_blocks = pick(1, 7);
  launch(demand, num_demand_blocks, pick(1, num_demand_blocks),
         [&] { gather_kernel(layer.layout, {loads.view(), late.view()}, layer.board, layer.lane); });
  join(demand);
  for (int i = 0; i < num_ahead + num_demanded; ++i) {
    if (i >= num_ahead || fates[i] == Fate::kNeeded) REQUIRE(layer.holds(pairs[i]));
  }
  if (start == 0) start_prefetch();
  join(prefetch);
  for (int i = 0; i < num_experts; ++i) {
    const bool is_left = i >= num_ahead + num_demanded || (i < num_ahead && fates[i] == Fate::kDropped);
    REQUIRE(is_left ? layer.is_untouched(pairs[i].row) : layer.holds(pairs[i]));
  }
  REQUIRE(*layer.lane.demand_active == 0 && *layer.lane.queued == 0);
  REQUIRE(*board.errors == num_errors);
  *board.errors = 0;
  for (size_t i = static_cast<size_t>(num_experts); i < layer.words.size(); ++i) REQUIRE(layer.words[i] == 0);
}

}  // namespace

int main() {
  Totals totals;
  for (int i = 0; i < kLayers; ++i) {
    TestLayer layer;
    for (int step = 0; step < kSteps; ++step) run_step(layer, totals);
  }
  std::printf("%ld late, %ld claimed, %ld dropped\n", totals.late, totals.claimed, totals.dropped);
  REQUIRE(totals.late > 0);
  REQUIRE(totals.claimed > 0);
  REQUIRE(totals.dropped > 0);
  return 0;
}
