#include "staging_engine.h"

#include <pthread.h>

#include <stdexcept>
#include <string>
#include <utility>

namespace vep {
namespace {

std::atomic<int> num_forks{0};  // of this process since its own start, counted in the children only

int watch_forks() {
  static const int status = pthread_atfork(nullptr, nullptr, [] { num_forks.fetch_add(1); });
  if (status != 0) throw std::runtime_error("pthread_atfork failed with " + std::to_string(status));
  return num_forks.load();
}

const char* name_of(SlotState state) {
  constexpr const char* kNames[] = {"READY", "QUEUED", "COPYING", "CLAIMED", "DROPPED", "URGENT"};
  return kNames[static_cast<int>(state)];
}

void check_below(const char* what, int64_t value, int64_t limit) {
  if (value < 0 || value >= limit)
    throw std::invalid_argument(std::string(what) + " " + std::to_string(value) + " is not in 0.." +
                                std::to_string(limit - 1));
}

void check_array(const void* data, int64_t count) {
  if (count < 0 || (data == nullptr && count > 0))
    throw std::invalid_argument(std::to_string(count) + " entries at " + (data == nullptr ? "a null" : "an") +
                                " address");
}

}  // namespace

StagingEngine::Layer::Layer(ExpertRecords layer_records)
    : records(std::move(layer_records)),
      words(static_cast<size_t>(records.num_experts()), word_of(0, SlotState::kReady)),
      expected(words.size(), 0),
      is_mentioned(words.size(), 0) {}

StagingEngine::StagingEngine(double gbps, double latency_us, int64_t chunk_bytes)
    : link_(gbps, latency_us), fork_count_(watch_forks()) {
  if (chunk_bytes < 1) throw std::invalid_argument("chunks of " + std::to_string(chunk_bytes) + " bytes");
  lane_ = std::make_unique<PrefetchLane>(link_, chunk_bytes);
}

StagingEngine::~StagingEngine() {
  if (num_forks.load() != fork_count_)
    (void)lane_.release();
  else
    close();
}

void StagingEngine::close() {
  if (num_forks.load() != fork_count_) return;
  std::lock_guard lock(calls_);
  closed_ = true;
  lane_.reset();
}

void StagingEngine::check_usable() const {
  if (num_forks.load() != fork_count_)
    throw std::runtime_error(
        "this staging engine was made before a fork: its prefetch lane does not exist in the child process. Make an "
        "engine in the child");
  if (closed_) throw std::runtime_error("this staging engine is closed");
}

std::unique_lock<std::mutex> StagingEngine::enter() {
  check_usable();  // before the lock, which another thread may have held at the moment of a fork
  std::unique_lock lock(calls_);
  check_usable();
  return lock;
}

int32_t StagingEngine::add_layer(std::vector<Segment> segments, int32_t num_experts, int64_t record_bytes) {
  const auto lock = enter();
  auto layer = std::make_unique<Layer>(ExpertRecords(std::move(segments), num_experts, record_bytes));
  const int32_t index = num_layers_.load();
  if (index == kMaxLayers) throw std::invalid_argument("more than " + std::to_string(kMaxLayers) + " layers");
  layers_[static_cast<size_t>(index)] = std::move(layer);
  num_layers_.store(index + 1);
  return index;
}

StagingEngine::Layer& StagingEngine::layer_at(int32_t index) const {
  check_below("layer", index, num_layers_.load());
  return *layers_[static_cast<size_t>(index)];
}

// Loads go into rows that nothing is on its way to, late rows are those of prefetches, and none is mentioned twice.
void StagingEngine::check_loads(Layer& layer, const int32_t* loads, int64_t num_loads, const int32_t* late_rows,
                                int64_t num_late) {
  check_array(loads, num_loads);
  check_array(late_rows, num_late);
  for (int64_t i = 0; i < num_loads; ++i) {
    const Load load = load_at(loads, i);
    check_below("expert", load.expert, layer.records.num_experts());
    check_below("row", load.row, layer.records.num_experts());
    const SlotState state = state_of(load_word(layer.word(load.row)));
    if (in_flight(state))
      throw std::invalid_argument("expert " + std::to_string(load.expert) + " cannot be loaded into row " +
                                  std::to_string(load.row) + ", which is " + name_of(state) + " with expert " +
                                  std::to_string(layer.expected[static_cast<size_t>(load.row)]));
  }
  for (int64_t i = 0; i < num_late; ++i) {
    check_below("row", late_rows[i], layer.records.num_experts());
    if (state_of(load_word(layer.word(late_rows[i]))) == SlotState::kDropped)
      throw std::invalid_argument("row " + std::to_string(late_rows[i]) +
                                  " cannot be late: its prefetch was cancelled");
  }
  int64_t twice = -1;
  const auto for_each_row = [&](auto call) {
    for (int64_t i = 0; i < num_loads; ++i) call(load_at(loads, i).row);
    for (int64_t i = 0; i < num_late; ++i) call(late_rows[i]);
  };
  for_each_row([&](int32_t row) {
    uint8_t& is_mentioned = layer.is_mentioned[static_cast<size_t>(row)];
    if (is_mentioned) twice = row;
    is_mentioned = 1;
  });
  for_each_row([&](int32_t row) { layer.is_mentioned[static_cast<size_t>(row)] = 0; });
  if (twice >= 0) throw std::invalid_argument("row " + std::to_string(twice) + " stands twice in one call");
}

// The order matters: claim first, so that the lane starts nothing that is taken over; copy while the lane finishes the
// records that are awaited; wait last.
DemandResult StagingEngine::demand(int32_t index, const int32_t* loads, int64_t num_loads, const int32_t* late_rows,
                                   int64_t num_late) {
  const auto lock = enter();
  Layer& layer = layer_at(index);
  check_loads(layer, loads, num_loads, late_rows, num_late);
  if (num_loads + num_late == 0) return {};
  const Time started = Clock::now();
  to_copy_.clear();
  awaited_.clear();
  to_copy_.reserve(static_cast<size_t>(num_loads + num_late));
  awaited_.reserve(static_cast<size_t>(num_late));
  lane_->begin_demand();
  sort_late(layer, late_rows, num_late);
  const auto num_claimed = static_cast<int64_t>(to_copy_.size());
  for (int64_t i = 0; i < num_loads; ++i) {
    to_copy_.push_back(load_at(loads, i));
    begin_load(layer.word(to_copy_.back().row));
  }
  copy_over_link(layer, started);
  const Time waits_from = Clock::now();
  for (const int32_t* word : awaited_) lane_->wait_for(word);
  lane_->end_demand();
  const Time ended = Clock::now();
  const auto late_ns = awaited_.empty() ? 0 : (ended - waits_from).count();
  return {num_claimed, (ended - started).count(), late_ns};
}

// Claims what has not started, and asks the lane to hurry with what has.
void StagingEngine::sort_late(Layer& layer, const int32_t* late_rows, int64_t num_late) {
  for (int64_t i = 0; i < num_late; ++i) {
    const int32_t row = late_rows[i];
    if (claim(layer.word(row)))
      to_copy_.push_back({layer.expected[static_cast<size_t>(row)], row});
    else if (request(layer.word(row)))
      awaited_.push_back(layer.word(row));
  }
  if (!awaited_.empty()) lane_->hurry();
}

void StagingEngine::copy_over_link(Layer& layer, Time started) {
  if (to_copy_.empty()) return;
  const int64_t bytes = static_cast<int64_t>(to_copy_.size()) * layer.records.record_bytes();
  const Time landed = link_.reserve(started, bytes) + link_.latency();
  for (const Load load : to_copy_) layer.records.copy(load);
  wait_until(landed);
  for (const Load load : to_copy_) finish(layer.word(load.row));
}

void StagingEngine::prefetch(int32_t index, const int32_t* loads, int64_t num_loads) {
  const auto lock = enter();
  Layer& layer = layer_at(index);
  check_loads(layer, loads, num_loads, nullptr, 0);
  if (num_loads == 0) return;
  lane_->ensure_running();
  for (int64_t i = 0; i < num_loads; ++i) {
    const Load load = load_at(loads, i);
    layer.expected[static_cast<size_t>(load.row)] = load.expert;
  }
  lane_->enqueue(layer.records, layer.words.data(), loads, num_loads);
}

int64_t StagingEngine::num_queued() const {
  check_usable();
  return lane_->num_queued();
}

int64_t StagingEngine::num_landed() const {
  check_usable();
  return lane_->num_landed();
}

}  // namespace vep
