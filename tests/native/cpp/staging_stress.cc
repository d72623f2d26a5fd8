// Random walks over the staging engine, for sanitizers: every demanded row holds exactly its expert's record, no other
// row is touched, and every prefetch is landed, claimed or cancelled. Exits with 1 at the first violation.
// Usage: staging_stress [operations per walk]
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#include <thread>
#include <vector>

#include "host/staging_engine.h"

namespace {

constexpr int32_t kExperts = 12;  // and rows
constexpr int32_t kSlots = 6;     // the rows that the walks use
constexpr int64_t kRows[] = {700, 64, 3};
constexpr int64_t kChunkBytes = 256;

#define REQUIRE(condition)                                                 \
  do {                                                                     \
    if (!(condition)) {                                                    \
      std::fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition); \
      std::exit(1);                                                        \
    }                                                                      \
  } while (false)

char byte_of(int32_t layer, int32_t expert, int64_t index) {
  return static_cast<char>(1 + (layer * 89 + expert * 31 + index * 7) % 250);
}

// One layer's memory, and what the test expects of it.
class Layer {
 public:
  Layer(vep::StagingEngine& engine, int32_t number) : engine_(engine), number_(number) {
    std::vector<vep::Segment> segments;
    for (const int64_t row : kRows) {
      stores_.emplace_back(static_cast<size_t>(row * kExperts));
      rows_.emplace_back(static_cast<size_t>(row * kExperts), char{0});
      for (int64_t i = 0; i < row * kExperts; ++i)
        stores_.back()[static_cast<size_t>(i)] = byte_of(number, static_cast<int32_t>(i / row), i % row);
      segments.push_back({stores_.back().data(), row, rows_.back().data(), row});
    }
    index_ = engine.add_layer(segments, kExperts);
    words_ = engine.row_words(index_);
  }

  int32_t index() const { return index_; }

  void step(std::mt19937& random) {
    switch (random() % 8) {
      case 0:
      case 1:
      case 2:
        prefetch(random);
        break;
      case 3:
        cancel(random);
        break;
      case 4:
        refuse(random);
        break;
      case 5:
        check_all();
        break;
      default:
        demand(random);
    }
  }

  // Waits for everything that is on its way.
  void check_all() {
    std::vector<int32_t> late;
    for (int32_t slot = 0; slot < kSlots; ++slot) {
      if (in_flight(slot)) late.push_back(slot);
    }
    demand_rows({}, late);
    for (int32_t slot = 0; slot < kSlots; ++slot) check(slot);
    for (int32_t row = kSlots; row < kExperts; ++row) REQUIRE(holds(row, -1));
  }

  // Before anything is changed: `check` would notice.
  bool refuses(const int32_t* loads, int64_t num_loads, const int32_t* late, int64_t num_late) {
    try {
      engine_.demand(index_, loads, num_loads, late, num_late);
    } catch (const std::invalid_argument&) {
      return true;
    }
    return false;
  }

  int64_t num_issued = 0;
  int64_t num_cancelled = 0;
  int64_t num_claimed = 0;
  int64_t num_loaded = 0;

 private:
  bool in_flight(int32_t slot) const { return vep::in_flight(vep::state_of(vep::load_word(&words_[slot]))); }

  void prefetch(std::mt19937& random) {
    std::vector<int32_t> loads;
    for (int32_t slot = 0; slot < kSlots; ++slot) {
      if (in_flight(slot) || random() % 2) continue;
      holds_[slot] = static_cast<int32_t>(random() % kExperts);
      is_dropped_[slot] = false;
      loads.insert(loads.end(), {holds_[slot], slot});
    }
    engine_.prefetch(index_, loads.data(), static_cast<int64_t>(loads.size() / 2));
    num_issued += static_cast<int64_t>(loads.size() / 2);
  }

  // As a planner does, in the thread that calls the engine.
  void cancel(std::mt19937& random) {
    const vep::SlotWords lane{words_};
    for (int32_t slot = 0; slot < kSlots; ++slot) {
      if (random() % 2 == 0 || !lane.drop(slot)) continue;
      is_dropped_[slot] = true;
      ++num_cancelled;
    }
  }

  void demand(std::mt19937& random) {
    std::vector<int32_t> loads, late;
    for (int32_t slot = 0; slot < kSlots; ++slot) {
      if (in_flight(slot)) {
        if (random() % 2) late.push_back(slot);
      } else if (random() % 3 == 0) {
        holds_[slot] = static_cast<int32_t>(random() % kExperts);
        is_dropped_[slot] = false;
        loads.insert(loads.end(), {holds_[slot], slot});
      }
    }
    demand_rows(loads, late);
    for (const int32_t slot : late) check(slot);
    for (size_t i = 1; i < loads.size(); i += 2) check(loads[i]);
  }

