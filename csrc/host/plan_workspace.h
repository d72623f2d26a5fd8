// What the bindings of the planner share: this thread's workspace, and the state tensor that Python owns.
#pragma once

#include "planner.h"
#include "tensors.h"

namespace vep {

// The workspace of the calling thread; its plan stays until the thread plans again.
inline Workspace& last_workspace() {
  thread_local Workspace workspace;
  return workspace;
}

// The layer in a tensor that planner_init has written.
inline Layer layer_in(const tvm::ffi::TensorView& state) {
  const Layer layer{cpu_data<int64_t>(state, kHeaderWords, "state")};
  const int64_t words = Layer::words(layer.header[kNumExperts], layer.header[kNumSlots]);
  TVM_FFI_CHECK(layer.header[kNumExperts] > 0 && state.numel() == words, ValueError)
      << "state has " << state.numel() << " words, a layer of " << layer.header[kNumExperts] << " experts and "
      << layer.header[kNumSlots] << " slots has " << words << " (was it made by planner_init?)";
  return layer;
}

}  // namespace vep
