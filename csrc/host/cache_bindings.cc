// One layer's cache for Python: plan a step, bring what it needs, and turn expert ids into rows, in one call.
// tvm_ffi releases the GIL around every call.

#include <tvm/ffi/memory.h>
#include <tvm/ffi/object.h>
#include <tvm/ffi/tvm_ffi.h>

#include <cstring>
#include <stdexcept>
#include <utility>
#include <vector>

#include "layer_state.h"
#include "staging_engine.h"
#include "tensors.h"

namespace vep {
namespace {

using tvm::ffi::Object;
using tvm::ffi::ObjectRef;
using tvm::ffi::TensorView;

template <class Call>
auto translated(Call call) {
  try {
    return call();
  } catch (const std::invalid_argument& error) {
    TVM_FFI_THROW(ValueError) << error.what();
  } catch (const std::runtime_error& error) {
    TVM_FFI_THROW(RuntimeError) << error.what();
  }
  TVM_FFI_UNREACHABLE();
}

class EngineObj : public Object {
 public:
  EngineObj(double gbps, double latency_us, int64_t chunk_bytes) : engine(gbps, latency_us, chunk_bytes) {}

  StagingEngine engine;

  static constexpr bool _type_mutable = true;
  TVM_FFI_DECLARE_OBJECT_INFO_FINAL("vep.StagingEngine", EngineObj, Object);
};

class EngineRef : public ObjectRef {
 public:
  EngineRef(double gbps, double latency_us, int64_t chunk_bytes)
      : ObjectRef(tvm::ffi::make_object<EngineObj>(gbps, latency_us, chunk_bytes)) {}
  TVM_FFI_DEFINE_OBJECT_REF_METHODS_NOTNULLABLE(EngineRef, ObjectRef, EngineObj);
};

// A layer of an engine with its planner. `state` and `mirror` are tensors of whoever made it.
class CacheObj : public Object {
 public:
  CacheObj(EngineRef engine, int32_t index, int64_t* state, int64_t* mirror)
      : owner(std::move(engine)), engine(owner->engine), index(index), layer(state), mirror(mirror) {}

  SlotWords lane() const { return {engine.row_words(index)}; }
  void show() const { std::memcpy(mirror, layer.header, sizeof(int64_t) * kHeaderWords); }

  const EngineRef owner;
  StagingEngine& engine;
  const int32_t index;
  const Layer layer;
  int64_t* const mirror;
  std::vector<Ghost> ghosts;

