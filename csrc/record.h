// Where the records of one layer lie, and what the staging kernels are told. Plain C++, no CUDA.
#pragma once

#include <cstdint>

#include "host_device.h"

namespace vep {

inline constexpr int kMaxSegments = 16;
inline constexpr int64_t kVectorBytes = 16;

// One expert tensor (w13, w2, scales...). Expert e's row in the host store is at store + e * store_stride; row r of the
// row space is at rows + r * row_bytes. Where the GPU copies, all but row_bytes are multiples of kVectorBytes, and
// addresses are valid there. Rows of scales may be as short as a byte.
struct Segment {
  const char* store;
  int64_t store_stride;
  char* rows;
  int64_t row_bytes;
};

// 16-byte vectors of a row, of which the last may be a part of one.
VEP_HD constexpr int64_t vectors_of(int64_t row_bytes) {
  return (row_bytes + kVectorBytes - 1) / kVectorBytes;
}

constexpr int kSegmentWords = 4;  // of one segment in a table of int64

// Passed to kernels by value: it lands in constant memory, and a graph keeps it, so addresses must not change.
struct RecordLayout {
  Segment segments[kMaxSegments];
  int32_t num_segments;
  int32_t num_experts;     // and rows
  int32_t record_vectors;  // 16-byte vectors of one record, all segments
};

// One record to copy. Lists of them are int32 (n, 2) tensors.
struct alignas(8) Load {
  int32_t expert;
  int32_t row;
};

// A list that a kernel reads: `count` lies on the device, `max_count` is the room behind `items`.
template <typename Item>
struct DeviceList {
  const Item* items;
  const int32_t* count;
  int32_t max_count;
};

// Per layer, int32 on the device, zero at first, in this order in memory. E: experts, and rows.
struct Board {
  int32_t* states;             // (E) words of slot_state.h, one per row
  int32_t* demand_progress;    // (E) vectors copied, by position in the demand list; zero between launches
  int32_t* prefetch_progress;  // (E) the same for the prefetch list
  int32_t* next_chunk;         // (1) the prefetch blocks' ticket; zero between launches
  int32_t* num_left;           // (1) prefetch blocks that have ended; zero between launches
  int32_t* errors;             // (1) loads skipped and waits refused since the start: see gather_kernels.cuh
};

constexpr int64_t board_ints(int64_t num_experts) {
  return 3 * num_experts + 3;
}

inline Board board_at(int32_t* memory, int64_t num_experts) {
  int32_t* tail = memory + 3 * num_experts;
  return {memory, memory + num_experts, memory + 2 * num_experts, tail, tail + 1, tail + 2};
}

// Per device, shared by its layers, int32 on the device, zero at first.
struct Lane {
  int32_t* demand_active;  // demand blocks that copy right now
  int32_t* queued;         // prefetches planned whose copy has not started, and still may
};

constexpr int64_t lane_ints() {
  return 2;
}

VEP_HD inline Lane lane_at(int32_t* memory) {
  return {memory, memory + 1};
}

struct DemandLists {
  DeviceList<Load> loads;
  DeviceList<int32_t> late;  // slots whose record the prefetch lane copies
};

struct PrefetchLists {
  DeviceList<Load> loads;
  const int32_t* tickets;  // what enqueue returned for the load of the same position
};

}  // namespace vep
