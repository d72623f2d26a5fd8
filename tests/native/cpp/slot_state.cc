// The ticket protocol under contention: of a prefetch lane and a planner that race for a slot exactly one copies, the
// other one's reads come after it, and a lane never copies for an entry whose slot was dropped and queued again.
#include "slot_state.h"

#include <atomic>
#include <cstdio>
#include <deque>
#include <functional>
#include <mutex>
#include <optional>
#include <random>
#include <thread>
#include <vector>

namespace {

constexpr int kSlots = 4;
constexpr int kRounds = 5000;
constexpr int kRecordInts = 16;

struct Entry {
  int slot;
  uint32_t ticket;
  int value;
};

struct Shared {
  int32_t words[kSlots] = {};
  int pool[kSlots][kRecordInts] = {};  // plain memory: a missing order is a race that the thread sanitizer reports
  std::mutex mutex;
  std::deque<Entry> queue;
  std::atomic<bool> done{false};

  void copy(int slot, int value) {
    for (int& word : pool[slot]) word = value;
  }

  bool holds(int slot, int value) const {
    for (int word : pool[slot]) {
      if (word != value) return false;
    }
    return true;
  }

  std::optional<Entry> pop() {
    const std::lock_guard<std::mutex> lock(mutex);
    if (queue.empty()) return std::nullopt;
    const Entry entry = queue.front();
    queue.pop_front();
    return entry;
  }
};

void run_lane(Shared& shared) {
  while (!shared.done.load()) {
    const std::optional<Entry> entry = shared.pop();
    if (!entry) {
      std::this_thread::yield();
    } else if (vep::start(&shared.words[entry->slot], entry->ticket)) {
      shared.copy(entry->slot, entry->value);
      vep::finish(&shared.words[entry->slot]);
    }
  }
}

void prefetch(Shared& shared, int slot, int value) {
  const uint32_t ticket = vep::enqueue(&shared.words[slot]);
  const std::lock_guard<std::mutex> lock(shared.mutex);
  shared.queue.push_back({slot, ticket, value});
}

// A demand for a queued slot: claim it and copy, or let the lane do it (`patient`, or it was faster) and wait.
void demand(Shared& shared, int slot, int value, bool patient) {
  int32_t* word = &shared.words[slot];
  if (!patient && vep::claim(word)) {
    shared.copy(slot, value);
    vep::finish(word);
    return;
  }
  vep::request(word);
  while (!vep::is_ready(word)) std::this_thread::yield();
}

int run_planner(Shared& shared) {
  std::mt19937 random(7);
  int num_wrong = 0, num_dropped = 0;
  for (int round = 1; round <= kRounds; ++round) {
    const int slot = static_cast<int>(random() % kSlots);
    prefetch(shared, slot, -round);
    if (random() % 4 == 0) std::this_thread::yield();
    int value = -round;
    if (random() % 2 == 0 && vep::drop(&shared.words[slot])) {
      ++num_dropped;
      value = round;
      prefetch(shared, slot, value);  // the dropped entry is still in the queue
    }
    demand(shared, slot, value, random() % 2 == 0);
    num_wrong += shared.holds(slot, value) ? 0 : 1;
  }
  std::printf("%d rounds, %d dropped, %d wrong\n", kRounds, num_dropped, num_wrong);
  return num_wrong > 0 || num_dropped == 0;
}

}  // namespace

int main() {
  Shared shared;
  std::thread lane(run_lane, std::ref(shared));
  const int failed = run_planner(shared);
  shared.done.store(true);
  lane.join();
  return failed;
}
