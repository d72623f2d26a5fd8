// Tensors that come in through DLPack, and what CUDA answers, checked.
#pragma once

#include <cuda_runtime.h>
#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/error.h>

#include <cstdint>

namespace vep {

// The data of a contiguous CUDA tensor of at least `room` `Item`s; an error names `what`.
template <class Item>
Item* cuda_data(const tvm::ffi::TensorView& tensor, int64_t room, const char* what) {
  const DLDataType type = tensor.dtype();
  TVM_FFI_CHECK(tensor.device().device_type == kDLCUDA, ValueError) << what << " must lie on a GPU";
  TVM_FFI_CHECK(type.code == kDLInt && type.bits == 8 * sizeof(Item) && type.lanes == 1, TypeError)
      << what << " must be int" << 8 * sizeof(Item) << ", its type is " << static_cast<int>(type.code) << "/"
      << static_cast<int>(type.bits);
  TVM_FFI_CHECK(tensor.IsContiguous(), ValueError) << what << " must be contiguous";
  TVM_FFI_CHECK(tensor.numel() >= room, ValueError) << what << " has " << tensor.numel() << " items, needs " << room;
  return reinterpret_cast<Item*>(static_cast<char*>(tensor.data_ptr()) + tensor.byte_offset());
}

inline void check_cuda(cudaError_t status, const char* what) {
  TVM_FFI_CHECK(status == cudaSuccess, RuntimeError) << what << ": " << cudaGetErrorString(status);
}

inline void check_launch(const char* kernel) {
  check_cuda(cudaGetLastError(), kernel);
}

}  // namespace vep
