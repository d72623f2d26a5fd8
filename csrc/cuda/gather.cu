// The copy kernels for Python. Errors say which number is wrong; streams are cudaStream_t handles, addresses int64. No
// launch allocates, waits or asks the device anything: all can be captured.

#include <cuda_runtime.h>
#include <tvm/ffi/extra/cuda/device_guard.h>
#include <tvm/ffi/tvm_ffi.h>

#include <limits>

#include "gather_kernels.cuh"
#include "tensors.cuh"

namespace vep {
namespace {

using tvm::ffi::TensorView;

constexpr int64_t kMaxBlocks = 1024;
constexpr int64_t kMinChunkBytes = 4096;
constexpr int64_t kMaxRecordBytes = int64_t{1} << 32;  // all counts of vectors and chunks then fit an int32

void check_between(int64_t value, int64_t low, int64_t high, const char* what) {
  if (value < low || value > high) {
    TVM_FFI_THROW(ValueError) << what << " is " << value << ", must be " << low << " to " << high;
  }
}

// `row`: [store address, store stride, address of the rows, row bytes].
Segment segment_of(int64_t index, const int64_t* row) {
  const char* names[kSegmentWords] = {"store address", "store stride", "address of the rows", "row bytes"};
  for (int i = 0; i < kSegmentWords; ++i) {
    const int64_t unit = i == 3 ? 1 : kVectorBytes;
    if (row[i] % unit != 0 || row[i] < 0 || (row[i] == 0 && i != 1)) {
      TVM_FFI_THROW(ValueError) << "segment " << index << ": " << names[i] << " is " << row[i]
                                << ", must be a positive multiple of " << unit;
    }
  }
  check_between(row[3], 1, kMaxRecordBytes, "row bytes");
  return {reinterpret_cast<const char*>(row[0]), row[1], reinterpret_cast<char*>(row[2]), row[3]};
}

// `table`: int64 (S, 4) on the CPU, a row per segment.
RecordLayout layout_of(const TensorView& table, int64_t num_experts) {
  const DLDataType type = table.dtype();
  TVM_FFI_CHECK(table.device().device_type == kDLCPU && table.IsContiguous() && type.code == kDLInt &&
                    type.bits == 64 && table.ndim() == 2 && table.size(1) == kSegmentWords,
                ValueError)
      << "the segment table must be a contiguous int64 tensor (S, " << kSegmentWords << ") on the CPU";
  check_between(table.size(0), 1, kMaxSegments, "number of segments");
  check_between(num_experts, 1, 1 << 20, "num_experts");
  const auto* rows = reinterpret_cast<const int64_t*>(static_cast<const char*>(table.data_ptr()) + table.byte_offset());
  RecordLayout layout{};
  layout.num_segments = static_cast<int32_t>(table.size(0));
  layout.num_experts = static_cast<int32_t>(num_experts);
  int64_t record_vectors = 0;
  for (int64_t i = 0; i < layout.num_segments; ++i) {
    layout.segments[i] = segment_of(i, rows + kSegmentWords * i);
    record_vectors += vectors_of(layout.segments[i].row_bytes);
  }
  check_between(record_vectors * kVectorBytes, 1, kMaxRecordBytes, "bytes of a record");
  layout.record_vectors = static_cast<int32_t>(record_vectors);
  return layout;
}

Board board_of(const TensorView& board, int64_t num_experts) {
  return board_at(cuda_data<int32_t>(board, board_ints(num_experts), "board"), num_experts);
}

Lane lane_of(const TensorView& lane) {
  return lane_at(cuda_data<int32_t>(lane, lane_ints(), "lane"));
}

// `loads`: int32 (n, 2), rows of (expert, row).
DeviceList<Load> loads_of(const TensorView& loads, const TensorView& count, int64_t num_experts) {
  TVM_FFI_CHECK(loads.ndim() == 2 && loads.size(1) == 2, ValueError) << "loads must have 2 columns, expert and row";
  check_between(loads.size(0), 0, num_experts, "room in the list of loads");
  auto* items = cuda_data<int32_t>(loads, 0, "loads");
  const bool is_aligned = reinterpret_cast<uintptr_t>(items) % alignof(Load) == 0;
  TVM_FFI_CHECK(is_aligned, ValueError) << "loads must be 8-byte aligned";
  return {reinterpret_cast<const Load*>(items), cuda_data<int32_t>(count, 1, "number of loads"),
          static_cast<int32_t>(loads.size(0))};
}

DeviceList<int32_t> late_of(const TensorView& late, const TensorView& count) {
  return {cuda_data<int32_t>(late, 0, "late"), cuda_data<int32_t>(count, 1, "number of late slots"),
          static_cast<int32_t>(late.numel())};
}

// Bytes of a record, in whole vectors; ValueError, with the number, for a layout that the kernels do not take.
int64_t CheckLayout(TensorView table, int64_t num_experts) {
  return layout_of(table, num_experts).record_vectors * kVectorBytes;
}

// Loads the kernels' code. Otherwise CUDA does so at the first launch, which may wait for every running kernel and is
// no business of a capture.
void LoadGatherKernels(int64_t device) {
  tvm::ffi::CUDADeviceGuard guard(static_cast<int>(device));
  cudaFuncAttributes attributes;
  check_cuda(cudaFuncGetAttributes(&attributes, gather_kernel), "gather_kernel");
  check_cuda(cudaFuncGetAttributes(&attributes, prefetch_kernel), "prefetch_kernel");
}

int64_t DevicePointer(int64_t host_address, int64_t device) {
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

void GatherRecords(TensorView table, int64_t num_experts, TensorView loads, TensorView count, TensorView late,
                   TensorView late_count, TensorView board, TensorView lane, int64_t num_blocks, int64_t stream) {
  check_between(num_blocks, 1, kMaxBlocks, "num_blocks");
  const RecordLayout layout = layout_of(table, num_experts);
  const DemandLists lists{loads_of(loads, count, num_experts), late_of(late, late_count)};
  const Board states = board_of(board, num_experts);
  tvm::ffi::CUDADeviceGuard guard(board.device().device_id);
  launch(gather_kernel, static_cast<int>(num_blocks), kThreads, 0, stream, layout, lists, states, lane_of(lane));
  check_launch("gather_records");
}

void PrefetchRecords(TensorView table, int64_t num_experts, TensorView loads, TensorView tickets, TensorView count,
                     TensorView board, TensorView lane, int64_t num_blocks, int64_t chunk_bytes, int64_t stream) {
  check_between(num_blocks, 1, kMaxBlocks, "num_blocks");
  check_between(chunk_bytes, kMinChunkBytes, kMaxRecordBytes, "chunk_bytes");
  const RecordLayout layout = layout_of(table, num_experts);
  const int64_t chunk_vectors = chunk_bytes / kVectorBytes;
  check_between(loads.size(0) * ((layout.record_vectors - 1) / chunk_vectors + 1), 0,
                std::numeric_limits<int32_t>::max() / 2, "chunks of a full list");
  const PrefetchLists lists{loads_of(loads, count, num_experts), cuda_data<int32_t>(tickets, loads.size(0), "tickets")};
  const Board states = board_of(board, num_experts);
  tvm::ffi::CUDADeviceGuard guard(board.device().device_id);
  launch(prefetch_kernel, static_cast<int>(num_blocks), kThreads, 0, stream, layout, lists, states, lane_of(lane),
         static_cast<int32_t>(chunk_vectors));
  check_launch("prefetch_records");
}

}  // namespace
}  // namespace vep

TVM_FFI_DLL_EXPORT_TYPED_FUNC(board_ints, vep::board_ints);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(lane_ints, vep::lane_ints);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(check_layout, vep::CheckLayout);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(load_gather_kernels, vep::LoadGatherKernels);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(device_pointer, vep::DevicePointer);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(gather_records, vep::GatherRecords);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(prefetch_records, vep::PrefetchRecords);
