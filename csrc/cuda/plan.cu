// The planner on the GPU: one block per plan, a layer's state in device memory, nothing decided on the host.
//
// A plan is bookkeeping as if its copies had landed. Three things make that true before the layer's kernel runs: the
// gather kernel, next on the same stream, copies `loads`; it waits for `late`; and slots of prefetches that have not
// landed are never given away.

#include <cuda_runtime.h>
#include <tvm/ffi/tvm_ffi.h>

#include <algorithm>
#include <cstdint>

#include "../residency.h"
#include "../slot_state.h"
#include "tensors.cuh"

namespace vep {
namespace {

using tvm::ffi::TensorView;

constexpr int kPlanThreads = 256;
constexpr int kWarp = 32;
constexpr int kMaxExperts = 1024;  // what fits 48 KB of shared memory

// The lanes are the threads of a block.
class Block {
 public:
  __device__ explicit Block(int64_t* sums) : sums_(sums) {}
  __device__ int rank() const { return static_cast<int>(threadIdx.x); }
  __device__ int size() const { return kPlanThreads; }
  __device__ void sync() const { __syncthreads(); }
  __device__ int64_t sum(int64_t value, int64_t* total) const {
    const int lane = rank() % kWarp, warp = rank() / kWarp;
    int64_t inclusive = value;
    for (int distance = 1; distance < kWarp; distance *= 2) {
      const int64_t other = __shfl_up_sync(~0u, inclusive, distance);
      if (lane >= distance) inclusive += other;
    }
    __syncthreads();
    if (lane == kWarp - 1) sums_[warp] = inclusive;
    __syncthreads();
    int64_t before = 0, all = 0;
    for (int i = 0; i < kPlanThreads / kWarp; ++i) {
      before += i < warp ? sums_[i] : 0;
      all += sums_[i];
    }
    *total = all;
    return before + inclusive - value;
  }

 private:
  int64_t* sums_;  // shared, one per warp
};

// Routed ids, `per_token` of each token; those of padding tokens count as -1. `real` is negative for padding: vLLM's slot
// mapping, which is on the device, also while a graph with more tokens than requests is replayed.
template <class Id>
struct TokenIds {
  const Id* ids;
  const int64_t* real;  // (tokens)
  int per_token;
  __device__ Id operator[](int i) const { return real[i / per_token] < 0 ? Id{-1} : ids[i]; }
};

// Predicted ids, laid out in the same way and read column by column: what each token wants most comes before what any
// of them wants less.
template <class Id>
struct PredictedIds {
  const Id* ids;
  const int64_t* real;
  int per_token;
  int num_tokens;
  __device__ Id operator[](int i) const {
    const int token = i % num_tokens;
    return real[token] < 0 ? Id{-1} : ids[token * per_token + i / num_tokens];
  }
};

struct SlotWords {
  int32_t* words;
  __device__ bool landed(int slot) const { return is_ready(&words[slot]); }
  __device__ bool drop(int slot) const { return vep::drop(&words[slot]); }
};

// What a plan leaves for the kernels that copy.
struct Orders {
  int32_t* loads;      // pairs (expert, slot)
  int32_t* num_loads;  // (1)
  int32_t* extra;      // demand: late slots to wait for; prefetch: the tickets of `loads`
  int32_t* num_extra;  // (1), demand only
};

// Shared memory, in the order in which it is laid out.
struct Room {
  Scratch scratch;
  WaveLists lists;

