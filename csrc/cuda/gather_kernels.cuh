// Records travel from mapped host memory into rows: on demand, or ahead on a side stream.
//
// A load whose expert or row is out of range is skipped, a count outside its list is cut to it, and a wait for a slot
// that nobody copies is refused; each adds one to the board's errors (with VEP_DEBUG, the kernel traps). No other
// memory is touched. No kernel here triggers a programmatic launch, so a consumer never starts before its records are
// visible.
//
// Why nothing can hang, whatever runs beside whatever:
//  1. A demand block copies first and waits for nothing meanwhile. It counts in demand_active only while it copies, so
//     a prefetch block that yields to it waits for a block that is running and cannot be held up.
//  2. Only then does demand block 0 wait, and only for slots that are COPYING or URGENT. The prefetch
//     block that started such a record is running. Chunks are handed out in order, so what is left of the record was
//     taken by blocks that are running too, or is the next thing that this very block takes. Prefetch blocks that never
//     become resident are not needed, and prefetch blocks never wait for each other.
//  3. Hence a waiting demand block needs no more than the SMs that running prefetch blocks already hold. Nobody yields
//     to it: demand_active no longer counts it, and URGENT lets its records pass while other demands copy.
//  4. A prefetch kernel that has not started holds nobody up: its slots are QUEUED, and the plan claims those it needs.

#pragma once

#include "../record.h"
#include "../slot_state.h"

#ifdef __CUDACC__
#include <cuda/atomic>
#define VEP_BLOCK_THREADS 512
#else  // tests/native/cpp/gather_on_host.cc runs each block as one thread
#define VEP_BLOCK_THREADS 1
#endif

