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

// Plans copies ahead: `plan(team, layer, lane, ids, num_ids, work)` says how many of `work.loads` there are.
template <class Plan>
int64_t plan_ahead(const TensorView& state, const TensorView& row_words, const TensorView& predicted,
                   const TensorView& loads, Plan plan) {
  const Layer layer = layer_in(state);
  Workspace& work = Workspace::of_this_thread();
  work.fit(layer);
  SlotWords lane{cpu_data<int32_t>(row_words, layer.num_experts(), "row_words")};
  const auto plan_as = [&](auto id) {
    Alone team;
    const auto* ids = cpu_data<decltype(id)>(predicted, 0, "predicted");
    return plan(team, layer, lane, ids, static_cast<int>(predicted.numel()), work);
  };
  return write_loads(work, is_int64(predicted) ? plan_as(int64_t{}) : plan_as(int32_t{}), loads);
}

// Plans copies for all `predicted` (int32 or int64), in the order of their tokens; `loads` as above.
int64_t PlanPreload(TensorView state, TensorView row_words, TensorView predicted, TensorView loads) {
  return plan_ahead(state, row_words, predicted, loads,
                    [](auto& team, const Layer& layer, auto& lane, const auto* ids, int num_ids, Workspace& work) {
                      return plan_preload(team, layer, lane, ids, num_ids, work.scratch, work.loads);
                    });
}

// Plans copies for `predicted` (int32 or int64), most wanted first; `loads` as above.
int64_t PlanPrefetch(TensorView state, TensorView row_words, TensorView predicted, int64_t budget, bool is_far,
                     TensorView loads) {
  return plan_ahead(state, row_words, predicted, loads,
                    [&](auto& team, const Layer& layer, auto& lane, const auto* ids, int num_ids, Workspace& work) {
                      return plan_prefetch(team, layer, lane, ids, num_ids, static_cast<int>(budget), is_far,
                                           work.scratch, work.loads);
                    });
}

// Plans every step of a recording of one layer, without look-ahead. `ids`: int32 (N, K), the routed ids of all tokens,
// negative for none; `tokens`: int32 (S), how many of them each step has. `counts`: int32 (S, 5), receives what each
// step needs, misses, puts into overflow rows and evicts, and whether it is wide.
void PlanSteps(TensorView state, TensorView ids, TensorView tokens, TensorView counts) {
  const Layer layer = layer_in(state);
  Workspace& work = Workspace::of_this_thread();
  work.fit(layer);
  struct {  // what was on its way when the recording began has landed
    bool landed(int) const { return true; }
    bool drop(int) const { return false; }
  } lane;
  Alone team;
  const int64_t num_steps = tokens.numel(), num_tokens = ids.ndim() == 2 ? ids.size(0) : -1;
  TVM_FFI_CHECK(num_tokens >= 0, ValueError) << "ids must have two dimensions, has " << ids.ndim();
  const auto* routed = cpu_data<int32_t>(ids, 0, "ids");
  const auto* lengths = cpu_data<int32_t>(tokens, 0, "tokens");
  auto* out = cpu_data<int32_t>(counts, 5 * num_steps, "counts");
  int64_t begin = 0;
  for (int64_t step = 0; step < num_steps; ++step) {
    TVM_FFI_CHECK(lengths[step] >= 0 && lengths[step] <= num_tokens - begin, ValueError)
        << "step " << step << " has " << lengths[step] << " tokens, of " << num_tokens << " there are "
        << num_tokens - begin << " left";
    const int num_ids = static_cast<int>(lengths[step] * ids.size(1));
    const StepCounts found =
        plan_step(team, layer, lane, routed + begin * ids.size(1), num_ids, work.scratch, work.loads);
    count_step(layer, found);
    for (const int count : {found.num_needed, found.num_misses, found.num_overflow, found.num_evictions,
                            static_cast<int>(found.is_wide)}) {
      *out++ = count;
    }
    begin += lengths[step];
  }
}

}  // namespace
}  // namespace vep

TVM_FFI_DLL_EXPORT_TYPED_FUNC(word_names, vep::WordNames);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(planner_words, vep::Words);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(planner_init, vep::Init);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(planner_plan, vep::Plan);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(planner_plan_prefetch, vep::PlanPrefetch);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(planner_plan_preload, vep::PlanPreload);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(planner_plan_steps, vep::PlanSteps);
