#include "version.h"

TVM_FFI_DLL_EXPORT_TYPED_FUNC(version, vep::Version);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(source_digest, vep::SourceDigest);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(tvm_ffi_version, vep::TvmFfiVersion);
