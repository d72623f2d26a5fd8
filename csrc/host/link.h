// The host-to-accelerator link that demand and prefetch share, emulated where there is none.
#pragma once

#include <time.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <stdexcept>
#include <string>

namespace vep {

using Clock = std::chrono::steady_clock;
using Time = Clock::time_point;
using std::chrono::nanoseconds;

inline double seconds_between(Time from, Time to) {
  return std::chrono::duration<double>(to - from).count();
}

inline void relax_cpu() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

inline void spin_until(Time deadline) {
  while (Clock::now() < deadline) relax_cpu();
}

// A step that waits for its records spins for so long before it sleeps: sleeping is inexact, and whoever sleeps loses
// the core and its caches, while an accelerator that waits for its link loses nothing.
constexpr nanoseconds kStepSpin{20'000'000};

// Returns at `deadline`, not before and hardly later.
inline void wait_until(Time deadline) {
  const Time wake = deadline - kStepSpin;
  if (Clock::now() < wake) {
    const auto since_epoch = std::chrono::duration_cast<nanoseconds>(wake.time_since_epoch()).count();
    const timespec at{static_cast<time_t>(since_epoch / 1'000'000'000), static_cast<long>(since_epoch % 1'000'000'000)};
    clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &at, nullptr);
  }
  spin_until(deadline);
}

// A transfer of n bytes occupies the link for n / bandwidth; its data lands a latency after that, and the latency
// occupies nothing. Without emulation both are zero. Thread-safe.
class Link {
 public:
  // `gbps`: 10^9 bytes per second, 0 for no emulation; `latency_us`: microseconds per batch.
  Link(double gbps, double latency_us) : gbps_(gbps), latency_(static_cast<int64_t>(latency_us * 1e3)) {
    if (!std::isfinite(gbps) || gbps < 0 || !std::isfinite(latency_us) || latency_us < 0 || latency_us > 1e9)
      throw std::invalid_argument("link of " + std::to_string(gbps) + " GB/s and " + std::to_string(latency_us) +
                                  " us: the bandwidth must be 0 (not emulated) or more, the latency 0 to 1e9");
    if (gbps == 0 && latency_us > 0)
      throw std::invalid_argument("a link latency of " + std::to_string(latency_us) + " us needs a link bandwidth");
  }

  nanoseconds latency() const { return latency_; }

  // Occupies the link for `num_bytes`, from `earliest` on or once it is free. Returns when the last byte has crossed.
  Time reserve(Time earliest, int64_t num_bytes) {
    if (gbps_ == 0) return earliest;
    const int64_t lasts = static_cast<int64_t>(std::ceil(static_cast<double>(num_bytes) / gbps_));
    const int64_t from = std::chrono::duration_cast<nanoseconds>(earliest.time_since_epoch()).count();
    int64_t busy_until = busy_until_.load(std::memory_order_relaxed);
    int64_t end;
    do {
      end = std::max(busy_until, from) + lasts;
    } while (!busy_until_.compare_exchange_weak(busy_until, end, std::memory_order_relaxed));
    return Time(nanoseconds(end));
  }

 private:
  const double gbps_;
  const nanoseconds latency_;
  std::atomic<int64_t> busy_until_{0};  // nanoseconds of Clock
};

}  // namespace vep
