// The prefetch lane: one background thread that copies queued records, chunk by chunk, whenever no demand runs.
#pragma once

#include <pthread.h>
#include <signal.h>
#include <sys/prctl.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <mutex>
#include <thread>

#include "../slot_state.h"
#include "expert_records.h"
#include "link.h"

namespace vep {

struct LaneEntry {
  const ExpertRecords* records;
  int32_t* word;  // of the row
  Load load;
  uint32_t ticket;
  Time since;  // when it was queued
};

class PrefetchLane {
 public:
  PrefetchLane(Link& link, int64_t chunk_bytes) : link_(link), chunk_bytes_(chunk_bytes) {}

  // Drops what is queued; a record whose copy runs is left unfinished.
  ~PrefetchLane() {
    {
      std::lock_guard lock(mutex_);
      stop_ = true;
    }
    wake_.notify_one();
    if (thread_.joinable()) thread_.join();
  }

  // Starts the thread if it does not run yet. Throws std::system_error when the system refuses one.
  void ensure_running() {
    if (thread_.joinable()) return;
    sigset_t all, before;  // signals belong to the main thread
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    try {
      thread_ = std::thread([this] { run(); });
    } catch (...) {
      pthread_sigmask(SIG_SETMASK, &before, nullptr);
      throw;
    }
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
  }

  // Queues int32 pairs (expert, row) in order of priority; `words` are the rows' states.
  void enqueue(const ExpertRecords& records, int32_t* words, const int32_t* loads, int64_t num_loads) {
    const Time now = Clock::now();
    {
      std::lock_guard lock(mutex_);
      for (int64_t i = 0; i < num_loads; ++i) {
        const Load load = load_at(loads, i);
        int32_t* word = words + load.row;
        queue_.push_back({&records, word, load, vep::enqueue(word), now});
      }
      if (sleeps_for_ != kWork) return;
    }
    wake_.notify_one();
  }

  // Records whose copy has not started, and still may.
  int64_t num_queued() {
    std::lock_guard lock(mutex_);
    return std::count_if(queue_.begin(), queue_.end(), [](const LaneEntry& entry) {
      return load_word(entry.word) == word_of(entry.ticket, SlotState::kQueued);
    });
  }

  // Records so far.
  int64_t num_landed() {
    std::lock_guard lock(mutex_);
    return num_landed_;
  }

  // While a demand runs, the lane yields between chunks, except within a record that is URGENT.
  void begin_demand() { demand_active_.store(true); }

  void end_demand() {
    {
      std::lock_guard lock(mutex_);
      demand_active_.store(false);
      if (sleeps_for_ != kTurn) return;
    }
    wake_.notify_one();
  }

  // To be called after records became URGENT: the lane may be yielding in the middle of one.
  void hurry() {
    {
      std::lock_guard lock(mutex_);
      if (sleeps_for_ != kTurn) return;
    }
    wake_.notify_one();
  }

  // Returns once the record that the lane copies into this row has landed.
  void wait_for(const int32_t* word) {
    const Time sleep_from = Clock::now() + kStepSpin;
    while (!is_ready(word)) {
      if (Clock::now() < sleep_from) {
        relax_cpu();
        continue;
      }
      std::unique_lock lock(mutex_);
      landed_.wait(lock, [&] { return is_ready(word); });
    }
  }

 private:
  enum SleepsFor { kTime, kWork, kTurn };

  struct Landing {
    LaneEntry entry;
    Time due;
  };

  void run() {
    pthread_setname_np(pthread_self(), "vep-prefetch");
    prctl(PR_SET_TIMERSLACK, 1);  // nanoseconds, of this thread: the default of 50 us is longer than many copies
    std::unique_lock lock(mutex_);
    while (!stop_) {
      sleep(lock, Time::max(), [this] { return !queue_.empty(); }, kWork);
      if (stop_) return;
      const LaneEntry entry = queue_.front();
      queue_.pop_front();
      // Not started while a demand runs, so that the demand can claim it.
      yield_unless(lock, [] { return false; });
      if (!stop_ && start(entry.word, entry.ticket)) copy(lock, entry);
    }
  }

  // Chunks follow each other on the link without a gap, as on a real one, even if this thread wakes late.
  void copy(std::unique_lock<std::mutex>& lock, const LaneEntry& entry) {
    constexpr nanoseconds kRunAhead{10'000};  // sleeping is coarser than this
    const ExpertRecords& records = *entry.records;
    int64_t left = records.row_bytes();
    CopyCursor cursor;
    Time end;
    while (left > 0) {
      yield_unless(lock, [&] { return state_of(load_word(entry.word)) == SlotState::kUrgent; });
      if (stop_) return;
      const Time earliest = std::max(entry.since, resumed_);
      lock.unlock();
      const int64_t bytes = std::min(left, chunk_bytes_);
      left -= bytes;
      const int64_t padding = left == 0 ? records.record_bytes() - records.row_bytes() : 0;
      end = link_.reserve(earliest, bytes + padding);
      records.copy(entry.load, cursor, bytes);
      lock.lock();
      if (end - Clock::now() > kRunAhead) sleep(lock, end, [] { return false; });
    }
    landing_.push_back({entry, end + link_.latency()});
    land_due(Clock::now());
  }

  template <class Exempt>
  void yield_unless(std::unique_lock<std::mutex>& lock, Exempt exempt) {
    const auto may_go_on = [&] { return !demand_active_.load() || exempt(); };
    if (may_go_on()) return;
    sleep(lock, Time::max(), may_go_on, kTurn);
    resumed_ = Clock::now();
  }

  // Sleeps until `ready()`, `deadline` or the end of the lane; records land meanwhile. Who makes it ready wakes this
  // thread if it sleeps for that: waking takes longer than planning a step of a layer.
  template <class Ready>
  void sleep(std::unique_lock<std::mutex>& lock, Time deadline, Ready ready, SleepsFor what = kTime) {
    constexpr nanoseconds kSpin{50'000};
    sleeps_for_ = what;
    while (true) {
      const Time now = Clock::now();
      land_due(now);
      if (stop_ || ready() || now >= deadline) break;
      const Time wake = landing_.empty() ? deadline : std::min(deadline, landing_.front().due);
      if (wake == Time::max()) {
        wake_.wait(lock);
      } else if (!demand_active_.load()) {
        wake_.wait_until(lock, wake);
      } else if (wake - now > kSpin) {  // a step waits: be exact
        wake_.wait_until(lock, wake - kSpin);
      } else {
        lock.unlock();
        spin_until(wake);
        lock.lock();
      }
    }
    sleeps_for_ = kTime;
  }

  void land_due(Time now) {
    bool any = false;
    for (; !landing_.empty() && landing_.front().due <= now; landing_.pop_front(), any = true) {
      ++num_landed_;
      finish(landing_.front().entry.word);
    }
    if (any) landed_.notify_all();
  }

  Link& link_;
  const int64_t chunk_bytes_;
  std::atomic<bool> demand_active_{false};

  std::mutex mutex_;  // of what follows
  std::condition_variable wake_;
  std::condition_variable landed_;
  std::deque<LaneEntry> queue_;
  std::deque<Landing> landing_;  // copied, their data still on its way; in order of `due`
  int64_t num_landed_ = 0;
  Time resumed_{};
  SleepsFor sleeps_for_ = kTime;
  bool stop_ = false;
  std::thread thread_;
};

}  // namespace vep
