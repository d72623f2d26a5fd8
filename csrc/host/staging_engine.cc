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

nanoseconds since(Time start) { return std::chrono::duration_cast<nanoseconds>(Clock::now() - start); }

double as_seconds(int64_t nanos) { return static_cast<double>(nanos) * 1e-9; }

}  // namespace

StagingEngine::Layer::Layer(ExpertRecords layer_records)
    : records(std::move(layer_records)),
      words(static_cast<size_t>(records.num_slots()), word_of(0, SlotState::kReady)),
      expected(words.size(), 0),
      is_mentioned(words.size(), 0) {}

StagingEngine::StagingEngine(double gbps, double latency_us, int64_t chunk_bytes)
    : link_(gbps, latency_us), fork_count_(watch_forks()) {
  if (chunk_bytes < 1) throw std::invalid_argument("chunks of " + std::to_string(chunk_bytes) + " bytes");
  lane_ = std::make_unique<PrefetchLane>(link_, chunk_bytes, lane_counters_);
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

int32_t StagingEngine::add_layer(std::vector<Segment> segments, int32_t num_experts, int32_t num_slots,
                                 int64_t record_bytes) {
  const auto lock = enter();
  auto layer = std::make_unique<Layer>(ExpertRecords(std::move(segments), num_experts, num_slots, record_bytes));
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

// Loads go into slots that nothing is on its way to.
void StagingEngine::check_loads(const Layer& layer, const int32_t* loads, int64_t num_loads) {
  check_array(loads, num_loads);
  for (int64_t i = 0; i < num_loads; ++i) {
    const Load load = load_at(loads, i);
    check_below("expert", load.expert, layer.records.num_experts());
    check_below("slot", load.slot, layer.records.num_slots());
    const SlotState state = state_of(load_word(&layer.words[static_cast<size_t>(load.slot)]));
    if (in_flight(state))
      throw std::invalid_argument("expert " + std::to_string(load.expert) + " cannot be loaded into slot " +
                                  std::to_string(load.slot) + ", which is " + name_of(state) + " with expert " +
                                  std::to_string(layer.expected[static_cast<size_t>(load.slot)]));
  }
}

void StagingEngine::check_slots(const Layer& layer, const int32_t* slots, int64_t num_slots) {
  check_array(slots, num_slots);
  for (int64_t i = 0; i < num_slots; ++i) check_below("slot", slots[i], layer.records.num_slots());
}

void StagingEngine::check_late(Layer& layer, const int32_t* loads, int64_t num_loads, const int32_t* late_slots,
                               int64_t num_late) {
  check_slots(layer, late_slots, num_late);
  for (int64_t i = 0; i < num_late; ++i) {
    if (state_of(load_word(layer.word(late_slots[i]))) == SlotState::kDropped)
      throw std::invalid_argument("slot " + std::to_string(late_slots[i]) +
                                  " cannot be late: its prefetch was cancelled");
  }
  for (int64_t i = 0; i < num_late; ++i) layer.is_mentioned[static_cast<size_t>(late_slots[i])] = 1;
  int64_t both = -1;
  for (int64_t i = 0; i < num_loads; ++i) {
    const int32_t slot = load_at(loads, i).slot;
    if (layer.is_mentioned[static_cast<size_t>(slot)]) both = slot;
  }
  for (int64_t i = 0; i < num_late; ++i) layer.is_mentioned[static_cast<size_t>(late_slots[i])] = 0;
  if (both >= 0) throw std::invalid_argument("slot " + std::to_string(both) + " is late and loaded in one demand");
}

void StagingEngine::check_distinct(Layer& layer, const int32_t* loads, int64_t num_loads) {
  int64_t twice = -1;
  for (int64_t i = 0; i < num_loads; ++i) {
    uint8_t& is_mentioned = layer.is_mentioned[static_cast<size_t>(load_at(loads, i).slot)];
    if (is_mentioned) twice = load_at(loads, i).slot;
    is_mentioned = 1;
  }
  for (int64_t i = 0; i < num_loads; ++i) layer.is_mentioned[static_cast<size_t>(load_at(loads, i).slot)] = 0;
  if (twice >= 0) throw std::invalid_argument("slot " + std::to_string(twice) + " stands twice in one prefetch");
}

DemandResult StagingEngine::demand(int32_t index, const int32_t* loads, int64_t num_loads, const int32_t* late_slots,
                                   int64_t num_late) {
  const auto lock = enter();
  Layer& layer = layer_at(index);
  check_loads(layer, loads, num_loads);
  check_late(layer, loads, num_loads, late_slots, num_late);
  return stage(layer, loads, num_loads, late_slots, num_late);
}

// The order matters: claim first, so that the lane starts nothing that is taken over; copy while the lane finishes the
// records that are awaited; wait last.
DemandResult StagingEngine::stage(Layer& layer, const int32_t* loads, int64_t num_loads, const int32_t* late_slots,
                                  int64_t num_late) {
  if (num_loads + num_late == 0) return {};
  const Time started = Clock::now();
  to_copy_.clear();
  awaited_.clear();
  to_copy_.reserve(static_cast<size_t>(num_loads + num_late));
  awaited_.reserve(static_cast<size_t>(num_late));
  lane_->begin_demand();
  sort_late(layer, late_slots, num_late);
  for (int64_t i = 0; i < num_loads; ++i) {
    to_copy_.push_back(load_at(loads, i));
    begin_load(layer.word(to_copy_.back().slot));
  }
  copy_over_link(layer, started);
  const Time waits_from = Clock::now();
  for (const int32_t* word : awaited_) lane_->wait_for(word);
  lane_->end_demand();

  const int64_t late_wait_ns = awaited_.empty() ? 0 : since(waits_from).count();
  const int64_t stall_ns = since(started).count();
  const int64_t bytes = static_cast<int64_t>(to_copy_.size()) * layer.records.record_bytes();
  demand_bytes_ += bytes;
  demand_records_ += static_cast<int64_t>(to_copy_.size());
  stall_ns_ += stall_ns;
  late_wait_ns_ += late_wait_ns;
  layer.bytes += bytes;
  layer.stall_ns += stall_ns;
  layer.late_wait_ns += late_wait_ns;
  return {bytes, as_seconds(stall_ns), as_seconds(late_wait_ns)};
}

// Claims what has not started, and asks the lane to hurry with what has.
void StagingEngine::sort_late(Layer& layer, const int32_t* late_slots, int64_t num_late) {
  for (int64_t i = 0; i < num_late; ++i) {
    const int32_t slot = late_slots[i];
    if (claim(layer.word(slot)))
      to_copy_.push_back({layer.expected[static_cast<size_t>(slot)], slot});
    else if (request(layer.word(slot)))
      awaited_.push_back(layer.word(slot));
  }
  claimed_records_ += static_cast<int64_t>(to_copy_.size());
  awaited_records_ += static_cast<int64_t>(awaited_.size());
  if (!awaited_.empty()) lane_->hurry();
}

void StagingEngine::copy_over_link(Layer& layer, Time started) {
  if (to_copy_.empty()) return;
  const int64_t bytes = static_cast<int64_t>(to_copy_.size()) * layer.records.record_bytes();
  const Time landed = link_.reserve(started, bytes) + link_.latency();
  for (const Load load : to_copy_) layer.records.copy(load);
  wait_until(landed);
  for (const Load load : to_copy_) finish(layer.word(load.slot));
}

void StagingEngine::prefetch(int32_t index, const int32_t* loads, int64_t num_loads) {
  const auto lock = enter();
  Layer& layer = layer_at(index);
  check_loads(layer, loads, num_loads);
  check_distinct(layer, loads, num_loads);
  if (num_loads == 0) return;
  lane_->ensure_running();
  for (int64_t i = 0; i < num_loads; ++i) {
    const Load load = load_at(loads, i);
    layer.expected[static_cast<size_t>(load.slot)] = load.expert;
  }
  lane_->enqueue(layer.records, layer.words.data(), loads, num_loads);
}

void StagingEngine::cancel(int32_t index, const int32_t* slots, int64_t num_slots, uint8_t* dropped) {
  const auto lock = enter();
  Layer& layer = layer_at(index);
  check_slots(layer, slots, num_slots);
  check_array(dropped, num_slots);
  for (int64_t i = 0; i < num_slots; ++i) {
    dropped[i] = drop(layer.word(slots[i]));
    cancelled_records_ += dropped[i];
  }
}

void StagingEngine::fill(int32_t index, const int32_t* loads, int64_t num_loads) {
  const auto lock = enter();
  Layer& layer = layer_at(index);
  check_loads(layer, loads, num_loads);
  for (int64_t i = 0; i < num_loads; ++i) {
    const Load load = load_at(loads, i);
    begin_load(layer.word(load.slot));
    layer.records.copy(load);
    finish(layer.word(load.slot));
  }
}

DemandResult StagingEngine::wait_all(int32_t index) {
  const auto lock = enter();
  Layer& layer = layer_at(index);
  std::vector<int32_t> late_slots;
  for (int32_t slot = 0; slot < layer.records.num_slots(); ++slot) {
    if (in_flight(state_of(load_word(layer.word(slot))))) late_slots.push_back(slot);
  }
  return stage(layer, nullptr, 0, late_slots.data(), static_cast<int64_t>(late_slots.size()));
}

SlotState StagingEngine::state(int32_t index, int32_t slot) const {
  check_usable();
  Layer& layer = layer_at(index);
  check_below("slot", slot, layer.records.num_slots());
  return state_of(load_word(layer.word(slot)));
}

DemandResult StagingEngine::totals(int32_t index) const {
  const Layer& layer = layer_at(index);
  return {layer.bytes.load(), as_seconds(layer.stall_ns.load()), as_seconds(layer.late_wait_ns.load())};
}

void StagingEngine::reset_totals(int32_t index) {
  Layer& layer = layer_at(index);
  layer.bytes = 0;
  layer.stall_ns = 0;
  layer.late_wait_ns = 0;
}

StagingCounters StagingEngine::counters() const {
  StagingCounters counters{};
  counters.demand_bytes = demand_bytes_;
  counters.demand_records = demand_records_;
  counters.claimed_records = claimed_records_;
  counters.awaited_records = awaited_records_;
  counters.prefetch_bytes = lane_counters_.bytes;
  counters.prefetch_records = lane_counters_.records;
  counters.cancelled_records = cancelled_records_;
  counters.yields = lane_counters_.yields;
  counters.stall_seconds = as_seconds(stall_ns_);
  counters.late_wait_seconds = as_seconds(late_wait_ns_);
  counters.lane_busy_seconds = as_seconds(lane_counters_.busy_ns);
  return counters;
}

}  // namespace vep