  __device__ static Room of(void* memory, const Layer& layer, int32_t* loads) {
    const int num_experts = layer.num_experts(), num_slots = layer.num_slots();
    auto* list = reinterpret_cast<int32_t*>(static_cast<char*>(memory) + Scratch::bytes(num_experts, num_slots));
    return {Scratch::at(memory, num_experts, num_slots),
            {list, loads, list + num_experts, list + 2 * num_experts}};
  }
};

int64_t shared_bytes(int64_t num_experts, int64_t num_slots) {
  return Scratch::bytes(static_cast<int>(num_experts), static_cast<int>(num_slots)) + 12 * num_experts;
}

__device__ void mirror_totals(const Layer& layer, volatile int64_t* mirror) {
  __syncthreads();
  if (mirror && threadIdx.x < kHeaderWords) mirror[threadIdx.x] = layer.header[threadIdx.x];
}

// Records that the plan needs and that a prefetch brings: one that has not started becomes a load of ours, any other
// is waited for. `num_misses` loads stand in the list already.
__device__ void take_over_late(Block& team, const Layer& layer, int32_t* words, const Room& room,
                               const StepCounts& step, const Orders& orders) {
  constexpr int64_t kWaits = 1ll << 32;
  int begin, end;
  share_of(team, step.num_late, &begin, &end);
  int64_t mine = 0;
  for (int i = begin; i < end; ++i) {
    const int64_t slot = layer.slot_of()[room.lists.late[i]];
    const bool ours = claim(&words[slot]);
    if (!ours) request(&words[slot]);
    room.scratch.settled[i] = ours;
    mine += ours ? 1 : kWaits;
  }
  int64_t total = 0;
  int64_t before = team.sum(mine, &total);
  for (int i = begin; i < end; ++i) {
    const int32_t expert = room.lists.late[i];
    const auto slot = static_cast<int32_t>(layer.slot_of()[expert]);
    if (room.scratch.settled[i]) {
      const int64_t m = step.num_misses + before % kWaits;
      orders.loads[2 * m] = expert;
      orders.loads[2 * m + 1] = slot;
      before += 1;
    } else {
      orders.extra[before / kWaits] = slot;
      before += kWaits;
    }
  }
  if (team.rank() == 0) {
    *orders.num_loads = static_cast<int32_t>(step.num_misses + total % kWaits);
    *orders.num_extra = static_cast<int32_t>(total / kWaits);
    layer.header[kClaimed] += total % kWaits;
  }
}

__device__ void wait_for_lane(Block& team, const Layer& layer, int32_t* words) {
  for (int slot = team.rank(); slot < layer.num_slots(); slot += team.size()) {
    while (request(&words[slot])) __nanosleep(200);
  }
  team.sync();
}

template <class Id>
__global__ void __launch_bounds__(kPlanThreads, 1)
    plan_step_kernel(int64_t* state, int32_t* words, const Id* routed, const int64_t* real, Id* slot_ids,
                     int num_entries, const Orders orders, int64_t* mirror) {
  extern __shared__ int64_t memory[];
  __shared__ int64_t sums[kPlanThreads / kWarp];
  Block team(sums);
  const Layer layer{state};
  const Room room = Room::of(memory, layer, orders.loads);
  SlotWords lane{words};
  const TokenIds<Id> ids{routed, real, static_cast<int>(layer.header[kTopK])};
  StepCounts step;
  Split split = kMustSettle;
  while (true) {
    split = plan_narrow(team, layer, lane, ids, num_entries, slot_ids, room.scratch, room.lists, &step);
    if (split != kMustSettle) break;
    wait_for_lane(team, layer, words);  // only records that are being copied are in the way, and they land
  }
  if (split == kWide) {  // the caller promised a narrow step: no slot id may be out of range all the same
    for (int i = team.rank(); i < num_entries; i += team.size()) slot_ids[i] = 0;
    if (team.rank() == 0) layer.header[kOutOfRange] += num_entries;
  }
  for (int m = team.rank(); m < step.num_misses; m += team.size()) begin_load(&words[orders.loads[2 * m + 1]]);
  take_over_late(team, layer, words, room, step, orders);
  for (int i = team.rank(); i < num_entries; i += team.size()) {  // padding: any valid slot, but not all the same one
    if (ids[i] < 0) slot_ids[i] = static_cast<Id>(i % layer.num_slots());
  }
  if (team.rank() == 0) count_step(layer, step);
  mirror_totals(layer, mirror);
}

template <class Id>
__global__ void __launch_bounds__(kPlanThreads, 1)
    plan_prefetch_kernel(int64_t* state, int32_t* words, const Id* predicted, const int64_t* real, int per_token,
                         int num_tokens, const volatile int32_t* wanted, int most, const Orders orders) {
  extern __shared__ int64_t memory[];
  __shared__ int64_t sums[kPlanThreads / kWarp];
  __shared__ int budget;
  if (threadIdx.x == 0) budget = min(*wanted, most);  // by one thread: the host may change it in between
  Block team(sums);
  team.sync();
  const Layer layer{state};
  const Room room = Room::of(memory, layer, orders.loads);
  SlotWords lane{words};
  const PredictedIds<Id> ids{predicted, real, per_token, num_tokens};
  StepCounts step;
  const int num_loads = plan_prefetch(team, layer, lane, ids, num_tokens * per_token, budget, room.scratch, room.lists,
                                      &step);
  for (int m = team.rank(); m < num_loads; m += team.size()) {
    orders.extra[m] = static_cast<int32_t>(enqueue(&words[orders.loads[2 * m + 1]]));
  }
  if (team.rank() == 0) *orders.num_loads = num_loads;
}

// A step too wide for the slots: what is absent goes from the host to its place in the stream buffer (`loads`, pairs
// (expert, expert)), what is resident from its slot (`kept`, pairs (slot, expert)). Residency does not change.
template <class Id>
__global__ void __launch_bounds__(kPlanThreads, 1)
    plan_stream_kernel(int64_t* state, int32_t* words, const Id* routed, const int64_t* real, int num_entries,
                       int32_t* loads, int32_t* num_loads, int32_t* kept, int32_t* num_kept, int64_t* mirror) {
  extern __shared__ int64_t memory[];
  __shared__ int64_t sums[kPlanThreads / kWarp];
  Block team(sums);
  const Layer layer{state};
  const Scratch scratch = Scratch::at(memory, layer.num_experts(), layer.num_slots());
  SlotWords lane{words};
  const TokenIds<Id> ids{routed, real, static_cast<int>(layer.header[kTopK])};
  find_first(team, layer, ids, num_entries, scratch);
  wait_for_lane(team, layer, words);
  settle(team, layer, lane, scratch, true);
  constexpr int64_t kKept = 1ll << 15, kUse = 1ll << 30, kLost = 1ll << 45, kField = kKept - 1;
  int begin, end;
  share_of(team, layer.num_experts(), &begin, &end);
  int64_t mine = 0;
  for (int expert = begin; expert < end; ++expert) {
    if (scratch.first[expert] == kNever) continue;
    const int64_t flags = layer.flags()[expert];
    const bool resident = flags & kRanked;  // a prefetch that has not started may still be cancelled: not used yet
    mine += resident ? kKept : 1;
    mine += resident && (flags & kUntouched) ? kUse : 0;
    mine += flags & kDisplaced ? kLost : 0;
    layer.flags()[expert] &= ~static_cast<int64_t>(resident ? kUntouched | kDisplaced : kDisplaced);
  }
  int64_t total = 0;
  int64_t before = team.sum(mine, &total);
  for (int expert = begin; expert < end; ++expert) {
    if (scratch.first[expert] == kNever) continue;
    const bool resident = layer.flags()[expert] & kRanked;
    int32_t* pair = resident ? kept + 2 * (before / kKept & kField) : loads + 2 * (before & kField);
    pair[0] = resident ? static_cast<int32_t>(layer.slot_of()[expert]) : expert;
    pair[1] = expert;
    before += resident ? kKept : 1;
  }
  if (team.rank() == 0) {
    StepCounts step;
    step.num_misses = static_cast<int>(total & kField);
    step.num_hits = static_cast<int>(total / kKept & kField);
    step.num_needed = step.num_misses + step.num_hits;
    step.num_used = static_cast<int>(total / kUse & kField);
    step.num_displaced = static_cast<int>(total / kLost & kField);
    *num_loads = step.num_misses;
    *num_kept = step.num_hits;
    count_step(layer, step);
    layer.header[kStreamSteps] += step.num_needed > 0;
    layer.header[kStreamMisses] += step.num_misses;
  }
  mirror_totals(layer, mirror);
}

struct Shape {
  int64_t num_experts;
  int64_t num_slots;
  int64_t bytes;
};

Shape shape_of(const TensorView& state, const TensorView& words) {
  // words tells C, and with it the state's size tells E: the numbers themselves lie on the device.
  const int64_t num_slots = words.numel();
  const int64_t num_experts = (state.numel() - kHeaderWords - 2 * num_slots) / 4;
  TVM_FFI_CHECK(num_slots > 0 && num_experts >= num_slots && num_experts <= kMaxExperts &&
                    state.numel() == Layer::words(num_experts, num_slots),
                ValueError)
      << "state of " << state.numel() << " words and " << num_slots << " slot words: not a layer of at most "
      << kMaxExperts << " experts";
  return {num_experts, num_slots, shared_bytes(num_experts, num_slots)};
}

void check_room(const TensorView& list, int64_t needed, const char* what) {
  TVM_FFI_CHECK(list.numel() >= needed, ValueError) << what << " has room for " << list.numel() << ", needs " << needed;
}

// The tokens of (tokens, per token) ids; `real` must tell for each whether it is one.
int64_t check_tokens(const TensorView& ids, const TensorView& real) {
  TVM_FFI_CHECK(ids.ndim() == 2, ValueError) << "ids must have shape (tokens, k), they have " << ids.ndim()
                                             << " dimensions";
  check_room(real, ids.size(0), "real");
  return ids.size(0);
}

// `ids` (T, K) int32 or int64, `real` (>= T) int64, negative for padding; K must be the planner's top-k.
void PlanStep(TensorView state, TensorView words, TensorView ids, TensorView real, TensorView slot_ids,
              TensorView loads, TensorView num_loads, TensorView late, TensorView num_late, int64_t mirror,
              int64_t stream) {
  const Shape shape = shape_of(state, words);
  check_tokens(ids, real);
  const int64_t entries = ids.numel();
  TVM_FFI_CHECK(entries <= shape.num_slots, ValueError)
      << entries << " routed ids may need more than " << shape.num_slots << " slots: split the step, or stream it";
  check_room(slot_ids, entries, "slot_ids");
  check_room(loads, 2 * entries, "loads");
  check_room(late, entries, "late");
  const Orders orders{cuda_data<int32_t>(loads, "loads"), cuda_data<int32_t>(num_loads, "num_loads"),
                      cuda_data<int32_t>(late, "late"), cuda_data<int32_t>(num_late, "num_late")};
  const auto launch = [&](auto id) {
    using Id = decltype(id);
    plan_step_kernel<Id><<<1, kPlanThreads, shape.bytes, reinterpret_cast<cudaStream_t>(stream)>>>(
        cuda_data<int64_t>(state, "state"), cuda_data<int32_t>(words, "words"), cuda_data<Id>(ids, "ids"),
        cuda_data<int64_t>(real, "real"), cuda_data<Id>(slot_ids, "slot_ids"), static_cast<int>(entries), orders,
        reinterpret_cast<int64_t*>(mirror));
  };
  ids.dtype().bits == 64 ? launch(int64_t{}) : launch(int32_t{});
  check_launch("plan_step");
}

// `predicted` (T, P): P expert ids of each token, most wanted first; negative ones are skipped. `budget`: the address,
// as the GPU sees it, of an int32 that says how many loads there may be. Every run of the kernel reads it, so that the
// host can change it while graphs are replayed; the room in the lists limits it.
void PlanPrefetch(TensorView state, TensorView words, TensorView predicted, TensorView real, int64_t budget,
                  TensorView loads, TensorView num_loads, TensorView tickets, int64_t stream) {
  const Shape shape = shape_of(state, words);
  check_tokens(predicted, real);
  TVM_FFI_CHECK(budget != 0, ValueError) << "budget must be an address that the GPU can read, it is 0";
  const int64_t most = std::min({shape.num_slots, loads.numel() / 2, tickets.numel()});
  const Orders orders{cuda_data<int32_t>(loads, "loads"), cuda_data<int32_t>(num_loads, "num_loads"),
                      cuda_data<int32_t>(tickets, "tickets"), nullptr};
  const auto launch = [&](auto id) {
    using Id = decltype(id);
    plan_prefetch_kernel<Id><<<1, kPlanThreads, shape.bytes, reinterpret_cast<cudaStream_t>(stream)>>>(
        cuda_data<int64_t>(state, "state"), cuda_data<int32_t>(words, "words"), cuda_data<Id>(predicted, "predicted"),
        cuda_data<int64_t>(real, "real"), static_cast<int>(predicted.size(1)), static_cast<int>(predicted.size(0)),
        reinterpret_cast<const volatile int32_t*>(budget), static_cast<int>(most), orders);
  };
  predicted.dtype().bits == 64 ? launch(int64_t{}) : launch(int32_t{});
  check_launch("plan_prefetch");
}

void PlanStream(TensorView state, TensorView words, TensorView ids, TensorView real, TensorView loads,
                TensorView num_loads, TensorView kept, TensorView num_kept, int64_t mirror, int64_t stream) {
  const Shape shape = shape_of(state, words);
  check_tokens(ids, real);
  check_room(loads, 2 * shape.num_experts, "loads");
  check_room(kept, 2 * shape.num_slots, "kept");
  const auto launch = [&](auto id) {
    using Id = decltype(id);
    plan_stream_kernel<Id><<<1, kPlanThreads, shape.bytes, reinterpret_cast<cudaStream_t>(stream)>>>(
        cuda_data<int64_t>(state, "state"), cuda_data<int32_t>(words, "words"), cuda_data<Id>(ids, "ids"),
        cuda_data<int64_t>(real, "real"), static_cast<int>(ids.numel()), cuda_data<int32_t>(loads, "loads"),
        cuda_data<int32_t>(num_loads, "num_loads"), cuda_data<int32_t>(kept, "kept"),
        cuda_data<int32_t>(num_kept, "num_kept"), reinterpret_cast<int64_t*>(mirror));
  };
  ids.dtype().bits == 64 ? launch(int64_t{}) : launch(int32_t{});
  check_launch("plan_stream");
}

}  // namespace
}  // namespace vep

TVM_FFI_DLL_EXPORT_TYPED_FUNC(plan_step, vep::PlanStep);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(plan_prefetch, vep::PlanPrefetch);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(plan_stream, vep::PlanStream);
