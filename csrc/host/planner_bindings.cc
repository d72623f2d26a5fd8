// The planner alone, for Python: for tests and measurements. A layer's state is one int64 tensor; see residency.h.

#include <tvm/ffi/tvm_ffi.h>

#include <stdexcept>

#include "layer_state.h"
#include "tensors.h"

namespace vep {
namespace {

using tvm::ffi::Optional;
using tvm::ffi::String;
using tvm::ffi::TensorView;

String WordNames() {
  return kWordNames;
}

int64_t Words(int64_t num_experts, int64_t num_slots) {
  return Layer::words(num_experts, num_slots);
}

void Init(TensorView state, int64_t num_experts, int64_t num_slots, int64_t top_k, int64_t policy) {
  try {
    const int64_t words = num_experts > 0 && num_slots > 0 ? Layer::words(num_experts, num_slots) : 0;
    init_layer(cpu_data<int64_t>(state, words, "state"), num_experts, num_slots, top_k, policy);
  } catch (const std::invalid_argument& error) {
    TVM_FFI_THROW(ValueError) << error.what();
  }
}

// The layer in a tensor that planner_init has written.
Layer layer_in(const TensorView& state) {
  const Layer layer(cpu_data<int64_t>(state, kHeaderWords, "state"));
  const int64_t words = Layer::words(layer.experts, layer.slots);
  TVM_FFI_CHECK(layer.experts > 0 && state.numel() == words, ValueError)
      << "state has " << state.numel() << " words, a layer of " << layer.experts << " experts and " << layer.slots
      << " slots has " << words << " (was it made by planner_init?)";
  return layer;
}

int64_t write_loads(const Workspace& work, int64_t num_loads, const TensorView& loads) {
  auto* out = cpu_data<int32_t>(loads, 2 * num_loads, "loads");
  std::copy_n(work.loads, 2 * num_loads, out);
  return num_loads;
}

// `ids`: int32 or int64, of which the first `num_real` are those of tokens; `rows`: of the same type and length,
// written. `row_words`: int32, one per row, as slot_state.h has them. `loads`: int32 (n, 2), receives (expert, row)
// of what is to be copied, if it is given. Returns how many these are.
int64_t Plan(TensorView state, TensorView row_words, TensorView ids, int64_t num_real, TensorView rows,
             Optional<TensorView> loads) {
  const Layer layer = layer_in(state);
  Workspace& work = Workspace::of_this_thread();
  const SlotWords lane{cpu_data<int32_t>(row_words, layer.num_experts(), "row_words")};
  const auto plan_as = [&](auto id) {
    using Id = decltype(id);
    const Id* routed = cpu_data<Id>(ids, num_real, "ids");
    Id* out = cpu_data<Id>(rows, ids.numel(), "rows");
    return plan_on_host(layer, lane, routed, static_cast<int>(ids.numel()), static_cast<int>(num_real), out, false,
                        work);
  };
  const StepCounts step = is_int64(ids) ? plan_as(int64_t{}) : plan_as(int32_t{});
  return loads ? write_loads(work, step.num_misses, *loads) : step.num_misses;
}

// Plans copies for all `predicted` (int32 or int64), in the order of their tokens; `loads` as above.
int64_t PlanPreload(TensorView state, TensorView row_words, TensorView predicted, TensorView loads) {
  const Layer layer = layer_in(state);
  Workspace& work = Workspace::of_this_thread();
  work.fit(layer);
  SlotWords lane{cpu_data<int32_t>(row_words, layer.num_experts(), "row_words")};
  const auto plan_as = [&](auto id) {
    Alone team;
    return plan_preload(team, layer, lane, cpu_data<decltype(id)>(predicted, 0, "predicted"),
                        static_cast<int>(predicted.numel()), work.scratch, work.loads);
  };
  return write_loads(work, is_int64(predicted) ? plan_as(int64_t{}) : plan_as(int32_t{}), loads);
}

// Plans copies for `predicted` (int32 or int64), most wanted first; `loads` as above.
int64_t PlanPrefetch(TensorView state, TensorView row_words, TensorView predicted, int64_t budget, bool is_far,
                     TensorView loads) {
  const Layer layer = layer_in(state);
  Workspace& work = Workspace::of_this_thread();
  work.fit(layer);
  SlotWords lane{cpu_data<int32_t>(row_words, layer.num_experts(), "row_words")};
  const auto plan_as = [&](auto id) {
    Alone team;
    return plan_prefetch(team, layer, lane, cpu_data<decltype(id)>(predicted, 0, "predicted"),
                         static_cast<int>(predicted.numel()), static_cast<int>(budget), is_far, work.scratch,
                         work.loads);
  };
  return write_loads(work, is_int64(predicted) ? plan_as(int64_t{}) : plan_as(int32_t{}), loads);
}

}  // namespace
}  // namespace vep

TVM_FFI_DLL_EXPORT_TYPED_FUNC(word_names, vep::WordNames);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(planner_words, vep::Words);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(planner_init, vep::Init);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(planner_plan, vep::Plan);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(planner_plan_prefetch, vep::PlanPrefetch);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(planner_plan_preload, vep::PlanPreload);
