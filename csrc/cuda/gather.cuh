// Launchers of the staging kernels. None allocates, waits or asks the device anything: all can be captured.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "../record.h"

namespace vep {

// A list that a kernel reads: `count` lies on the device, `max_count` is the room behind `items`.
template <typename Item>
struct DeviceList {
  const Item* items;
  const int32_t* count;
  int32_t max_count;
};

// Per layer, int32 on the device, zero at first, in this order in memory.
struct Board {
  int32_t* states;             // (C) words of slot_state.h
  int32_t* demand_progress;    // (C) vectors copied, by position in the demand list; zero between launches
  int32_t* prefetch_progress;  // (C) the same for the prefetch list
  int32_t* next_chunk;         // (1) the prefetch blocks' ticket; zero between launches
  int32_t* num_left;           // (1) prefetch blocks that have ended; zero between launches
};

constexpr int64_t board_ints(int64_t num_slots) { return 3 * num_slots + 2; }

inline Board board_at(int32_t* memory, int64_t num_slots) {
  int32_t* tail = memory + 3 * num_slots;
  return {memory, memory + num_slots, memory + 2 * num_slots, tail, tail + 1};
}

// Per device, shared by its layers, int32 on the device, zero at first.
struct Lane {
  int32_t* demand_active;  // demand blocks that copy right now
  int32_t* errors;         // loads skipped and waits refused: see gather.cu
};

inline constexpr int64_t kLaneInts = 2;

inline Lane lane_at(int32_t* memory) { return {memory, memory + 1}; }

struct DemandLists {
  DeviceList<Load> loads;
  DeviceList<int32_t> late;  // slots whose record the prefetch lane copies
};

struct PrefetchLists {
  DeviceList<Load> loads;
  const int32_t* tickets;  // what enqueue returned for the load of the same position
};

// Loads the kernels' code into the current device. Otherwise CUDA does so at the first launch, which may wait for every
// running kernel and is no business of a capture.
cudaError_t load_kernels();

void launch_gather(const RecordLayout& layout, const DemandLists& lists, const Board& board, const Lane& lane,
                   int num_blocks, cudaStream_t stream);

void launch_await(const DeviceList<int32_t>& late, int32_t num_slots, const Board& board, const Lane& lane,
                  cudaStream_t stream);

void launch_prefetch(const RecordLayout& layout, const PrefetchLists& lists, const Board& board, const Lane& lane,
                     int num_blocks, int32_t chunk_vectors, cudaStream_t stream);

}  // namespace vep
