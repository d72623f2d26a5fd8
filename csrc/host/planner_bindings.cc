// The planner for Python. A layer's state is one int64 tensor that Python owns; see residency.h for its words.

#include <tvm/ffi/tvm_ffi.h>

#include <algorithm>
#include <stdexcept>

#include "../slot_state.h"
#include "plan_workspace.h"

namespace vep {
namespace {

using tvm::ffi::TensorView;

// Prefetches whose progress stands in one word per slot, as slot_state.h has it.
class SlotWords final : public CopyLane {
 public:
  SlotWords(const TensorView& words, const Layer& layer)
      : words_(cpu_data<int32_t>(words, layer.num_slots(), "slot_words")) {}
  bool landed(int slot) override { return is_ready(&words_[slot]); }
  bool drop(int slot) override { return vep::drop(&words_[slot]); }

 private:
  int32_t* words_;
};

int64_t Words(int64_t num_experts, int64_t num_slots) { return Layer::words(num_experts, num_slots); }

void Init(TensorView state, int64_t num_experts, int64_t num_slots, int64_t top_k, int64_t policy,
          int64_t max_token_waves, bool has_stream) {
  try {
    const int64_t words = num_experts > 0 && num_slots > 0 ? Layer::words(num_experts, num_slots) : 0;
    init_layer(cpu_data<int64_t>(state, words, "state"), num_experts, num_slots, top_k, policy, max_token_waves,
               has_stream);
  } catch (const std::invalid_argument& error) {
    TVM_FFI_THROW(ValueError) << error.what();
  }
}

void Fill(TensorView state) {
  try {
    fill_layer(layer_in(state));
  } catch (const std::invalid_argument& error) {
    TVM_FFI_THROW(ValueError) << error.what();
  }
}

template <class Id>
int64_t plan_as(const Layer& layer, CopyLane& lane, const TensorView& ids, int64_t num_ids,
                const TensorView& slot_ids) {
  const Id* routed = cpu_data<Id>(ids, num_ids, "ids");
  Id* slots = cpu_data<Id>(slot_ids, num_ids, "slot_ids");
  const Split split = plan_step(layer, lane, routed, static_cast<int>(num_ids), slots, last_workspace());
  std::fill(slots + num_ids, slots + slot_ids.numel(), Id{0});  // padding: any valid slot
  return split;
}

int64_t Plan(TensorView state, TensorView slot_words, TensorView ids, int64_t num_ids, TensorView slot_ids) {
  const Layer layer = layer_in(state);
  SlotWords lane(slot_words, layer);
  return is_int64(ids) ? plan_as<int64_t>(layer, lane, ids, num_ids, slot_ids)
                       : plan_as<int32_t>(layer, lane, ids, num_ids, slot_ids);
}

int64_t PlanPrefetch(TensorView state, TensorView slot_words, TensorView predicted, int64_t budget) {
  const Layer layer = layer_in(state);
  SlotWords lane(slot_words, layer);
  const int num_predicted = static_cast<int>(predicted.numel());
  const int limit = static_cast<int>(std::min<int64_t>(budget, layer.num_slots()));
  if (is_int64(predicted)) {
    const auto* ids = cpu_data<int64_t>(predicted, 0, "predicted");
    return plan_prefetch_step(layer, lane, ids, num_predicted, limit, last_workspace());
  }
  const auto* ids = cpu_data<int32_t>(predicted, 0, "predicted");
  return plan_prefetch_step(layer, lane, ids, num_predicted, limit, last_workspace());
}

// The words of the plan that this thread made last; `words` (as many as there is room for) receives them.
int64_t LastPlan(TensorView words) {
  auto* out = cpu_data<int32_t>(words, 0, "words");
  const int64_t size = static_cast<int64_t>(last_workspace().plan.size());
  std::copy_n(last_workspace().plan.data(), std::min(size, words.numel()), out);
  return size;
}

}  // namespace
}  // namespace vep

TVM_FFI_DLL_EXPORT_TYPED_FUNC(planner_words, vep::Words);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(planner_init, vep::Init);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(planner_fill, vep::Fill);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(planner_plan, vep::Plan);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(planner_plan_prefetch, vep::PlanPrefetch);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(planner_last_plan, vep::LastPlan);
