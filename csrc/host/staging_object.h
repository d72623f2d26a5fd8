// The staging engine as an object that Python, and other bindings of this library, hold by reference.
#pragma once

#include <tvm/ffi/memory.h>
#include <tvm/ffi/object.h>

#include "staging_engine.h"

namespace vep {

class StagingEngineObj : public tvm::ffi::Object {
 public:
  StagingEngineObj(double gbps, double latency_us, int64_t chunk_bytes) : engine(gbps, latency_us, chunk_bytes) {}

  StagingEngine engine;

  static constexpr bool _type_mutable = true;
  TVM_FFI_DECLARE_OBJECT_INFO_FINAL("vep.StagingEngine", StagingEngineObj, tvm::ffi::Object);
};

class StagingEngineRef : public tvm::ffi::ObjectRef {
 public:
  StagingEngineRef(double gbps, double latency_us, int64_t chunk_bytes)
      : ObjectRef(tvm::ffi::make_object<StagingEngineObj>(gbps, latency_us, chunk_bytes)) {}
  TVM_FFI_DEFINE_OBJECT_REF_METHODS_NOTNULLABLE(StagingEngineRef, tvm::ffi::ObjectRef, StagingEngineObj);
};

}  // namespace vep
