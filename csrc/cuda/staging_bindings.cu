// The staging kernels for Python. Errors say which number is wrong; streams are cudaStream_t handles, addresses int64.

#include <cuda_runtime.h>
#include <tvm/ffi/extra/cuda/device_guard.h>
#include <tvm/ffi/tvm_ffi.h>

#include <limits>
#include <vector>

#include "gather.cuh"
#include "tensors.cuh"

namespace vep {
namespace {

using tvm::ffi::TensorView;

constexpr int64_t kMaxBlocks = 1024;
constexpr int64_t kMinChunkBytes = 4096;
constexpr int64_t kMaxRecordBytes = int64_t{1} << 32;  // all counts of vectors and chunks then fit an int32

void check_cuda(cudaError_t status, const char* what) {
  if (status != cudaSuccess) TVM_FFI_THROW(RuntimeError) << what << ": " << cudaGetErrorString(status);
}

void check_between(int64_t value, int64_t low, int64_t high, const char* what) {
  if (value < low || value > high) {
    TVM_FFI_THROW(ValueError) << what << " is " << value << ", must be " << low << " to " << high;
  }
}

template <class Item>
const Item* cpu_data(const TensorView& tensor, const char* what) {
  const DLDataType type = tensor.dtype();
  TVM_FFI_CHECK(tensor.device().device_type == kDLCPU && tensor.IsContiguous() && type.code == kDLInt &&
                    type.bits == 8 * sizeof(Item) && type.lanes == 1,
                ValueError)
      << what << " must be a contiguous int" << 8 * sizeof(Item) << " tensor on the CPU";
  return reinterpret_cast<const Item*>(static_cast<const char*>(tensor.data_ptr()) + tensor.byte_offset());
}

int32_t* device_ints(const TensorView& tensor, int64_t room, const char* what) {
  TVM_FFI_CHECK(tensor.numel() >= room, ValueError) << what << " has " << tensor.numel() << " items, needs " << room;
  return cuda_data<int32_t>(tensor, what);
}

// Rows of two: (expert, slot).
void check_pairs(const TensorView& loads) {
  TVM_FFI_CHECK(loads.ndim() == 2 && loads.size(1) == 2, ValueError) << "loads must have 2 columns, expert and slot";
}

void check_segment(int64_t index, const int64_t* row, int64_t num_slots) {
  const char* names[] = {"store address", "store stride", "pool address", "pool stride", "row bytes"};
  for (int i = 0; i < 5; ++i) {
    const bool may_be_zero = (i == 1) || (i == 3 && num_slots == 1);
    if (row[i] % kVectorBytes != 0 || row[i] < 0 || (row[i] == 0 && !may_be_zero)) {
      TVM_FFI_THROW(ValueError) << "segment " << index << ": " << names[i] << " is " << row[i]
                                << ", must be a positive multiple of " << kVectorBytes;
    }
  }
  if (row[3] < row[4] && num_slots > 1) {
    TVM_FFI_THROW(ValueError) << "segment " << index << ": pool stride " << row[3] << " is below its " << row[4]
                              << " row bytes";
  }
}

RecordLayout layout_of(const TensorView& table, int64_t num_experts, int64_t num_slots) {
  const auto* rows = cpu_data<int64_t>(table, "segment table");
  TVM_FFI_CHECK(table.ndim() == 2 && table.size(1) == 5, ValueError) << "the segment table must have 5 columns";
  check_between(table.size(0), 1, kMaxSegments, "number of segments");
  check_between(num_experts, 1, 1 << 20, "num_experts");
  check_between(num_slots, 1, 1 << 20, "num_slots");
  RecordLayout layout{};
  layout.num_segments = static_cast<int32_t>(table.size(0));
  layout.num_experts = static_cast<int32_t>(num_experts);
  layout.num_slots = static_cast<int32_t>(num_slots);
  int64_t record_bytes = 0;
  for (int64_t i = 0; i < layout.num_segments; ++i) {
    const int64_t* row = rows + 5 * i;
    check_segment(i, row, num_slots);
    check_between(row[4], 1, kMaxRecordBytes, "row bytes");
    layout.segments[i] = {reinterpret_cast<const char*>(row[0]), row[1], reinterpret_cast<char*>(row[2]), row[3],
                          row[4]};
    record_bytes += row[4];
  }
  check_between(record_bytes, 1, kMaxRecordBytes, "bytes of a record");
  layout.record_vectors = static_cast<int32_t>(record_bytes / kVectorBytes);
  return layout;
}

Board board_of(const TensorView& board, int64_t num_slots) {
  return board_at(device_ints(board, board_ints(num_slots), "board"), num_slots);
}

Lane lane_of(const TensorView& lane) { return lane_at(device_ints(lane, kLaneInts, "lane")); }

DeviceList<Load> loads_of(const TensorView& loads, const TensorView& count, int64_t num_slots) {
  check_pairs(loads);
  check_between(loads.size(0), 0, num_slots, "room in the list of loads");
  auto* items = cuda_data<int32_t>(loads, "loads");
  const bool is_aligned = reinterpret_cast<uintptr_t>(items) % alignof(Load) == 0;
  TVM_FFI_CHECK(is_aligned, ValueError) << "loads must be 8-byte aligned";
  return {reinterpret_cast<const Load*>(items), device_ints(count, 1, "number of loads"),
          static_cast<int32_t>(loads.size(0))};
}

DeviceList<int32_t> late_of(const TensorView& late, const TensorView& count) {
  return {device_ints(late, 0, "late"), device_ints(count, 1, "number of late slots"),
          static_cast<int32_t>(late.numel())};
}

cudaStream_t stream_of(int64_t handle) { return reinterpret_cast<cudaStream_t>(handle); }

// One copy per segment of each load.
struct CopyBatch {
  std::vector<void*> targets;
  std::vector<const void*> sources;
  std::vector<size_t> sizes;
};

CopyBatch copies_of(const RecordLayout& layout, const TensorView& loads) {
  check_pairs(loads);
  const auto* items = reinterpret_cast<const Load*>(cpu_data<int32_t>(loads, "loads"));
  CopyBatch batch;
  for (int64_t i = 0; i < loads.size(0); ++i) {
    check_between(items[i].expert, 0, layout.num_experts - 1, "expert of a load");
    check_between(items[i].slot, 0, layout.num_slots - 1, "slot of a load");
    for (int s = 0; s < layout.num_segments; ++s) {
      const Segment& segment = layout.segments[s];
      batch.sources.push_back(segment.store + items[i].expert * segment.store_stride);
      batch.targets.push_back(segment.pool + items[i].slot * segment.pool_stride);
      batch.sizes.push_back(static_cast<size_t>(segment.row_bytes));
    }
  }
  return batch;
}

// Whether the driver may be handed all copies at once: it cannot in a capture or on the default stream.
bool can_batch(cudaStream_t stream) {
  if (stream == nullptr || stream == cudaStreamLegacy || stream == cudaStreamPerThread) return false;
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  check_cuda(cudaStreamIsCapturing(stream, &status), "cudaStreamIsCapturing");
  return status == cudaStreamCaptureStatusNone;
}

}  // namespace

int64_t check_layout(TensorView table, int64_t num_experts, int64_t num_slots) {
  return layout_of(table, num_experts, num_slots).record_vectors * kVectorBytes;
}

void load_staging_kernels(int64_t device) {
  tvm::ffi::CUDADeviceGuard guard(static_cast<int>(device));
  check_cuda(load_kernels(), "load_staging_kernels");
}

int64_t device_pointer(int64_t host_address, int64_t device) {
  tvm::ffi::CUDADeviceGuard guard(static_cast<int>(device));
  void* pointer = nullptr;
  const cudaError_t status = cudaHostGetDevicePointer(&pointer, reinterpret_cast<void*>(host_address), 0);
  if (status != cudaSuccess) {
    cudaGetLastError();
    TVM_FFI_THROW(RuntimeError) << "host address " << host_address << " is not mapped into device " << device << " ("
                                << cudaGetErrorString(status)
                                << "): the host store must be page-locked, see pin_memory";
  }
  return reinterpret_cast<int64_t>(pointer);
}

void gather_records(TensorView table, int64_t num_experts, int64_t num_slots, TensorView loads, TensorView count,
                    TensorView late, TensorView late_count, TensorView board, TensorView lane, int64_t num_blocks,
                    int64_t stream) {
  check_between(num_blocks, 1, kMaxBlocks, "num_blocks");
  const RecordLayout layout = layout_of(table, num_experts, num_slots);
  const DemandLists lists{loads_of(loads, count, num_slots), late_of(late, late_count)};
  tvm::ffi::CUDADeviceGuard guard(board.device().device_id);
  launch_gather(layout, lists, board_of(board, num_slots), lane_of(lane), static_cast<int>(num_blocks),
                stream_of(stream));
  check_launch("gather_records");
}

void await_slots(TensorView late, TensorView late_count, int64_t num_slots, TensorView board, TensorView lane,
                 int64_t stream) {
  tvm::ffi::CUDADeviceGuard guard(board.device().device_id);
  launch_await(late_of(late, late_count), static_cast<int32_t>(num_slots), board_of(board, num_slots), lane_of(lane),
               stream_of(stream));
  check_launch("await_slots");
}

void prefetch_records(TensorView table, int64_t num_experts, int64_t num_slots, TensorView loads, TensorView tickets,
                      TensorView count, TensorView board, TensorView lane, int64_t num_blocks, int64_t chunk_bytes,
                      int64_t stream) {
  check_between(num_blocks, 1, kMaxBlocks, "num_blocks");
  check_between(chunk_bytes, kMinChunkBytes, kMaxRecordBytes, "chunk_bytes");
  const RecordLayout layout = layout_of(table, num_experts, num_slots);
  const int64_t chunk_vectors = chunk_bytes / kVectorBytes;
  check_between(loads.size(0) * ((layout.record_vectors - 1) / chunk_vectors + 1), 0,
                std::numeric_limits<int32_t>::max() / 2, "chunks of a full list");
  const PrefetchLists lists{loads_of(loads, count, num_slots), device_ints(tickets, loads.size(0), "tickets")};
  tvm::ffi::CUDADeviceGuard guard(board.device().device_id);
  launch_prefetch(layout, lists, board_of(board, num_slots), lane_of(lane), static_cast<int>(num_blocks),
                  static_cast<int32_t>(chunk_vectors), stream_of(stream));
  check_launch("prefetch_records");
}

void copy_records_async(TensorView table, int64_t num_experts, int64_t num_slots, TensorView loads, int64_t device,
                        bool batched, int64_t stream_handle) {
  const CopyBatch copies = copies_of(layout_of(table, num_experts, num_slots), loads);
  const cudaStream_t stream = stream_of(stream_handle);
  tvm::ffi::CUDADeviceGuard guard(static_cast<int>(device));
#if CUDART_VERSION >= 13000
  if (batched && !copies.sizes.empty() && can_batch(stream)) {
    cudaMemcpyAttributes attributes{};
    attributes.srcAccessOrder = cudaMemcpySrcAccessOrderStream;
    size_t first = 0;
    check_cuda(cudaMemcpyBatchAsync(copies.targets.data(), copies.sources.data(), copies.sizes.data(),
                                    copies.sizes.size(), &attributes, &first, 1, stream),
               "cudaMemcpyBatchAsync");
    return;
  }
#endif
  for (size_t i = 0; i < copies.sizes.size(); ++i) {
    check_cuda(cudaMemcpyAsync(copies.targets[i], copies.sources[i], copies.sizes[i], cudaMemcpyDefault, stream),
               "cudaMemcpyAsync");
  }
}

}  // namespace vep

TVM_FFI_DLL_EXPORT_TYPED_FUNC(board_ints, vep::board_ints);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(check_layout, vep::check_layout);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(load_staging_kernels, vep::load_staging_kernels);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(device_pointer, vep::device_pointer);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(gather_records, vep::gather_records);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(await_slots, vep::await_slots);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(prefetch_records, vep::prefetch_records);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(copy_records_async, vep::copy_records_async);
