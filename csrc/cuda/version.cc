#include "version.h"

#include <cuda_runtime_api.h>

namespace vep {

/// The targets compiled in, as setup.py names them, such as "80 90 120".
tvm::ffi::String Architectures() {
  return VEP_CUDA_ARCHS;
}

/// The CUDA runtime inside this library, as CUDART_VERSION (13000 is 13.0).
int64_t RuntimeVersion() {
  return CUDART_VERSION;
}

/// The newest CUDA that the installed driver supports, in the same form; 0 without a driver. Starts no context.
int64_t DriverVersion() {
  int version = 0;
  return cudaDriverGetVersion(&version) == cudaSuccess ? version : 0;
}

}  // namespace vep

TVM_FFI_DLL_EXPORT_TYPED_FUNC(version, vep::Version);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(source_digest, vep::SourceDigest);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(tvm_ffi_version, vep::TvmFfiVersion);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(architectures, vep::Architectures);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(runtime_version, vep::RuntimeVersion);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(driver_version, vep::DriverVersion);
