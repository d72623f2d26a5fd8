// The ticket protocol: what is happening to a slot, in one int32 per slot, shared by a planner, a prefetch lane and
// demand copies. Usable on host and device. Device atomics have device scope: a slot's word is never shared by both.
//
// The low 3 bits are the state, the upper 29 the ticket, which every new use of the slot increments. A prefetch lane
// starts a queue entry only if the word still holds the entry's ticket: a slot that was dropped and queued again for
// another expert while the old entry was still in the queue is not mistaken for the old one. (Tickets wrap after 2^29
// uses of one slot; an old entry would have to stay in the queue that long.)
//
//   READY ----enqueue---> QUEUED --start--> COPYING --request--> URGENT      finish: COPYING, URGENT, CLAIMED -> READY
//   DROPPED --enqueue---> QUEUED --claim--> CLAIMED
//   READY, DROPPED --begin_load--> CLAIMED
//                         QUEUED --drop---> DROPPED
//
// enqueue, begin_load, claim, drop and request belong to the planner's side, one thread at a time; start to the
// prefetch lane; finish to whoever copies. Only start competes with claim and drop, hence compare-and-swap there.
#pragma once

#include <cstdint>

#include "host_device.h"

#if defined(__CUDA_ARCH__)
#include <cuda/atomic>
#endif

namespace vep {

enum class SlotState : int32_t {
  kReady = 0,    // the record has landed, or the slot is free
  kQueued = 1,   // a prefetch is planned and its copy has not started
  kCopying = 2,  // the prefetch lane copies it
  kClaimed = 3,  // a demand copies it
  kDropped = 4,  // cancelled before its copy started: the slot is free
  kUrgent = 5,   // as kCopying, and a demand waits for it: the lane must not yield
};

constexpr int kStateBits = 3;

VEP_HD constexpr SlotState state_of(int32_t word) {
  return static_cast<SlotState>(static_cast<uint32_t>(word) & ((1u << kStateBits) - 1));
}

VEP_HD constexpr uint32_t ticket_of(int32_t word) {
  return static_cast<uint32_t>(word) >> kStateBits;
}

VEP_HD constexpr int32_t word_of(uint32_t ticket, SlotState state) {
  return static_cast<int32_t>((ticket << kStateBits) | static_cast<uint32_t>(state));
}

VEP_HD inline int32_t load_word(const int32_t* word) {
#if defined(__CUDA_ARCH__)
  return cuda::atomic_ref<int32_t, cuda::thread_scope_device>(*const_cast<int32_t*>(word))
      .load(cuda::memory_order_acquire);
#else
  return __atomic_load_n(word, __ATOMIC_ACQUIRE);
#endif
}

VEP_HD inline void store_word(int32_t* word, int32_t value) {
#if defined(__CUDA_ARCH__)
  cuda::atomic_ref<int32_t, cuda::thread_scope_device>(*word).store(value, cuda::memory_order_release);
#else
  __atomic_store_n(word, value, __ATOMIC_RELEASE);
#endif
}

VEP_HD inline bool swap_word(int32_t* word, int32_t expected, int32_t desired) {
#if defined(__CUDA_ARCH__)
  return cuda::atomic_ref<int32_t, cuda::thread_scope_device>(*word).compare_exchange_strong(
      expected, desired, cuda::memory_order_acq_rel, cuda::memory_order_acquire);
#else
  return __atomic_compare_exchange_n(word, &expected, desired, false, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE);
#endif
}

// Whether a record is on its way into the slot by a prefetch: no other record may be sent there.
VEP_HD inline bool in_flight(SlotState state) {
  return state == SlotState::kQueued || state == SlotState::kCopying || state == SlotState::kUrgent;
}

VEP_HD inline bool is_ready(const int32_t* word) {
  return state_of(load_word(word)) == SlotState::kReady;
}

// A prefetch into this slot is planned. Returns the ticket that `start` needs. The slot must not be in flight.
VEP_HD inline uint32_t enqueue(int32_t* word) {
  const int32_t next = word_of(ticket_of(load_word(word)) + 1, SlotState::kQueued);
  store_word(word, next);
  return ticket_of(next);
}

// A demand is about to copy into this slot. The slot must not be in flight.
VEP_HD inline void begin_load(int32_t* word) {
  store_word(word, word_of(ticket_of(load_word(word)) + 1, SlotState::kClaimed));
}

// The prefetch lane begins to copy. False: the entry was claimed, dropped or replaced, skip it.
VEP_HD inline bool start(int32_t* word, uint32_t ticket) {
  return swap_word(word, word_of(ticket, SlotState::kQueued), word_of(ticket, SlotState::kCopying));
}

// A demand takes the record over and copies it itself. False: it is not QUEUED (any more).
VEP_HD inline bool claim(int32_t* word) {
  const uint32_t ticket = ticket_of(load_word(word));
  return swap_word(word, word_of(ticket, SlotState::kQueued), word_of(ticket, SlotState::kClaimed));
}

// A cancellation. False: it is not QUEUED (any more), its copy goes on.
VEP_HD inline bool drop(int32_t* word) {
  const uint32_t ticket = ticket_of(load_word(word));
  return swap_word(word, word_of(ticket, SlotState::kQueued), word_of(ticket, SlotState::kDropped));
}

// A demand is going to wait for a record that the lane copies. False: the lane does not copy it (any more).
VEP_HD inline bool request(int32_t* word) {
  const uint32_t ticket = ticket_of(load_word(word));
  return swap_word(word, word_of(ticket, SlotState::kCopying), word_of(ticket, SlotState::kUrgent)) ||
         state_of(load_word(word)) == SlotState::kUrgent;
}

// The record has landed: everything written into the slot before is seen by whoever reads READY.
VEP_HD inline void finish(int32_t* word) {
  store_word(word, word_of(ticket_of(load_word(word)), SlotState::kReady));
}

// Where the prefetches of one layer stand, for a planner: one word per row.
struct SlotWords {
  int32_t* words;
  VEP_HD bool landed(int slot) const { return is_ready(&words[slot]); }
  // Cancels the copy into `slot` unless it has started; whether it was in time.
  VEP_HD bool drop(int slot) const { return vep::drop(&words[slot]); }
};

}  // namespace vep
