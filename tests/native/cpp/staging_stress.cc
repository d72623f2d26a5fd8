// Random walks over the staging engine, for sanitizers: every demanded slot holds exactly its expert's record, no other
// slot is touched, and every prefetch is landed, claimed or cancelled. Exits with 1 at the first violation.
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

constexpr int32_t kExperts = 12;
constexpr int32_t kSlots = 6;
constexpr int64_t kRows[] = {700, 64, 3};
constexpr int64_t kChunkBytes = 256;

#define REQUIRE(condition)                                                       \
  do {                                                                           \
    if (!(condition)) {                                                          \
      std::fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition);       \
      std::exit(1);                                                              \
    }                                                                            \
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
      pools_.emplace_back(static_cast<size_t>(row * kSlots), char{0});
      for (int64_t i = 0; i < row * kExperts; ++i)
        stores_.back()[static_cast<size_t>(i)] = byte_of(number, static_cast<int32_t>(i / row), i % row);
      segments.push_back({stores_.back().data(), row, pools_.back().data(), row, row});
    }
    index_ = engine.add_layer(segments, kExperts, kSlots);
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
        engine_.wait_all(index_);
        for (int32_t slot = 0; slot < kSlots; ++slot) check(slot);
        break;
      default:
        demand(random);
    }
  }

  void check_end() {
    engine_.wait_all(index_);
    for (int32_t slot = 0; slot < kSlots; ++slot) check(slot);
  }

  int64_t num_issued = 0;
  int64_t num_loaded = 0;

 private:
  bool in_flight(int32_t slot) const { return vep::in_flight(engine_.state(index_, slot)); }

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

  void cancel(std::mt19937& random) {
    std::vector<int32_t> slots;
    for (int32_t slot = 0; slot < kSlots; ++slot) {
      if (random() % 2) slots.push_back(slot);
    }
    std::vector<uint8_t> dropped(slots.size());
    engine_.cancel(index_, slots.data(), static_cast<int64_t>(slots.size()), dropped.data());
    for (size_t i = 0; i < slots.size(); ++i) is_dropped_[slots[i]] = is_dropped_[slots[i]] || dropped[i];
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
    engine_.demand(index_, loads.data(), static_cast<int64_t>(loads.size() / 2), late.data(),
                   static_cast<int64_t>(late.size()));
    num_loaded += static_cast<int64_t>(loads.size() / 2);
    for (const int32_t slot : late) check(slot);
    for (size_t i = 1; i < loads.size(); i += 2) check(loads[i]);
  }

  void refuse(std::mt19937& random) {
    const int32_t wrong[][2] = {{kExperts, 0}, {-1, 0}, {0, kSlots}, {0, -1}};
    bool refused = false;
    try {
      engine_.prefetch(index_, wrong[random() % 4], 1);
    } catch (const std::invalid_argument&) {
      refused = true;
    }
    REQUIRE(refused);
  }

  // The slot holds its expert's bytes, unless its prefetch was dropped: then it may hold what it held before.
  void check(int32_t slot) const {
    if (is_dropped_[slot]) return;
    REQUIRE(engine_.landed(index_, slot));
    for (size_t s = 0; s < std::size(kRows); ++s) {
      for (int64_t i = 0; i < kRows[s]; ++i) {
        const char expected = holds_[slot] < 0 ? char{0} : byte_of(number_, holds_[slot], i);
        REQUIRE(pools_[s][static_cast<size_t>(slot * kRows[s] + i)] == expected);
      }
    }
  }

  vep::StagingEngine& engine_;
  const int32_t number_;
  int32_t index_ = 0;
  std::vector<std::vector<char>> stores_, pools_;
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
      for (const Layer& layer : layers) (void)engine.landed(layer.index(), 1);
      (void)engine.counters();
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
  for (Layer& layer : layers) layer.check_end();

  const vep::StagingCounters counters = engine.counters();
  const int64_t issued = layers[0].num_issued + layers[1].num_issued;
  const int64_t loaded = layers[0].num_loaded + layers[1].num_loaded;
  REQUIRE(issued == counters.prefetch_records + counters.claimed_records + counters.cancelled_records);
  REQUIRE(counters.demand_records == loaded + counters.claimed_records);
  REQUIRE(counters.demand_bytes == counters.demand_records * engine.record_bytes(0));
  REQUIRE(counters.prefetch_bytes == counters.prefetch_records * engine.record_bytes(0));
  std::printf("%g GB/s: %lld prefetched, %lld claimed, %lld awaited, %lld cancelled, %lld demanded, %lld yields\n", gbps,
              static_cast<long long>(counters.prefetch_records), static_cast<long long>(counters.claimed_records),
              static_cast<long long>(counters.awaited_records), static_cast<long long>(counters.cancelled_records),
              static_cast<long long>(loaded), static_cast<long long>(counters.yields));
}

// An engine that ends, or is closed, with work queued and running.
void end_early(int num_rounds) {
  for (int round = 0; round < num_rounds; ++round) {
    auto owner = std::make_unique<vep::StagingEngine>(0.0001, 0, kChunkBytes);  // a chunk takes 2.5 ms
    vep::StagingEngine& engine = *owner;
    Layer layer(engine, 0);
    const int32_t loads[] = {0, 0, 1, 1, 2, 2, 3, 3};
    engine.prefetch(layer.index(), loads, 4);
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
