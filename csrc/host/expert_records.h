// Where the expert records of one layer lie, in the host store and in the row space, and how one is copied.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "../record.h"

namespace vep {

// Load number `index` of int32 pairs (expert, row), which need not be aligned as a Load is.
inline Load load_at(const int32_t* loads, int64_t index) {
  return {loads[2 * index], loads[2 * index + 1]};
}

// How far the copy of one record has come.
struct CopyCursor {
  size_t segment = 0;
  int64_t offset = 0;
};

class ExpertRecords {
 public:
  // `record_bytes`: what a record counts as, padding included; 0 for the sum of its rows.
  // There are as many rows as experts.
  // Throws std::invalid_argument for a null address, an empty row, rows that overlap, sizes that overflow.
  ExpertRecords(std::vector<Segment> segments, int32_t num_experts, int64_t record_bytes)
      : segments_(std::move(segments)), num_experts_(num_experts) {
    if (segments_.empty() || num_experts < 1)
      throw std::invalid_argument("a layer of " + std::to_string(segments_.size()) + " segments and " +
                                  std::to_string(num_experts) + " experts: each must be at least 1");
    for (size_t index = 0; index < segments_.size(); ++index) {
      check(segments_[index], index);
      if (__builtin_add_overflow(row_bytes_, segments_[index].row_bytes, &row_bytes_))
        throw std::invalid_argument("the rows of a record are together longer than an address space");
    }
    record_bytes_ = record_bytes == 0 ? row_bytes_ : record_bytes;
    if (record_bytes_ < row_bytes_)
      throw std::invalid_argument("a record of " + std::to_string(record_bytes) + " bytes cannot hold rows of " +
                                  std::to_string(row_bytes_) + " bytes");
  }

  int32_t num_experts() const { return num_experts_; }
  int64_t row_bytes() const { return row_bytes_; }
  int64_t record_bytes() const { return record_bytes_; }

  // Copies at most `limit` bytes on from `cursor`, across segments. Returns how many; 0 at the end.
  int64_t copy(Load load, CopyCursor& cursor, int64_t limit) const {
    int64_t copied = 0;
    while (cursor.segment < segments_.size() && copied < limit) {
      const Segment& segment = segments_[cursor.segment];
      const int64_t length = std::min(limit - copied, segment.row_bytes - cursor.offset);
      std::memcpy(segment.rows + load.row * segment.row_bytes + cursor.offset,
                  segment.store + load.expert * segment.store_stride + cursor.offset, static_cast<size_t>(length));
      copied += length;
      cursor.offset += length;
      if (cursor.offset == segment.row_bytes) cursor = {cursor.segment + 1, 0};
    }
    return copied;
  }

  void copy(Load load) const {
    CopyCursor cursor;
    copy(load, cursor, row_bytes_);
  }

 private:
  void check(const Segment& segment, size_t index) const {
    const auto fail = [&](const std::string& what) {
      throw std::invalid_argument("segment " + std::to_string(index) + ": " + what);
    };
    if (segment.store == nullptr || segment.rows == nullptr) fail("null address of the store or of the rows");
    if (segment.row_bytes < 1) fail("rows of " + std::to_string(segment.row_bytes) + " bytes");
    if (num_experts_ > 1 && segment.store_stride < segment.row_bytes)
      fail("stride " + std::to_string(segment.store_stride) + " of the store is below the row of " +
           std::to_string(segment.row_bytes) + " bytes");
    int64_t in_store = 0;
    if (__builtin_mul_overflow(std::max(segment.store_stride, segment.row_bytes), num_experts_, &in_store))
      fail("stride " + std::to_string(segment.store_stride) + " times " + std::to_string(num_experts_) +
           " rows is more than an address space");
    const int64_t in_rows = segment.row_bytes * num_experts_;
    if (segment.store < segment.rows + in_rows && segment.rows < segment.store + in_store - segment.store_stride)
      fail("the store (" + std::to_string(in_store) + " bytes) and the rows (" + std::to_string(in_rows) +
           " bytes) overlap");
  }

  std::vector<Segment> segments_;
  int32_t num_experts_;
  int64_t row_bytes_ = 0;
  int64_t record_bytes_ = 0;
};

}  // namespace vep