  static constexpr bool _type_mutable = true;
  TVM_FFI_DECLARE_OBJECT_INFO_FINAL("vep.Cache", CacheObj, Object);
};

class CacheRef : public ObjectRef {
 public:
  CacheRef(EngineRef engine, int32_t index, int64_t* state, int64_t* mirror)
      : ObjectRef(tvm::ffi::make_object<CacheObj>(std::move(engine), index, state, mirror)) {}
  TVM_FFI_DEFINE_OBJECT_REF_METHODS_NOTNULLABLE(CacheRef, ObjectRef, CacheObj);
};

EngineRef CreateEngine(double gbps, double latency_us, int64_t chunk_bytes) {
  return translated([&] { return EngineRef(gbps, latency_us, chunk_bytes); });
}

void CloseEngine(EngineRef ref) {
  ref->engine.close();
}

// `segments`: int64 (S, 4), each row [store address, store stride, address of the rows, row bytes]. `state`: as many
// int64 as planner_words says, `mirror`: kHeaderWords of them, which every call below writes. All memory must outlive
// the engine.
CacheRef Create(EngineRef ref, TensorView segments, int64_t num_experts, int64_t num_slots, int64_t top_k,
                int64_t policy, int64_t record_bytes, TensorView state, TensorView mirror) {
  const int64_t* words = cpu_data<int64_t>(segments, 0, "segments");
  TVM_FFI_CHECK(segments.ndim() == 2 && segments.size(1) == kSegmentWords, ValueError)
      << "segments must have shape (S, " << kSegmentWords << ")";
  std::vector<Segment> rows;
  for (int64_t i = 0; i < segments.size(0); ++i, words += kSegmentWords)
    rows.push_back({reinterpret_cast<const char*>(words[0]), words[1], reinterpret_cast<char*>(words[2]), words[3]});
  return translated([&] {
    const int64_t size = num_experts > 0 && num_slots > 0 ? Layer::words(num_experts, num_slots) : 0;
    auto* own = cpu_data<int64_t>(state, size, "state");
    init_layer(own, num_experts, num_slots, top_k, policy);
    const int32_t index = ref->engine.add_layer(std::move(rows), static_cast<int32_t>(num_experts), record_bytes);
    CacheRef cache(ref, index, own, cpu_data<int64_t>(mirror, kHeaderWords, "mirror"));
    cache->show();
    return cache;
  });
}

template <class Id>
void serve_as(CacheObj& cache, const TensorView& ids, int64_t num_real, const TensorView& rows, bool is_speculated) {
  cache.engine.check_usable();
  Workspace& work = Workspace::of_this_thread();
  const int num_ids = static_cast<int>(ids.numel());
  const Id* routed = cpu_data<Id>(ids, num_real, "ids");
  const StepCounts step = plan_on_host(cache.layer, cache.lane(), routed, num_ids, static_cast<int>(num_real),
                                       cpu_data<Id>(rows, num_ids, "rows"), is_speculated, work);
  const int num_late = step.num_late + step.num_awaited;
  if (step.num_misses + num_late > 0) {
    int32_t* late = work.scratch.late;  // experts, turned into their rows
    for (int i = 0; i < num_late; ++i) late[i] = row_after(cache.layer, work.scratch, late[i]);
    const DemandResult done = cache.engine.demand(cache.index, work.loads, step.num_misses, late, num_late);
    int64_t* header = cache.layer.header;
    header[kClaimed] += done.num_claimed;
    header[kDemanded] += done.num_claimed;
    header[kStallNs] += done.stall_ns;
    header[kLateNs] += done.late_ns;
  }
  const RealIds<Id> real{routed, std::min(num_ids, static_cast<int>(num_real))};
  for (const Ghost& ghost : cache.ghosts) ghost.serve(real, real.num_real, is_speculated, work);
  cache.show();
}

// Serves one step. `ids`: routed ids, int32 or int64, the first `num_real` of tokens and the others padding; `rows`: of
// the same type and length, written. Every record has landed on return.
void Serve(CacheRef cache, TensorView ids, int64_t num_real, TensorView rows, bool is_speculated) {
  translated([&] {
    is_int64(ids) ? serve_as<int64_t>(*cache.operator->(), ids, num_real, rows, is_speculated)
                  : serve_as<int32_t>(*cache.operator->(), ids, num_real, rows, is_speculated);
  });
}

template <class Id>
void prefetch_as(CacheObj& cache, const TensorView& predicted, int64_t budget, bool is_far) {
  cache.engine.check_usable();
  Workspace& work = Workspace::of_this_thread();
  work.fit(cache.layer);
  Alone team;
  SlotWords lane = cache.lane();
  if (is_far) budget -= cache.engine.num_queued();
  const int limit = static_cast<int>(std::clamp<int64_t>(budget, 0, cache.layer.num_slots()));
  const int num_loads = plan_prefetch(team, cache.layer, lane, cpu_data<Id>(predicted, 0, "predicted"),
                                      static_cast<int>(predicted.numel()), limit, is_far, work.scratch, work.loads);
  if (num_loads > 0) cache.engine.prefetch(cache.index, work.loads, num_loads);
  cache.show();
}

// Plans and queues copies of at most `budget` of the `predicted` experts (int32 or int64), most wanted first, behind
// what is queued already. `is_far`: as in residency.h, and what is queued already counts towards the budget.
void Prefetch(CacheRef cache, TensorView predicted, int64_t budget, bool is_far) {
  translated([&] {
    is_int64(predicted) ? prefetch_as<int64_t>(*cache.operator->(), predicted, budget, is_far)
                        : prefetch_as<int32_t>(*cache.operator->(), predicted, budget, is_far);
  });
}

template <class Id>
void preload_as(CacheObj& cache, const TensorView& predicted, int64_t budget) {
  cache.engine.check_usable();
  Workspace& work = Workspace::of_this_thread();
  work.fit(cache.layer);
  Alone team;
  SlotWords lane = cache.lane();
  const Layer& layer = cache.layer;
  const Id* ids = cpu_data<Id>(predicted, 0, "predicted");
  const int num_ids = static_cast<int>(predicted.numel());
  find_first(team, layer, ids, num_ids, false, work.scratch);
  int num_loads;
  if (count_needed(team, layer, work.scratch) > layer.num_slots()) {
    num_loads = plan_preload(team, layer, lane, ids, num_ids, work.scratch, work.loads);
  } else {
    const MostWantedFirst<Id> wanted{ids, static_cast<int>(predicted.size(1)), static_cast<int>(predicted.size(0))};
    const int limit = static_cast<int>(std::clamp<int64_t>(budget, 0, layer.num_slots()));
    num_loads = plan_prefetch(team, layer, lane, wanted, num_ids, limit, false, work.scratch, work.loads);
  }
  if (num_loads > 0) cache.engine.prefetch(cache.index, work.loads, num_loads);
  cache.show();
}

// Plans and queues copies of all `predicted` experts, (tokens, P) int32 or int64, behind what is queued already: into
// slots and overflow rows. The next step of this layer must come before its area is used otherwise. Where these are at
// most as many as slots, it is a prefetch of at most `budget`.
void Preload(CacheRef cache, TensorView predicted, int64_t budget) {
  TVM_FFI_CHECK(predicted.ndim() == 2, ValueError) << "predicted must have shape (tokens, P)";
  translated([&] {
    is_int64(predicted) ? preload_as<int64_t>(*cache.operator->(), predicted, budget)
                        : preload_as<int32_t>(*cache.operator->(), predicted, budget);
  });
}

// Records that wait for the lane, of all layers.
int64_t NumQueued(EngineRef ref) {
  return ref->engine.num_queued();
}

// From now on every step is also planned for larger caches. `states`: theirs, written by planner_init, one after
// another; `mirror`: (their number, kHeaderWords), written after each step. All int64; they must outlive the cache.
void AddGhosts(CacheRef cache, TensorView states, TensorView mirror) {
  auto* state = cpu_data<int64_t>(states, 0, "states");
  const int64_t* const end = state + states.numel();
  TVM_FFI_CHECK(mirror.ndim() == 2, ValueError) << "mirror must have shape (ghosts, words)";
  auto* words = cpu_data<int64_t>(mirror, mirror.size(0) * kHeaderWords, "mirror");
  std::vector<Ghost> ghosts;
  for (int64_t i = 0; i < mirror.size(0) && state < end; ++i, words += kHeaderWords) {
    ghosts.push_back({Layer(state), words});
    ghosts.back().show();
    state += Layer::words(state[kNumExperts], state[kNumSlots]);
  }
  TVM_FFI_CHECK(state == end && static_cast<int64_t>(ghosts.size()) == mirror.size(0), ValueError)
      << "states of " << states.numel() << " words are not those of " << mirror.size(0) << " caches";
  cache->ghosts = std::move(ghosts);
}

// Copies `expert` into `row`, which no step uses, over the link; uncounted. Returns the seconds it took.
double Copy(CacheRef cache, int64_t expert, int64_t row) {
  return translated([&] {
    const int32_t load[] = {static_cast<int32_t>(expert), static_cast<int32_t>(row)};
    return static_cast<double>(cache->engine.demand(cache->index, load, 1, nullptr, 0).stall_ns) * 1e-9;
  });
}

// Records that the lane has landed, of all layers.
int64_t NumLanded(EngineRef ref) {
  return ref->engine.num_landed();
}

}  // namespace
}  // namespace vep

TVM_FFI_DLL_EXPORT_TYPED_FUNC(engine_create, vep::CreateEngine);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(engine_close, vep::CloseEngine);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(engine_num_queued, vep::NumQueued);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(engine_num_landed, vep::NumLanded);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(cache_create, vep::Create);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(cache_serve, vep::Serve);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(cache_prefetch, vep::Prefetch);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(cache_preload, vep::Preload);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(cache_add_ghosts, vep::AddGhosts);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(cache_copy, vep::Copy);
