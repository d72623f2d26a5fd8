// Where the records of one layer lie: in the host store, and in the slots.
#pragma once

#include <cstdint>

namespace vep {

inline constexpr int kMaxSegments = 16;
inline constexpr int64_t kVectorBytes = 16;

// One expert tensor (w13, w2, scales...). Expert e's row is at store + e * store_stride, slot c's at pool +
// c * pool_stride. All five are multiples of kVectorBytes where the GPU copies; addresses are valid on the device.
struct Segment {
  const char* store;
  int64_t store_stride;
  char* pool;
  int64_t pool_stride;
  int64_t row_bytes;
};

// Passed to kernels by value: it lands in constant memory, and a graph keeps it, so addresses must not change.
struct RecordLayout {
  Segment segments[kMaxSegments];
  int32_t num_segments;
  int32_t num_experts;
  int32_t num_slots;
  int32_t record_vectors;  // 16-byte vectors of one record, all segments
};

// One record to copy. Lists of them are int32 (n, 2) tensors.
struct alignas(8) Load {
  int32_t expert;
  int32_t slot;
};

}  // namespace vep
