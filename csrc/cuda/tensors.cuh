// Device tensors that come in through DLPack, checked.
#pragma once

#include <cuda_runtime.h>
#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/error.h>

#include <cstdint>

namespace vep {

// The data of a contiguous CUDA tensor of `Item`s; an error names `what`.
template <class Item>
Item* cuda_data(const tvm::ffi::TensorView& tensor, const char* what) {
  const DLDataType type = tensor.dtype();
  TVM_FFI_CHECK(tensor.device().device_type == kDLCUDA, ValueError) << what << " must lie on a GPU";
  TVM_FFI_CHECK(type.code == kDLInt && type.bits == 8 * sizeof(Item) && type.lanes == 1, TypeError)
      << what << " must be int" << 8 * sizeof(Item) << ", its type is " << static_cast<int>(type.code) << "/"
      << static_cast<int>(type.bits);
  TVM_FFI_CHECK(tensor.IsContiguous(), ValueError) << what << " must be contiguous";
  return reinterpret_cast<Item*>(static_cast<char*>(tensor.data_ptr()) + tensor.byte_offset());
}

inline void check_launch(const char* kernel) {
  const cudaError_t status = cudaGetLastError();
  TVM_FFI_CHECK(status == cudaSuccess, RuntimeError) << kernel << ": " << cudaGetErrorString(status);
}

}  // namespace vep
