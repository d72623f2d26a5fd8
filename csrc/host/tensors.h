// Tensors that come in through DLPack, checked.
#pragma once

#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/error.h>

#include <cstdint>
#include <type_traits>

namespace vep {

// The data of a contiguous CPU tensor of `Item`s with at least `room` of them; an error names `what` and the numbers.
template <class Item>
Item* cpu_data(const tvm::ffi::TensorView& tensor, int64_t room, const char* what) {
  constexpr bool kIsFloat = std::is_floating_point_v<Item>;
  const DLDataType type = tensor.dtype();
  TVM_FFI_CHECK(tensor.device().device_type == kDLCPU, ValueError) << what << " must lie on the CPU";
  TVM_FFI_CHECK(type.code == (kIsFloat ? kDLFloat : kDLInt) && type.bits == 8 * sizeof(Item) && type.lanes == 1,
                TypeError)
      << what << " must be " << (kIsFloat ? "float" : "int") << 8 * sizeof(Item) << ", its type is "
      << static_cast<int>(type.code) << "/" << static_cast<int>(type.bits);
  TVM_FFI_CHECK(tensor.IsContiguous(), ValueError) << what << " must be contiguous";
  TVM_FFI_CHECK(tensor.numel() >= room, ValueError) << what << " has " << tensor.numel() << " items, needs " << room;
  return static_cast<Item*>(tensor.data_ptr());
}

inline bool is_int64(const tvm::ffi::TensorView& tensor) {
  return tensor.dtype().bits == 64;
}

}  // namespace vep
