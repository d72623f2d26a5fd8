// Host-planned staging: demand copies on the step's thread, prefetch copies on a background lane, one link for both.
// Free of tvm_ffi. One engine per worker, shared by all its layers.
#pragma once

#include <array>
#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

#include "../slot_state.h"
#include "expert_records.h"
#include "link.h"
#include "prefetch_lane.h"

namespace vep {

constexpr int64_t kDefaultChunkBytes = 256 * 1024;

struct DemandResult {
  int64_t bytes = 0;             // copied by the demand itself
  double seconds = 0;            // the whole call: what the step stalled
  double late_wait_seconds = 0;  // of these, waiting for copies of the lane
};

struct StagingCounters {
  int64_t demand_bytes;
  int64_t demand_records;     // claimed ones included
  int64_t claimed_records;    // prefetches that a demand took over before they started
  int64_t awaited_records;    // prefetches that a demand waited for
  int64_t prefetch_bytes;
  int64_t prefetch_records;   // landed by the lane
  int64_t cancelled_records;  // dropped before they started
  int64_t yields;             // pauses of the lane for a demand
  double stall_seconds;
  double late_wait_seconds;
  double lane_busy_seconds;   // copying, or holding the link
};

// Calls that change something run one at a time; `landed`, `state` and the counters may be read from any thread.
// Every call throws std::invalid_argument, with the numbers and before anything is changed, for a layer, expert or
// slot that does not exist or a slot in the wrong state, and std::runtime_error after `close` and in a forked child.
class StagingEngine {
 public:
  // `gbps`: 10^9 bytes per second, 0 for no emulated link; `latency_us` per demand and per prefetched record.
  StagingEngine(double gbps, double latency_us, int64_t chunk_bytes = kDefaultChunkBytes);
  ~StagingEngine();
  StagingEngine(const StagingEngine&) = delete;
  StagingEngine& operator=(const StagingEngine&) = delete;

  // Ends the lane and drops what is queued. No memory of any layer is touched afterwards.
  void close();

  // Returns the layer's index. The memory must stay until `close`.
  int32_t add_layer(std::vector<Segment> segments, int32_t num_experts, int32_t num_slots, int64_t record_bytes = 0);

  // Makes every slot in `loads` and `late_slots` READY. `loads`: int32 pairs (expert, slot), slots not in flight.
  // `late_slots`: slots of earlier prefetches, wherever these have come to, but not dropped ones.
  DemandResult demand(int32_t layer, const int32_t* loads, int64_t num_loads, const int32_t* late_slots,
                      int64_t num_late);

  // Queues int32 pairs (expert, slot), most urgent first, behind what is queued already. Slots not in flight.
  void prefetch(int32_t layer, const int32_t* loads, int64_t num_loads);

  // dropped[i] = 1 if the prefetch into slots[i] will not happen and the slot is free, 0 if it was not queued any more.
  void cancel(int32_t layer, const int32_t* slots, int64_t num_slots, uint8_t* dropped);

  // Copies outside any step: not counted, not slowed down by the link. Slots not in flight.
  void fill(int32_t layer, const int32_t* loads, int64_t num_loads);

  // A demand for everything that is in flight in this layer.
  DemandResult wait_all(int32_t layer);

  bool landed(int32_t layer, int32_t slot) const { return state(layer, slot) == SlotState::kReady; }
  SlotState state(int32_t layer, int32_t slot) const;
  // The words of slot_state.h, one per slot, for a planner in the thread that calls the engine. They live as long as the
  // engine. What it drops there itself does not appear in `cancelled_records`.
  int32_t* slot_words(int32_t layer) const { return layer_at(layer).words.data(); }
  int32_t num_slots(int32_t layer) const { return layer_at(layer).records.num_slots(); }
  int64_t record_bytes(int32_t layer) const { return layer_at(layer).records.record_bytes(); }

  // Demands of one layer since `reset_totals`.
  DemandResult totals(int32_t layer) const;
  void reset_totals(int32_t layer);

  StagingCounters counters() const;

 private:
  static constexpr int32_t kMaxLayers = 4096;

  struct Layer {
    explicit Layer(ExpertRecords layer_records);
    int32_t* word(int32_t slot) { return words.data() + slot; }

    const ExpertRecords records;
    std::vector<int32_t> words;        // slot states
    std::vector<int32_t> expected;     // slot -> expert of its latest prefetch
    std::vector<uint8_t> is_mentioned;  // scratch of the checks, zero between calls
    std::atomic<int64_t> bytes{0}, stall_ns{0}, late_wait_ns{0};
  };

  void check_usable() const;
  std::unique_lock<std::mutex> enter();
  Layer& layer_at(int32_t index) const;
  static void check_loads(const Layer& layer, const int32_t* loads, int64_t num_loads);
  static void check_slots(const Layer& layer, const int32_t* slots, int64_t num_slots);
  static void check_late(Layer& layer, const int32_t* loads, int64_t num_loads, const int32_t* late_slots,
                         int64_t num_late);
  static void check_distinct(Layer& layer, const int32_t* loads, int64_t num_loads);
  DemandResult stage(Layer& layer, const int32_t* loads, int64_t num_loads, const int32_t* late_slots,
                     int64_t num_late);
  void sort_late(Layer& layer, const int32_t* late_slots, int64_t num_late);
  void copy_over_link(Layer& layer, Time started);

  Link link_;
  const int fork_count_;
  std::mutex calls_;  // one changing call at a time
  std::atomic<bool> closed_{false};
  LaneCounters lane_counters_;
  // Leaked in a forked child, where its thread does not exist and cannot be joined.
  std::unique_ptr<PrefetchLane> lane_;
  std::array<std::unique_ptr<Layer>, kMaxLayers> layers_;
  std::atomic<int32_t> num_layers_{0};
  std::vector<Load> to_copy_;      // scratch of `stage`
  std::vector<int32_t*> awaited_;  // scratch of `stage`
  std::atomic<int64_t> demand_bytes_{0}, demand_records_{0}, claimed_records_{0}, awaited_records_{0};
  std::atomic<int64_t> cancelled_records_{0}, stall_ns_{0}, late_wait_ns_{0};
};

}  // namespace vep
