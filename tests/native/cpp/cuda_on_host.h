// Enough of CUDA to run kernels on host threads: index arithmetic and protocols, not performance. A block is one
// thread, or several that share a barrier (plan_on_host.cc).
#pragma once

#include <algorithm>
#include <atomic>
#include <barrier>
#include <chrono>
#include <cstdint>
#include <thread>

#define __device__
#define __global__
#define __shared__
#define __grid_constant__
#define __launch_bounds__(...)
#define VEP_DYNAMIC_SHARED(name) int64_t* name = dynamic_shared
#define VEP_WARP_THREADS 1

// With VEP_SLOW_COPIES, copying one takes time now and then, so that a record's copy can be seen half done.
struct uint4 {
  uint32_t x = 0, y = 0, z = 0, w = 0;

  uint4() = default;
  explicit uint4(uint32_t value) : x(value), y(~value), z(value * 3), w(value * 5) {}
  uint4(const uint4& other) : x(other.x), y(other.y), z(other.z), w(other.w) {
#ifdef VEP_SLOW_COPIES
    static thread_local int copies = 0;
    if (++copies % 40 == 0) std::this_thread::sleep_for(std::chrono::microseconds(30));
#endif
  }
  uint4& operator=(const uint4&) = default;
};
struct Index {
  unsigned x;
};
inline thread_local Index blockIdx, gridDim, threadIdx;
inline thread_local int64_t* dynamic_shared = nullptr;
inline thread_local std::barrier<>* block_barrier = nullptr;
using std::max;
using std::min;
template <class A, class B>
int64_t min(A a, B b) {
  return std::min<int64_t>(a, b);
}
inline void __syncthreads() {
  if (block_barrier) block_barrier->arrive_and_wait();
}
inline void __syncwarp() {}
inline int64_t __shfl_up_sync(unsigned, int64_t value, int) {
  return value;
}
inline void __nanosleep(unsigned nanoseconds) {
  std::this_thread::sleep_for(std::chrono::nanoseconds(nanoseconds));
}
inline int32_t load_relaxed(const int32_t* place) {
  return __atomic_load_n(place, __ATOMIC_RELAXED);
}
inline void atomicAdd(int32_t* place, int32_t value) {
  __atomic_fetch_add(place, value, __ATOMIC_RELAXED);
}
inline void atomicMin(int32_t* place, int32_t value) {
  int32_t seen = load_relaxed(place);
  while (seen > value && !__atomic_compare_exchange_n(place, &seen, value, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {}
}
inline void atomicMax(int32_t* place, int32_t value) {
  int32_t seen = load_relaxed(place);
  while (seen < value && !__atomic_compare_exchange_n(place, &seen, value, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {}
}

namespace cuda {
using std::memory_order_acq_rel;
using std::memory_order_acquire;
using std::memory_order_relaxed;
using std::memory_order_release;
enum thread_scope { thread_scope_device };
template <class T, thread_scope>
struct atomic_ref : std::atomic_ref<T> {
  using std::atomic_ref<T>::atomic_ref;
  T fetch_max(T value, std::memory_order) const {
    T seen = this->load();
    while (seen < value && !this->compare_exchange_weak(seen, value)) {}
    return seen;
  }
};
}  // namespace cuda
