// csrc/cuda as one library of the host's, and what a test asks of the shim itself.

#include "cuda_runtime.h"
// The sources, as they are.
#include "cuda/gather.cu"
#include "cuda/plan.cu"
#include "cuda/row_space.cu"

namespace vep {
namespace {

int64_t Submitted() {
  return ShimQueue::get().submitted();
}

void Wait(int64_t number) {
  ShimQueue::get().wait(number);
}

void Register(int64_t address, int64_t num_bytes) {
  shim_registered()[address] = address + num_bytes;
}

void Unregister(int64_t address) {
  shim_registered().erase(address);
}

// Since the last call.
tvm::ffi::Array<int64_t> Launches() {
  return {shim_launches[0].exchange(0), shim_launches[1].exchange(0)};
}

}  // namespace
}  // namespace vep

TVM_FFI_DLL_EXPORT_TYPED_FUNC(shim_submitted, vep::Submitted);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(shim_wait, vep::Wait);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(shim_register, vep::Register);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(shim_unregister, vep::Unregister);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(shim_launches, vep::Launches);
