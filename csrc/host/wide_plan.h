// Steps that need more experts than there are slots.
#pragma once

#include "planner.h"

namespace vep {

// Plans a step that `plan_narrow` found too wide: streamed, by tokens or by experts, as the specification does. Leaves
// the plan in `work.plan`. Needs `work.scratch.first` of this step. Returns kMustSettle when prefetches are in flight
// and the step has to run in waves.
template <class Id>
Split plan_wide(const Layer& layer, const Id* ids, int num_ids, Workspace& work);

}  // namespace vep
