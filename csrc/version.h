// What a built library tells about itself. setup.py defines the VEP_* macros, native/library.py compares them.
#pragma once

#include <tvm/ffi/tvm_ffi.h>

#if !defined(VEP_VERSION) || !defined(VEP_SOURCE_DIGEST)
#error "build with setup.py, which defines VEP_VERSION and VEP_SOURCE_DIGEST (docs/building.md)"
#endif

namespace vep {

/// The package's version at build time.
inline tvm::ffi::String Version() {
  return VEP_VERSION;
}

/// The digest of this library's sources, made by native/sources.py.
inline tvm::ffi::String SourceDigest() {
  return VEP_SOURCE_DIGEST;
}

/// The version of the apache-tvm-ffi headers, as major * 10000 + minor * 100 + patch.
inline int64_t TvmFfiVersion() {
  return TVM_FFI_VERSION_MAJOR * 10000 + TVM_FFI_VERSION_MINOR * 100 + TVM_FFI_VERSION_PATCH;
}

}  // namespace vep
