// The plan kernels for Python. Tensors are on the GPU, and every launch can be captured.

#include <cuda_runtime.h>
#include <tvm/ffi/extra/cuda/device_guard.h>
#include <tvm/ffi/tvm_ffi.h>

#include <algorithm>

#include "plan_kernels.cuh"
#include "tensors.cuh"

namespace vep {
namespace {

using tvm::ffi::Optional;
using tvm::ffi::String;
using tvm::ffi::TensorView;

#ifdef __CUDACC__
constexpr int kFewThreads = 256, kManyThreads = 768;  // more would leave too few registers
#else                                                 // tests/device/shim: a block is one thread
constexpr int kFewThreads = 1, kManyThreads = 1;
#endif
constexpr int64_t kFewIds = 1024;

String WordNames() {
  return kWordNames;
}

// A layer, whose numbers lie on the device: the board's size tells E, and with it the state's tells C.
struct PlannedLayer {
  PlannedLayer(const TensorView& state, const TensorView& board, const TensorView& lane, int64_t mirror)
      : num_experts((board.numel() - board_ints(0)) / 3),
        num_slots(state.numel() - kHeaderWords - 5 * num_experts),
        shared(shared_bytes(num_experts, num_slots)) {
    TVM_FFI_CHECK(num_slots > 0 && num_slots <= num_experts && num_experts <= kMaxExperts &&
                      state.numel() == Layer::words(num_experts, num_slots),
                  ValueError)
        << "state of " << state.numel() << " words and a board of " << board.numel() << ": not a layer of at most "
        << kMaxExperts << " experts";
    const Board at = board_at(cuda_data<int32_t>(board, board_ints(num_experts), "board"), num_experts);
    memory = {cuda_data<int64_t>(state, 0, "state"),
              static_cast<int>(state.numel()),
              at.states,
              at.errors,
              lane_at(cuda_data<int32_t>(lane, lane_ints(), "lane")).queued,
              reinterpret_cast<int64_t*>(mirror)};
  }