namespace vep {
namespace {

constexpr int kThreads = VEP_BLOCK_THREADS;
constexpr int kLoadsInFlight = 4;  // per thread, 32 KB per block; each costs a predicate, of which there are 7
constexpr int kAlignVectors = 8;   // blocks start at multiples of 128 bytes, the size of a link read
constexpr unsigned kPollNanoseconds = 200;

using DeviceInt = cuda::atomic_ref<int32_t, cuda::thread_scope_device>;

__device__ void report_error(const Board& board) {
#ifdef VEP_DEBUG
  __trap();
#endif
  DeviceInt(*board.errors).fetch_add(1, cuda::memory_order_relaxed);
}

// A record is read once: no room in L1. Not .nc, which the compiler would move behind __syncwarp.
__device__ uint4 load_once(const uint4* source) {
#ifdef __CUDA_ARCH__
  uint4 v;
  asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(source)
               : "memory");
  return v;
#else
  return *source;
#endif
}

// By the whole block. All loads of a round leave before the first store waits for one: __syncwarp keeps the compiler
// from mixing them.
__device__ void copy_vectors(const uint4* source, uint4* target, int32_t count) {
  VEP_PRAGMA(unroll 1)
  for (int32_t start = 0; start < count; start += kThreads * kLoadsInFlight) {
    const int32_t base = start + static_cast<int32_t>(threadIdx.x);
    uint4 vectors[kLoadsInFlight];
    VEP_PRAGMA(unroll)
    for (int i = 0; i < kLoadsInFlight; ++i) {
      if (base + i * kThreads < count) vectors[i] = load_once(source + base + i * kThreads);
    }
    __syncwarp();
    VEP_PRAGMA(unroll)
    for (int i = 0; i < kLoadsInFlight; ++i) {
      if (base + i * kThreads < count) target[base + i * kThreads] = vectors[i];
    }
  }
}

// By the whole block. For the short rows that are no multiple of a vector.
template <class Unit>
__device__ void copy_units(const char* source, char* target, int32_t num_bytes) {
  const int32_t count = num_bytes / static_cast<int32_t>(sizeof(Unit));
  VEP_PRAGMA(unroll 1)
  for (int32_t i = static_cast<int32_t>(threadIdx.x); i < count; i += kThreads) {
    reinterpret_cast<Unit*>(target)[i] = reinterpret_cast<const Unit*>(source)[i];
  }
}

// Vectors [first, last) of a record, counted through its segments in order. By the whole block.
__device__ void copy_part(const RecordLayout& layout, const Load& load, int32_t first, int32_t last) {
  int32_t start = 0;
  for (int i = 0; i < layout.num_segments && start < last; ++i) {
    const Segment& segment = layout.segments[i];
    const int32_t length = static_cast<int32_t>(vectors_of(segment.row_bytes));
    const int32_t from = max(first - start, 0);
    const int32_t to = min(last - start, length);
    if (from < to) {
      const char* source = segment.store + load.expert * segment.store_stride + from * kVectorBytes;
      char* target = segment.rows + load.row * segment.row_bytes + from * kVectorBytes;
      if (segment.row_bytes % kVectorBytes == 0) {
        copy_vectors(reinterpret_cast<const uint4*>(source), reinterpret_cast<uint4*>(target), to - from);
      } else {
        const int64_t end = to == length ? segment.row_bytes : to * kVectorBytes;
        const auto num_bytes = static_cast<int32_t>(end - from * kVectorBytes);
        if (segment.row_bytes % 4 == 0) {
          copy_units<uint32_t>(source, target, num_bytes);
        } else {
          copy_units<uint8_t>(source, target, num_bytes);
        }
      }
    }
    start += length;
  }
}

// After copy_part, by the whole block: the block that completes a record publishes all blocks' stores with READY.
__device__ void note_copied(int32_t count, int32_t record_vectors, int32_t* progress, int32_t* state) {
  __syncthreads();
  if (threadIdx.x == 0) {
    DeviceInt copied(*progress);
    if (copied.fetch_add(count, cuda::memory_order_acq_rel) + count == record_vectors) {
      copied.store(0, cuda::memory_order_relaxed);
      finish(state);
    }
  }
}

__device__ bool in_range(const RecordLayout& layout, const Load& load) {
  return load.expert >= 0 && load.expert < layout.num_experts && load.row >= 0 && load.row < layout.num_experts;
}

template <typename Item>
__device__ int32_t count_of(const DeviceList<Item>& list, const Board& board) {
  const int32_t count = *list.count;
  const int32_t usable = min(max(count, 0), list.max_count);
  if (count != usable && blockIdx.x == 0 && threadIdx.x == 0) report_error(board);
  return usable;
}

__device__ bool is_coming(int32_t word) {
  return state_of(word) == SlotState::kCopying || state_of(word) == SlotState::kUrgent;
}

// By one block, before it copies: late records pass although a demand is active.
__device__ void hurry_late(const DeviceList<int32_t>& late, int32_t num_late, int32_t num_rows, const Board& board) {
  for (int32_t i = threadIdx.x; i < num_late; i += kThreads) {
    const int32_t slot = late.items[i];
    if (slot >= 0 && slot < num_rows) request(&board.states[slot]);
  }
}

// By one block. A record that is neither here nor coming is an error: nobody can be trusted to bring it.
__device__ void wait_for_late(const DeviceList<int32_t>& late, int32_t num_late, int32_t num_rows, const Board& board) {
  for (int32_t i = threadIdx.x; i < num_late; i += kThreads) {
    const int32_t slot = late.items[i];
    if (slot < 0 || slot >= num_rows) {
      report_error(board);
      continue;
    }
    int32_t word = load_word(&board.states[slot]);
    while (is_coming(word)) {
      __nanosleep(kPollNanoseconds);
      word = load_word(&board.states[slot]);
    }
    if (state_of(word) != SlotState::kReady) report_error(board);
  }
}

// This block's even share of all vectors of all loads, whatever their number and size.
__device__ void copy_share(const RecordLayout& layout, const Load* loads, int32_t num_loads, const Board& board) {
  const int64_t per_record = layout.record_vectors;
  const int64_t total = num_loads * per_record;
  const int64_t units = (total + kAlignVectors - 1) / kAlignVectors;
  int64_t at = units * blockIdx.x / gridDim.x * kAlignVectors;
  const int64_t end = min(units * (blockIdx.x + 1) / gridDim.x * kAlignVectors, total);
  while (at < end) {
    const int32_t index = static_cast<int32_t>(at / per_record);
    const int32_t first = static_cast<int32_t>(at - index * per_record);
    const int32_t last = static_cast<int32_t>(min(per_record, first + end - at));
    const Load load = loads[index];
    if (in_range(layout, load)) {
      copy_part(layout, load, first, last);
      note_copied(last - first, layout.record_vectors, &board.demand_progress[index], &board.states[load.row]);
    } else if (first == 0 && threadIdx.x == 0) {
      report_error(board);
    }
    at += last - first;
  }
}

__global__ void __launch_bounds__(kThreads) gather_kernel(const __grid_constant__ RecordLayout layout,
                                                          const DemandLists lists, const Board board, const Lane lane) {
  const int32_t num_loads = count_of(lists.loads, board);
  const int32_t num_late = blockIdx.x == 0 ? count_of(lists.late, board) : 0;
  if (num_loads > 0) {
    if (threadIdx.x == 0) DeviceInt(*lane.demand_active).fetch_add(1, cuda::memory_order_relaxed);
    hurry_late(lists.late, num_late, layout.num_experts, board);
    copy_share(layout, lists.loads.items, num_loads, board);
    __syncthreads();
    if (threadIdx.x == 0) DeviceInt(*lane.demand_active).fetch_sub(1, cuda::memory_order_relaxed);
  }
  wait_for_late(lists.late, num_late, layout.num_experts, board);
}

struct Chunk {
  Load load;
  int32_t index;  // of the load; negative: no chunk is left
  int32_t first;
  int32_t last;
};

// Whether this lane copies the record. All blocks get the same answer without talking: a ticket leaves QUEUED once, and
// a record that this lane started is coming until the last of its chunks, the asker's among them, is done.
__device__ bool is_ours(const Lane& lane, int32_t* state, uint32_t ticket) {
  if (start(state, ticket)) {
    DeviceInt(*lane.queued).fetch_sub(1, cuda::memory_order_relaxed);
    return true;
  }
  const int32_t word = load_word(state);
  return ticket_of(word) == ticket && is_coming(word);
}

// Until no demand copies, or this record is wanted at once, or not at all.
__device__ void yield_to_demand(const Lane& lane, int32_t* state) {
  while (DeviceInt(*lane.demand_active).load(cuda::memory_order_relaxed) > 0) {
    const SlotState now = state_of(load_word(state));
    if (now != SlotState::kQueued && now != SlotState::kCopying) return;
    __nanosleep(kPollNanoseconds);
  }
}

// By one thread: the next chunk that is to be copied.
__device__ Chunk take_chunk(const RecordLayout& layout, const PrefetchLists& lists, int32_t num_loads,
                            int32_t chunk_vectors, const Board& board, const Lane& lane) {
  const int32_t per_record = (layout.record_vectors - 1) / chunk_vectors + 1;
  DeviceInt next(*board.next_chunk);
  while (true) {
    const int32_t number = next.fetch_add(1, cuda::memory_order_relaxed);
    const int32_t index = number / per_record;
    if (index >= num_loads) return {{0, 0}, -1, 0, 0};
    const Load load = lists.loads.items[index];
    if (in_range(layout, load)) {
      int32_t* state = &board.states[load.row];
      yield_to_demand(lane, state);
      if (is_ours(lane, state, static_cast<uint32_t>(lists.tickets[index]))) {
        const int32_t first = number % per_record * chunk_vectors;
        return {load, index, first, min(first + chunk_vectors, layout.record_vectors)};
      }
    } else if (number % per_record == 0) {
      report_error(board);
    }
    // All blocks skip this record.
    next.fetch_max((index + 1) * per_record, cuda::memory_order_relaxed);
  }
}

__global__ void __launch_bounds__(kThreads)
    prefetch_kernel(const __grid_constant__ RecordLayout layout, const PrefetchLists lists, const Board board,
                    const Lane lane, const int32_t chunk_vectors) {
  __shared__ Chunk shared_chunk;
  const int32_t num_loads = count_of(lists.loads, board);
  while (num_loads > 0) {
    if (threadIdx.x == 0) shared_chunk = take_chunk(layout, lists, num_loads, chunk_vectors, board, lane);
    __syncthreads();
    const Chunk chunk = shared_chunk;
    if (chunk.index < 0) break;
    copy_part(layout, chunk.load, chunk.first, chunk.last);
    note_copied(chunk.last - chunk.first, layout.record_vectors, &board.prefetch_progress[chunk.index],
                &board.states[chunk.load.row]);
  }
  if (num_loads > 0 && threadIdx.x == 0) {
    DeviceInt left(*board.num_left);
    if (left.fetch_add(1, cuda::memory_order_acq_rel) + 1 == static_cast<int32_t>(gridDim.x)) {
      DeviceInt(*board.next_chunk).store(0, cuda::memory_order_relaxed);
      left.store(0, cuda::memory_order_relaxed);
    }
  }
}

}  // namespace
}  // namespace vep
