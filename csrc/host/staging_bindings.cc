// The staging engine for Python. tvm_ffi releases the GIL around every call.

#include <tvm/ffi/container/array.h>
#include <tvm/ffi/container/map.h>
#include <tvm/ffi/tvm_ffi.h>

#include <stdexcept>
#include <system_error>
#include <utility>
#include <vector>

#include "staging_object.h"
#include "tensors.h"

namespace vep {
namespace {

using tvm::ffi::Any;
using tvm::ffi::Array;
using tvm::ffi::Map;
using tvm::ffi::String;
using tvm::ffi::Tensor;
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

// int32 (n, 2), or (0,) for none.
struct Loads {
  explicit Loads(const TensorView& tensor) : data(cpu_data<int32_t>(tensor, 0, "loads")), size(tensor.numel() / 2) {
    TVM_FFI_CHECK(tensor.numel() == 0 || (tensor.ndim() == 2 && tensor.size(1) == 2), ValueError)
        << "loads must have shape (n, 2), they have " << tensor.numel() << " items in " << tensor.ndim()
        << " dimensions";
  }
  const int32_t* data;
  int64_t size;
};

int32_t narrow(int64_t value, const char* what) {
  TVM_FFI_CHECK(value >= 0 && value <= INT32_MAX, ValueError) << what << " " << value << " is not in 0.." << INT32_MAX;
  return static_cast<int32_t>(value);
}

StagingEngineRef Create(double gbps, double latency_us, int64_t chunk_bytes) {
  return translated([&] { return StagingEngineRef(gbps, latency_us, chunk_bytes); });
}

void Close(StagingEngineRef ref) { ref->engine.close(); }

// `segments`: int64 (S, 5), each row [store address, store stride, pool address, pool stride, row bytes].
int64_t AddLayer(StagingEngineRef ref, TensorView segments, int64_t num_experts, int64_t num_slots,
                 int64_t record_bytes) {
  const int64_t* words = cpu_data<int64_t>(segments, 0, "segments");
  TVM_FFI_CHECK(segments.ndim() == 2 && segments.size(1) == 5, ValueError) << "segments must have shape (S, 5)";
  std::vector<Segment> rows;
  for (int64_t i = 0; i < segments.size(0); ++i, words += 5)
    rows.push_back({reinterpret_cast<const char*>(words[0]), words[1], reinterpret_cast<char*>(words[2]), words[3],
                    words[4]});
  return translated([&] {
    return ref->engine.add_layer(std::move(rows), narrow(num_experts, "num_experts"), narrow(num_slots, "num_slots"),
                                 record_bytes);
  });
}

int64_t Demand(StagingEngineRef ref, int64_t layer, TensorView loads, TensorView late_slots) {
  const Loads wanted(loads);
  const int32_t* late = cpu_data<int32_t>(late_slots, 0, "late_slots");
  return translated([&] {
    return ref->engine.demand(narrow(layer, "layer"), wanted.data, wanted.size, late, late_slots.numel()).bytes;
  });
}

void Prefetch(StagingEngineRef ref, int64_t layer, TensorView loads) {
  const Loads wanted(loads);
  translated([&] { ref->engine.prefetch(narrow(layer, "layer"), wanted.data, wanted.size); });
}

void Fill(StagingEngineRef ref, int64_t layer, TensorView loads) {
  const Loads wanted(loads);
  translated([&] { ref->engine.fill(narrow(layer, "layer"), wanted.data, wanted.size); });
}

// `dropped`: int8, one per slot, written.
void Cancel(StagingEngineRef ref, int64_t layer, TensorView slots, TensorView dropped) {
  const int32_t* wanted = cpu_data<int32_t>(slots, 0, "slots");
  auto* out = reinterpret_cast<uint8_t*>(cpu_data<int8_t>(dropped, slots.numel(), "dropped"));
  translated([&] { ref->engine.cancel(narrow(layer, "layer"), wanted, slots.numel(), out); });
}

int64_t WaitAll(StagingEngineRef ref, int64_t layer) {
  return translated([&] { return ref->engine.wait_all(narrow(layer, "layer")).bytes; });
}

int64_t State(StagingEngineRef ref, int64_t layer, int64_t slot) {
  return translated(
      [&] { return static_cast<int64_t>(ref->engine.state(narrow(layer, "layer"), narrow(slot, "slot"))); });
}

// The memory of a layer's slot words; the engine stays as long as a tensor over them does.
struct SlotWords {
  StagingEngineRef owner;
  int32_t* words;
  void AllocData(DLTensor* tensor) { tensor->data = words; }
  void FreeData(DLTensor*) {}
};

Tensor SlotWordsOf(StagingEngineRef ref, int64_t layer) {
  return translated([&] {
    const auto index = narrow(layer, "layer");
    const int64_t num_slots = ref->engine.num_slots(index);
    return Tensor::FromNDAlloc(SlotWords{ref, ref->engine.slot_words(index)}, {num_slots}, DLDataType{kDLInt, 32, 1},
                               DLDevice{kDLCPU, 0});
  });
}

// [bytes, seconds, seconds of waiting for the lane] of a layer's demands since `staging_reset_totals`.
Array<Any> Totals(StagingEngineRef ref, int64_t layer) {
  return translated([&] {
    const DemandResult totals = ref->engine.totals(narrow(layer, "layer"));
    return Array<Any>{totals.bytes, totals.seconds, totals.late_wait_seconds};
  });
}

void ResetTotals(StagingEngineRef ref, int64_t layer) {
  translated([&] { ref->engine.reset_totals(narrow(layer, "layer")); });
}

Map<String, Any> Counters(StagingEngineRef ref) {
  const StagingCounters counters = ref->engine.counters();
  return {
      {"demand_bytes", counters.demand_bytes},
      {"demand_records", counters.demand_records},
      {"claimed_records", counters.claimed_records},
      {"awaited_records", counters.awaited_records},
      {"prefetch_bytes", counters.prefetch_bytes},
      {"prefetch_records", counters.prefetch_records},
      {"cancelled_records", counters.cancelled_records},
      {"yields", counters.yields},
      {"stall_seconds", counters.stall_seconds},
      {"late_wait_seconds", counters.late_wait_seconds},
      {"lane_busy_seconds", counters.lane_busy_seconds},
  };
}

}  // namespace
}  // namespace vep

TVM_FFI_DLL_EXPORT_TYPED_FUNC(staging_create, vep::Create);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(staging_close, vep::Close);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(staging_add_layer, vep::AddLayer);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(staging_demand, vep::Demand);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(staging_prefetch, vep::Prefetch);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(staging_fill, vep::Fill);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(staging_cancel, vep::Cancel);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(staging_wait_all, vep::WaitAll);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(staging_state, vep::State);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(staging_slot_words, vep::SlotWordsOf);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(staging_totals, vep::Totals);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(staging_reset_totals, vep::ResetTotals);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(staging_counters, vep::Counters);
