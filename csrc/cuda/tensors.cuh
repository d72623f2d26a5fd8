// Tensors that come in through DLPack, and what CUDA answers, checked; kernels launched.
#pragma once

#include <cuda_runtime.h>
#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/error.h>

#include <cstdint>

#ifdef __CUDACC__
#define VEP_DEVICE_TYPE kDLCUDA
#endif  // else tests/device/shim: the GPU's tensors are the host's

namespace vep {

// The data of a contiguous CUDA tensor of at least `room` `Item`s; an error names `what`.
template <class Item>
Item* cuda_data(const tvm::ffi::TensorView& tensor, int64_t room, const char* what) {
  const DLDataType type = tensor.dtype();
  TVM_FFI_CHECK(tensor.device().device_type == VEP_DEVICE_TYPE, ValueError) << what << " must lie on a GPU";
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

#ifdef __CUDACC__
// `stream`: a cudaStream_t as an integer.
template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), int blocks, int threads, int64_t shared_bytes, int64_t stream,
            Arguments... arguments) {
  kernel<<<blocks, threads, static_cast<size_t>(shared_bytes), reinterpret_cast<cudaStream_t>(stream)>>>(arguments...);
}
#endif

}  // namespace vep