  void demand_rows(const std::vector<int32_t>& loads, const std::vector<int32_t>& late) {
    const auto num_loads = static_cast<int64_t>(loads.size() / 2), num_late = static_cast<int64_t>(late.size());
    const vep::DemandResult done = engine_.demand(index_, loads.data(), num_loads, late.data(), num_late);
    REQUIRE(done.num_claimed <= num_late && done.late_ns <= done.stall_ns);
    num_claimed += done.num_claimed;
    num_loaded += num_loads;
  }

  void refuse(std::mt19937& random) {
    const int32_t wrong[][2] = {{kExperts, 0}, {-1, 0}, {0, kExperts}, {0, -1}};
    REQUIRE(refuses(wrong[random() % 4], 1, nullptr, 0));
    const int32_t twice[] = {0, kSlots, 1, kSlots};
    REQUIRE(refuses(twice, 2, nullptr, 0));
    for (int32_t slot = 0; slot < kSlots; ++slot) {
      const int32_t load[] = {0, slot};
      if (is_dropped_[slot]) REQUIRE(refuses(nullptr, 0, &slot, 1));
      if (!in_flight(slot)) REQUIRE(refuses(load, 1, &slot, 1));
    }
  }

  // The slot holds its expert's bytes, unless its prefetch was dropped: then it may hold what it held before.
  void check(int32_t slot) const {
    if (is_dropped_[slot]) return;
    REQUIRE(vep::is_ready(&words_[slot]));
    REQUIRE(holds(slot, holds_[slot]));
  }

  bool holds(int32_t row, int32_t expert) const {
    for (size_t s = 0; s < std::size(kRows); ++s) {
      for (int64_t i = 0; i < kRows[s]; ++i) {
        const char expected = expert < 0 ? char{0} : byte_of(number_, expert, i);
        if (rows_[s][static_cast<size_t>(row * kRows[s] + i)] != expected) return false;
      }
    }
    return true;
  }

  vep::StagingEngine& engine_;
  const int32_t number_;
  int32_t index_ = 0;
  int32_t* words_ = nullptr;
  std::vector<std::vector<char>> stores_, rows_;
  int32_t holds_[kSlots] = {-1, -1, -1, -1, -1, -1};
  bool is_dropped_[kSlots] = {};
};

// Two threads, each walking over a layer of its own, and one that only looks.
void walk(double gbps, double latency_us, int num_operations, uint32_t seed) {
  vep::StagingEngine engine(gbps, latency_us, kChunkBytes);
  Layer layers[] = {Layer(engine, 0), Layer(engine, 1)};
  std::atomic<bool> done{false};
  std::thread watcher([&] {
    while (!done) {
      for (const Layer& layer : layers) (void)vep::is_ready(engine.row_words(layer.index()));
      (void)engine.num_landed();
      std::this_thread::yield();
    }
  });
  std::vector<std::thread> walkers;
  for (Layer& layer : layers)
    walkers.emplace_back([&, seed] {
      std::mt19937 random(seed + static_cast<uint32_t>(layer.index()));
      for (int i = 0; i < num_operations; ++i) layer.step(random);
    });
  for (std::thread& walker : walkers) walker.join();
  done = true;
  watcher.join();
  for (Layer& layer : layers) layer.check_all();

  const int64_t landed = engine.num_landed();
  int64_t issued = 0, cancelled = 0, claimed = 0, loaded = 0;
  for (const Layer& layer : layers) {
    issued += layer.num_issued;
    cancelled += layer.num_cancelled;
    claimed += layer.num_claimed;
    loaded += layer.num_loaded;
  }
  REQUIRE(issued == landed + claimed + cancelled);
  std::printf("%g GB/s: %lld prefetched, %lld claimed, %lld cancelled, %lld demanded\n", gbps,
              static_cast<long long>(landed), static_cast<long long>(claimed), static_cast<long long>(cancelled),
              static_cast<long long>(loaded));
}

// An engine that ends, or is closed, with work queued and running.
void end_early(int num_rounds) {
  for (int round = 0; round < num_rounds; ++round) {
    auto owner = std::make_unique<vep::StagingEngine>(0.0001, 0, kChunkBytes);  // a chunk takes 2.5 ms
    vep::StagingEngine& engine = *owner;
    Layer layer(engine, 0);
    const int32_t loads[] = {0, 0, 1, 1, 2, 2, 3, 3};
    engine.prefetch(layer.index(), loads, 4);
    REQUIRE(layer.refuses(loads + 6, 1, nullptr, 0));  // on its way
    if (round % 2) std::this_thread::sleep_for(std::chrono::microseconds(100 * round));
    if (round % 3) {
      owner.reset();  // before the layer's memory
      continue;
    }
    engine.close();
    bool refused = false;
    try {
      engine.demand(layer.index(), loads, 1, nullptr, 0);
    } catch (const std::runtime_error&) {
      refused = true;
    }
    REQUIRE(refused);
  }
}

}  // namespace

int main(int argc, char** argv) {
  const int num_operations = argc > 1 ? std::atoi(argv[1]) : 10000;
  walk(0, 0, num_operations, 1);
  walk(0.1, 5, num_operations / 5, 2);
  walk(0.01, 100, num_operations / 50, 3);
  end_early(20);
  return 0;
}
