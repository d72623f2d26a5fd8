// One call per MoE layer and step: plan it, bring what it needs, and turn expert ids into slot ids.

#include <tvm/ffi/tvm_ffi.h>

#include <algorithm>
#include <stdexcept>

#include "../slot_state.h"
#include "plan_workspace.h"
#include "planner.h"
#include "staging_object.h"
#include "tensors.h"

namespace vep {
namespace {

using tvm::ffi::TensorView;

// What a call reports, int64 words: the head of the plan, then these.
enum ReportWord : int { kReportCancelled = kPlanHeadWords, kReportBytes, kReportNanos, kReportLateNanos, kReportWords };

class EngineLane final : public CopyLane {
 public:
  EngineLane(StagingEngine& engine, int32_t index) : words_(engine.slot_words(index)) {}
  bool landed(int slot) override { return is_ready(&words_[slot]); }
  bool drop(int slot) override { return vep::drop(&words_[slot]); }

 private:
  int32_t* words_;
};

struct Target {
  Target(StagingEngineRef ref, int64_t index, const TensorView& state)
      : engine(ref->engine), layer_index(static_cast<int32_t>(index)), layer(layer_in(state)) {
    TVM_FFI_CHECK(engine.num_slots(layer_index) == layer.num_slots(), ValueError)
        << "the planner has " << layer.num_slots() << " slots, layer " << index << " of the staging engine has "
        << engine.num_slots(layer_index);
  }
  StagingEngine& engine;
  int32_t layer_index;
  Layer layer;
};

void report(int64_t* out, const DemandResult& demand) {
  std::copy_n(last_workspace().plan.data(), kPlanHeadWords, out);
  out[kReportBytes] = demand.bytes;
  out[kReportNanos] = static_cast<int64_t>(demand.seconds * 1e9);
  out[kReportLateNanos] = static_cast<int64_t>(demand.late_wait_seconds * 1e9);
}

// The slots of the experts that the plan calls late, written over them.
const int32_t* late_slots(const Layer& layer, int32_t* late, int num_late) {
  for (int i = 0; i < num_late; ++i) late[i] = static_cast<int32_t>(layer.slot_of()[late[i]]);
  return late;
}

template <class Id>
int64_t step_as(const Target& target, const TensorView& ids, int64_t num_ids, const TensorView& slot_ids,
                int64_t* out) {
  Workspace& work = last_workspace();
  EngineLane lane(target.engine, target.layer_index);
  const Id* routed = cpu_data<Id>(ids, num_ids, "ids");
  Id* slots = cpu_data<Id>(slot_ids, num_ids, "slot_ids");
  const int64_t cancelled = target.layer.header[kCancelled];
  DemandResult waited, demand;
  Split split = kMustSettle;
  while (true) {
    split = plan_step(target.layer, lane, routed, static_cast<int>(num_ids), slots, work);
    if (split != kMustSettle) break;
    waited = target.engine.wait_all(target.layer_index);  // for what it waits, nothing is left to settle after it
  }
  const int32_t* head = work.plan.data();
  if (split == kSplitNone) {
    std::fill(slots + num_ids, slots + slot_ids.numel(), Id{0});  // padding: any valid slot
    if (head[kPlanMisses] + head[kPlanLate] > 0) {
      const int32_t* late = late_slots(target.layer, work.lists.late, head[kPlanLate]);
      demand = target.engine.demand(target.layer_index, work.lists.loads, head[kPlanMisses], late, head[kPlanLate]);
    }
  }
  demand.bytes += waited.bytes;
  demand.seconds += waited.seconds;
  demand.late_wait_seconds += waited.late_wait_seconds;
  report(out, demand);
  out[kReportCancelled] = target.layer.header[kCancelled] - cancelled;
  return split;
}

// `ids`: routed ids, the first `num_ids` of real tokens; `slot_ids`: as long, written for a narrow step, when all its
// records have landed on return. `out`: int64 (kReportWords), written. Returns the Split: a wide step is left to the
// caller, who finds its waves with planner_last_plan.
int64_t Step(StagingEngineRef engine, int64_t layer, TensorView state, TensorView ids, int64_t num_ids,
             TensorView slot_ids, TensorView out) {
  const Target target(engine, layer, state);
  int64_t* words = cpu_data<int64_t>(out, kReportWords, "out");
  try {
    return is_int64(ids) ? step_as<int64_t>(target, ids, num_ids, slot_ids, words)
                         : step_as<int32_t>(target, ids, num_ids, slot_ids, words);
  } catch (const std::invalid_argument& error) {
    TVM_FFI_THROW(ValueError) << error.what();
  } catch (const std::runtime_error& error) {
    TVM_FFI_THROW(RuntimeError) << error.what();
  }
  TVM_FFI_UNREACHABLE();
}

template <class Id>
int64_t prefetch_as(const Target& target, const TensorView& predicted, int budget) {
  Workspace& work = last_workspace();
  EngineLane lane(target.engine, target.layer_index);
  const int num_loads = plan_prefetch_step(target.layer, lane, cpu_data<Id>(predicted, 0, "predicted"),
                                           static_cast<int>(predicted.numel()), budget, work);
  if (num_loads > 0) target.engine.prefetch(target.layer_index, work.lists.loads, num_loads);
  const int64_t num_evictions = work.plan[1], num_unused = work.plan[2];
  return num_loads | num_evictions << 16 | num_unused << 32;
}

// Plans and queues copies of at most `budget` of the `predicted` experts, most wanted first. Returns, 16 bits each from
// the lowest: how many copies, how many evictions, how many of these evicted a prefetch that no step had needed.
int64_t Prefetch(StagingEngineRef engine, int64_t layer, TensorView state, TensorView predicted, int64_t budget) {
  const Target target(engine, layer, state);
  const int limit = static_cast<int>(std::clamp<int64_t>(budget, 0, target.layer.num_slots()));
  try {
    return is_int64(predicted) ? prefetch_as<int64_t>(target, predicted, limit)
                               : prefetch_as<int32_t>(target, predicted, limit);
  } catch (const std::invalid_argument& error) {
    TVM_FFI_THROW(ValueError) << error.what();
  } catch (const std::runtime_error& error) {
    TVM_FFI_THROW(RuntimeError) << error.what();
  }
  TVM_FFI_UNREACHABLE();
}

}  // namespace
}  // namespace vep

TVM_FFI_DLL_EXPORT_TYPED_FUNC(serve_step, vep::Step);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(serve_prefetch, vep::Prefetch);
