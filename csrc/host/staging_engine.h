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

struct DemandResult {
  int64_t num_claimed = 0;  // of the late ones, those that the demand itself copied
  int64_t stall_ns = 0;     // the whole call: what the step stalled
  int64_t late_ns = 0;      // of these, waiting for copies of the lane
};

// Calls that change something run one at a time; the counts may be read from any thread. Every call throws
// std::invalid_argument, with the numbers and before anything is changed, for a layer, expert or row that does not
// exist or a row in the wrong state, and std::runtime_error after `close` and in a forked child.
class StagingEngine {
 public:
  // `gbps`: 10^9 bytes per second, 0 for no emulated link; `latency_us` per demand and per prefetched record.
  StagingEngine(double gbps, double latency_us, int64_t chunk_bytes);
  ~StagingEngine();
  StagingEngine(const StagingEngine&) = delete;
  StagingEngine& operator=(const StagingEngine&) = delete;

  // Ends the lane and drops what is queued. No memory of any layer is touched afterwards.
  void close();

  // Throws std::runtime_error unless calls can be made.
  void check_usable() const;

  // Returns the layer's index. The memory must stay until `close`.
  int32_t add_layer(std::vector<Segment> segments, int32_t num_experts, int64_t record_bytes = 0);

  // Makes every row in `loads` and `late_rows` READY. `loads`: int32 pairs (expert, row), rows not in flight.
  // `late_rows`: rows of earlier prefetches, wherever these have come to, but not dropped ones.
  DemandResult demand(int32_t layer, const int32_t* loads, int64_t num_loads, const int32_t* late_rows,
                      int64_t num_late);

  // Queues int32 pairs (expert, row), most urgent first, behind what is queued already. Rows not in flight.
  void prefetch(int32_t layer, const int32_t* loads, int64_t num_loads);

  // Prefetched records of all layers whose copy has not started, and still may.
  int64_t num_queued() const;

  // Prefetched records of all layers that the lane has landed.
  int64_t num_landed() const;

  // The words of slot_state.h, one per row, for a planner in the thread that calls the engine, which may cancel there.
  // They live as long as the engine.
  int32_t* row_words(int32_t layer) const { return layer_at(layer).words.data(); }

 private:
  static constexpr int32_t kMaxLayers = 4096;

  struct Layer {
    explicit Layer(ExpertRecords layer_records);
    int32_t* word(int32_t row) { return words.data() + row; }

    const ExpertRecords records;
    std::vector<int32_t> words;         // row states
    std::vector<int32_t> expected;      // row -> expert of its latest prefetch
    std::vector<uint8_t> is_mentioned;  // scratch of the checks, zero between calls
  };

  std::unique_lock<std::mutex> enter();
  Layer& layer_at(int32_t index) const;
  static void check_loads(Layer& layer, const int32_t* loads, int64_t num_loads, const int32_t* late_rows,
                          int64_t num_late);
  void sort_late(Layer& layer, const int32_t* late_rows, int64_t num_late);
  void copy_over_link(Layer& layer, Time started);

  Link link_;
  const int fork_count_;
  std::mutex calls_;  // one changing call at a time
  std::atomic<bool> closed_{false};
  // Leaked in a forked child, where its thread does not exist and cannot be joined.
  std::unique_ptr<PrefetchLane> lane_;
  std::array<std::unique_ptr<Layer>, kMaxLayers> layers_;
  std::atomic<int32_t> num_layers_{0};
  std::vector<Load> to_copy_;      // scratch of `demand`
  std::vector<int32_t*> awaited_;  // scratch of `demand`
};

}  // namespace vep