  const int64_t num_experts, num_slots, shared;
  LayerMemory memory;
};

// The tokens of (tokens, per token) ids; `real` must tell for each whether it is one.
int64_t check_tokens(const TensorView& ids, const TensorView& real) {
  TVM_FFI_CHECK(ids.ndim() == 2, ValueError)
      << "ids must have shape (tokens, k), they have " << ids.ndim() << " dimensions";
  TVM_FFI_CHECK(real.numel() >= ids.size(0), ValueError)
      << "real has " << real.numel() << " items, needs " << ids.size(0);
  return ids.size(0);
}

// `states`: on the device, one after another; `slots`: how many each has, on the CPU; both int64. `mirror`: as for a
// layer. `shared` grows to what the largest needs.
Ghosts ghosts_in(const TensorView& states, const TensorView& slots, int64_t mirror, int64_t num_experts,
                 int64_t* shared) {
  Ghosts ghosts{cuda_data<int64_t>(states, 0, "ghost states"), reinterpret_cast<int64_t*>(mirror),
                static_cast<int>(slots.numel())};
  TVM_FFI_CHECK(slots.numel() <= kMaxGhosts && mirror != 0, ValueError)
      << "at most " << kMaxGhosts << " ghosts with a mirror, there are " << slots.numel();
  int64_t num_words = 0;
  for (int i = 0; i < ghosts.number; ++i) {
    const int64_t num_slots = static_cast<const int64_t*>(slots.data_ptr())[i];
    ghosts.num_words[i] = static_cast<int>(Layer::words(num_experts, num_slots));
    num_words += ghosts.num_words[i];
    *shared = std::max(*shared, shared_bytes(num_experts, num_slots));
  }
  TVM_FFI_CHECK(states.numel() == num_words, ValueError)
      << "ghost states have " << states.numel() << " words, these slots need " << num_words;
  return ghosts;
}

// Calls `start` with the kernel for so many ids, and its threads.
template <class Start, class Kernel>
void start_for(int64_t num_ids, Kernel few, Kernel many, Start start) {
  num_ids > kFewIds ? start(many, kManyThreads) : start(few, kFewThreads);
}

// `ids` (T, K) int32 or int64, `real` (>= T) int64, negative for padding. `row_ids`: like `ids`, written. `loads`:
// int32 (E, 2) and `late`: int32 (E) receive what is to be copied and waited for. `mirror`: where the words go in host
// memory, as the GPU sees it, or 0. `ghosts`, with `ghost_slots` and `ghost_mirror`: larger caches that the step is
// planned for as well (ghosts_in), or none.
void PlanStep(TensorView state, TensorView board, TensorView lane, TensorView ids, TensorView real, TensorView row_ids,
              TensorView loads, TensorView num_loads, TensorView late, TensorView num_late, int64_t mirror,
              bool is_speculated, Optional<TensorView> ghosts, Optional<TensorView> ghost_slots, int64_t ghost_mirror,
              int64_t stream) {
  const PlannedLayer layer(state, board, lane, mirror);
  int64_t shared = layer.shared;
  const Ghosts larger = ghosts ? ghosts_in(*ghosts, *ghost_slots, ghost_mirror, layer.num_experts, &shared) : Ghosts{};
  check_tokens(ids, real);
  const int64_t num_ids = ids.numel();
  const Orders orders{cuda_data<int32_t>(loads, 2 * layer.num_experts, "loads"),
                      cuda_data<int32_t>(num_loads, 1, "num_loads"),
                      cuda_data<int32_t>(late, layer.num_experts, "late"), cuda_data<int32_t>(num_late, 1, "num_late")};
  const auto plan_as = [&](auto id) {
    using Id = decltype(id);
    const int per_token = static_cast<int>(ids.size(1));
    const TokenIds<Id> tokens{cuda_data<Id>(ids, 0, "ids"), cuda_data<int64_t>(real, 0, "real"), per_token, per_token};
    Id* out = cuda_data<Id>(row_ids, num_ids, "row_ids");
    tvm::ffi::CUDADeviceGuard guard(state.device().device_id);
    start_for(num_ids, plan_step_kernel<kFewThreads, Id>, plan_step_kernel<kManyThreads, Id>,
              [&](auto kernel, int threads) {
                launch(kernel, 1 + larger.number, threads, shared, stream, layer.memory, tokens,
                       static_cast<int>(num_ids), out, orders, is_speculated, larger);
              });
    check_launch("plan_step");
  };
  ids.dtype().bits == 64 ? plan_as(int64_t{}) : plan_as(int32_t{});
}

// `predicted` (T, P): P expert ids of each token, most wanted first; negative ones are skipped. `budget`: the address,
// as the GPU sees it, of two int32: how many loads there may be, and how many guesses of each token count. Every run of
// the kernel reads them, so that the host can change them while graphs are replayed; the room in the lists limits it.
// `is_far`: predicted from more than one layer away. `preloads`: ahead of a step that may need more experts than there
// are slots; the lists must have room for all experts.
void PlanPrefetch(TensorView state, TensorView board, TensorView lane, TensorView predicted, TensorView real,
                  int64_t budget, bool is_far, bool preloads, TensorView loads, TensorView num_loads,
                  TensorView tickets, int64_t stream) {
  const PlannedLayer layer(state, board, lane, 0);
  const int64_t num_tokens = check_tokens(predicted, real), num_ids = predicted.numel();
  TVM_FFI_CHECK(budget != 0, ValueError) << "budget must be an address that the GPU can read, it is 0";
  const int64_t most = std::min({layer.num_slots, loads.numel() / 2, tickets.numel()});
  const int64_t room = preloads ? layer.num_experts : 0;
  const Orders orders{cuda_data<int32_t>(loads, 2 * room, "loads"), cuda_data<int32_t>(num_loads, 1, "num_loads"),
                      cuda_data<int32_t>(tickets, room, "tickets"), nullptr};
  const auto plan_as = [&](auto id) {
    using Id = decltype(id);
    const int per_token = static_cast<int>(predicted.size(1));
    const PredictedIds<Id> ids{
        {cuda_data<Id>(predicted, 0, "predicted"), cuda_data<int64_t>(real, 0, "real"), per_token, per_token},
        static_cast<int>(num_tokens)};
    tvm::ffi::CUDADeviceGuard guard(state.device().device_id);
    start_for(num_ids, plan_prefetch_kernel<kFewThreads, Id>, plan_prefetch_kernel<kManyThreads, Id>,
              [&](auto kernel, int threads) {
                launch(kernel, 1, threads, layer.shared, stream, layer.memory, ids, static_cast<int>(num_ids),
                       reinterpret_cast<const volatile int32_t*>(budget), static_cast<int>(most), is_far, preloads,
                       orders);
              });
    check_launch("plan_prefetch");
  };
  predicted.dtype().bits == 64 ? plan_as(int64_t{}) : plan_as(int32_t{});
}

// Loads the kernels' code, as load_gather_kernels does, and lets them have as much shared memory as the GPU gives a
// block. Raises ValueError, with both numbers, when that is too little for a layer of these numbers.
void LoadPlanKernels(int64_t num_experts, int64_t num_slots, int64_t device) {
  tvm::ffi::CUDADeviceGuard guard(static_cast<int>(device));
  int most = 0;
  check_cuda(cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, static_cast<int>(device)),
             "shared memory of a block");
  const int64_t needed = shared_bytes(num_experts, num_slots);
  TVM_FFI_CHECK(num_experts <= kMaxExperts && needed <= most, ValueError)
      << "a layer of " << num_experts << " experts (at most " << kMaxExperts << ") and " << num_slots
      << " slots is planned in " << needed << " bytes of shared memory, of which this GPU has " << most;
  const auto load = [&](auto... kernels) {
    (check_cuda(cudaFuncSetAttribute(kernels, cudaFuncAttributeMaxDynamicSharedMemorySize, most), "plan kernel"), ...);
  };
  load(plan_step_kernel<kFewThreads, int32_t>, plan_step_kernel<kFewThreads, int64_t>,
       plan_step_kernel<kManyThreads, int32_t>, plan_step_kernel<kManyThreads, int64_t>,
       plan_prefetch_kernel<kFewThreads, int32_t>, plan_prefetch_kernel<kFewThreads, int64_t>,
       plan_prefetch_kernel<kManyThreads, int32_t>, plan_prefetch_kernel<kManyThreads, int64_t>);
}

}  // namespace
}  // namespace vep

TVM_FFI_DLL_EXPORT_TYPED_FUNC(word_names, vep::WordNames);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(load_plan_kernels, vep::LoadPlanKernels);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(plan_step, vep::PlanStep);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(plan_prefetch, vep::PlanPrefetch);
