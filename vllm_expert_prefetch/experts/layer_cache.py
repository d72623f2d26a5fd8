"""The expert cache of one layer: who plans and who copies, behind one call per step."""

from typing import NamedTuple, Protocol

import torch

from vllm_expert_prefetch.experts.native_planner import HEAD_WORDS, NativePlanner
from vllm_expert_prefetch.experts.native_staging import NativeStaging
from vllm_expert_prefetch.experts.staging import TorchStaging
from vllm_expert_prefetch.residency import ExpertCache, Planner, Split, Wave

_NARROW = int(Split.NONE)
_REPORT_WORDS = HEAD_WORDS + 4
_NANO = 1e-9


class Step(NamedTuple):
    """What serving one step took. The counts are those of `residency.Plan`.

    A narrow step (`split` NONE) comes with `slot_ids`, in the shape and type of the routed ids, and every record has
    landed, or will have before a kernel that is launched next. A wide one comes with its `waves`, which the executor
    stages one by one; bytes and seconds are then added when it has.
    """

    split: int
    num_waves: int
    num_hits: int
    num_late: int
    num_misses: int
    num_evictions: int
    num_used: int
    num_unused: int
    num_displaced: int
    num_cancelled: int
    """Prefetches that this step did not need and that had not started."""
    num_bytes: int
    """Copied because the step needed it."""
    stall_seconds: float
    """Until every record had landed (on a GPU: until the copies were issued)."""
    late_seconds: float
    """Of these, waiting for prefetches that had started."""
    slot_ids: torch.Tensor | None
    waves: tuple[Wave, ...]


class Prefetch(NamedTuple):
    """What queueing one prefetch did: see `residency.PrefetchPlan`."""

    num_loads: int
    num_evictions: int
    num_unused: int


class LayerCache(Protocol):
    """What the layer needs of its cache."""

    num_slots: int

    @property
    def staging(self) -> TorchStaging | NativeStaging:
        """Who copies."""

    @property
    def num_resident(self) -> int:
        """Slots whose record has landed."""

    @property
    def copier(self) -> TorchStaging | NativeStaging:
        """What `measure_bandwidth` asks for copies."""

    def fill(self) -> None:
        """Put expert s into slot s, for every slot: any expert is better than an empty slot."""

    def serve(self, topk_ids: torch.Tensor, num_tokens: int) -> Step:
        """Serve one step: `topk_ids` (T, K) integers, of which the first `num_tokens` rows are real."""


class PythonLayerCache:
    """Planned by `residency.Planner`, the specification: for GPUs without graphs, and where nothing was compiled."""

    def __init__(self, cache: ExpertCache, planner: Planner, staging: TorchStaging | NativeStaging) -> None:
        self.num_slots = cache.num_slots
        self.staging: TorchStaging | NativeStaging = staging
        self._cache = cache
        self._planner = planner

    @property
    def num_resident(self) -> int:
        return self._cache.num_resident

    @property
    def copier(self) -> TorchStaging | NativeStaging:
        return self.staging

    def fill(self) -> None:
        loads = self._cache.begin_loads(list(range(self.num_slots)), ())
        self.staging.fill([(load.expert, load.slot) for load in loads])
        self._cache.complete([load.expert for load in loads], cold=True)

    def serve(self, topk_ids: torch.Tensor, num_tokens: int) -> Step:
        plan = self._planner.plan(topk_ids[:num_tokens].flatten().tolist())
        slot_ids = None
        num_bytes, seconds = 0, 0.0
        if plan.split is Split.NONE:
            if plan.num_misses:
                self.staging.reset_totals()
                self.staging.stage([(load.expert, load.slot) for load in plan.waves[0].loads])
                num_bytes, seconds = self.staging.total_bytes, self.staging.total_seconds
            slot_ids = slot_ids_of(plan.waves[0], topk_ids, self._cache.num_experts, absent=0)
        self._planner.complete(plan)
        waves = () if plan.split is Split.NONE else plan.waves
        return Step(plan.split, len(plan.waves), *plan[2:], 0, num_bytes, seconds, 0.0, slot_ids, waves)


class NativeLayerCache:
    """Planned in C++ and staged by the native engine: one call per step, and prefetches on the engine's thread."""

    def __init__(self, planner: NativePlanner, staging: NativeStaging) -> None:
        self.num_slots = planner.num_slots
        self.staging = staging
        self.planner = planner
        self._step = planner.library.serve_step
        self._prefetch = planner.library.serve_prefetch
        self._report = torch.zeros(_REPORT_WORDS, dtype=torch.int64)

    @property
    def num_resident(self) -> int:
        return self.planner.num_resident

    @property
    def copier(self) -> NativeStaging:
        return self.staging

    def fill(self) -> None:
        self.staging.fill([(slot, slot) for slot in range(self.num_slots)])
        self.planner.fill()

    def serve(self, topk_ids: torch.Tensor, num_tokens: int) -> Step:
        topk_ids = topk_ids.contiguous()
        slot_ids = torch.empty_like(topk_ids)
        num_ids = num_tokens * topk_ids.shape[1]
        engine, layer = self.staging.lane.engine, self.staging.layer
        split = self._step(engine, layer, self.planner.state, topk_ids, num_ids, slot_ids, self._report)
        *head, num_bytes, nanos, late_nanos = self._report.tolist()
        waves = () if split == _NARROW else self.planner.last_plan().waves
        seconds = (nanos * _NANO, late_nanos * _NANO)
        return Step._make([*head, num_bytes, *seconds, slot_ids if split == _NARROW else None, waves])

    def prefetch(self, predicted: torch.Tensor, budget: int) -> Prefetch:
        """Queue copies of at most `budget` of the `predicted` experts (int32 or int64), most wanted first.

        What is resident or in flight already is skipped. Returns at once.
        """
        engine, layer = self.staging.lane.engine, self.staging.layer
        counts = int(self._prefetch(engine, layer, self.planner.state, predicted, budget))
        return Prefetch(counts & 0xFFFF, counts >> 16 & 0xFFFF, counts >> 32)


def slot_ids_of(wave: Wave, topk_ids: torch.Tensor, num_experts: int, absent: int) -> torch.Tensor:
    """Slot ids in the shape and dtype of `topk_ids`; `absent` for experts outside the wave."""
    table = [absent] * num_experts
    for expert, slot in zip(wave.experts, wave.slots, strict=True):
        table[expert] = slot
    lookup = torch.tensor(table, dtype=topk_ids.dtype, device=topk_ids.device)
    return lookup.index_select(0, topk_ids.reshape(-1)).view(topk_ids.shape)
