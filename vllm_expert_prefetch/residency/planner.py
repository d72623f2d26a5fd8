"""From the routed ids of one step to one plan: lookups, victims, loads and waves."""

from collections.abc import Iterable, Sequence

from vllm_expert_prefetch.residency.cache import ExpertCache
from vllm_expert_prefetch.residency.types import NO_EXPERT, Load, Plan, PrefetchPlan, Split, Wave

EMPTY_PLAN = Plan(Split.NONE, (), 0, 0, 0, 0)


class Planner:
    """Plans the steps of one layer, in order.

    A step that needs at most C distinct experts is one wave. A wider one is streamed when there is a stream buffer;
    otherwise it is split by tokens (each token's whole top-k in one wave) while that takes at most `max_token_waves`
    waves, and else by experts. All but the last are bit-exact.
    """

    def __init__(self, cache: ExpertCache, top_k: int, max_token_waves: int, stream: bool = False) -> None:
        if cache.num_slots < top_k:
            raise ValueError(f"a token needs {top_k} experts at once and the layer has {cache.num_slots} slots")
        self.cache = cache
        self.top_k = top_k
        self.max_token_waves = max_token_waves
        self.stream = stream

    def plan(self, ids: Sequence[int]) -> Plan:
        """Plan one step and do its bookkeeping.

        `ids` holds `top_k` routed expert ids per token, token after token; negative ids are padding and are ignored.
        The loads of a wave have landed before the next wave starts; those of the last wave, and late experts, stay
        IN_FLIGHT until `complete(plan)`. Raises RuntimeError where `must_settle(ids)`.
        """
        needed = _needed(ids)
        if not needed:
            return EMPTY_PLAN
        cache = self.cache
        if self._must_settle(needed):
            raise RuntimeError(f"{len(cache.in_flight)} prefetches must be settled before a step this wide")
        used, unused, displaced = before = cache.num_used, cache.num_unused, cache.num_displaced
        cache.need(needed)
        plan = self._plan(ids, needed)
        if before == (cache.num_used, cache.num_unused, cache.num_displaced):
            return plan
        return plan._replace(
            num_used=cache.num_used - used,
            num_unused=cache.num_unused - unused,
            num_displaced=cache.num_displaced - displaced,
        )

    def must_settle(self, ids: Sequence[int]) -> bool:
        """Whether prefetches in flight leave the step too few slots: every one of them must be settled first."""
        return self._must_settle(_needed(ids))

    def complete(self, plan: Plan) -> None:
        """The loads of the plan's last wave have landed, and so have the late experts."""
        if not plan.waves:
            return
        wave = plan.waves[-1]
        self.cache.complete(wave.late, cold=plan.split != Split.NONE)
        if plan.split is not Split.STREAM:
            self.cache.complete([load.expert for load in wave.loads], cold=plan.split != Split.NONE)

    def plan_prefetch(self, predicted: Iterable[int], budget: int) -> PrefetchPlan:
        """Plan copies for `predicted` experts, most wanted first, and mark them IN_FLIGHT: at most `budget` of them.

        Negative ids are ignored. No predicted expert is a victim, nor one in flight; when victims run out, the least
        wanted are left out.
        """
        cache = self.cache
        wanted = _needed(predicted)
        absent = [expert for expert in wanted if cache.slot_of[expert] < 0][: max(0, budget)]
        num_victims = max(0, len(absent) - cache.num_free)
        num_found = len(cache.policy.victims(num_victims, wanted)) if num_victims else 0
        absent = absent[: len(absent) - num_victims + num_found]
        before = cache.num_unused
        loads = cache.begin_loads(absent, wanted)
        cache.untouched.update(absent)
        cache.displaced.update(load.victim for load in loads if load.victim >= 0)
        return PrefetchPlan(loads, _num_evictions(loads), cache.num_unused - before)

    def settle(self, landed: Iterable[int], dropped: Iterable[int]) -> None:
        """Experts in flight whose prefetch has landed, and those whose copy was cancelled before it started.

        A prefetched expert ranks as cold until a step needs it: a wrong prediction leaves first.
        """
        self.cache.complete(landed, cold=True)
        for expert in dropped:
            self.cache.drop(expert)

    def _must_settle(self, needed: dict[int, None]) -> bool:
        cache = self.cache
        if not cache.in_flight:
            return False
        if len(needed) > cache.num_slots:
            return not self.stream
        return len(needed.keys() | cache.in_flight) > cache.num_slots

    def _plan(self, ids: Sequence[int], needed: dict[int, None]) -> Plan:
        if len(needed) <= self.cache.num_slots:
            return self._plan_one_wave(needed)
        if self.stream:
            return self._plan_stream(needed)
        groups = self._group_tokens(ids) if self.max_token_waves else None
        return self._plan_by_experts(needed) if groups is None else self._plan_by_tokens(groups)

    def _plan_one_wave(self, needed: dict[int, None]) -> Plan:
        cache = self.cache
        slot_of = cache.slot_of
        touch = cache.policy.touch
        absent: list[int] = []
        late: list[int] = []
        for expert in needed:
            if slot_of[expert] < 0:
                absent.append(expert)
            elif cache.in_flight and expert in cache.in_flight:
                late.append(expert)
            else:
                touch(expert)
        loads: tuple[Load, ...] = cache.begin_loads(absent, needed) if absent else ()
        experts = tuple(needed)
        wave = Wave(experts, tuple([slot_of[expert] for expert in experts]), loads, None, tuple(late))
        num_misses, num_late = len(absent), len(late)
        num_hits = len(experts) - num_misses - num_late
        num_evictions = _num_evictions(loads) if loads else 0
        return Plan(Split.NONE, (wave,), num_hits, num_late, num_misses, num_evictions)

    def _plan_stream(self, needed: dict[int, None]) -> Plan:
        """Residency does not change: the cache is neither used up nor taught by a wide step."""
        cache = self.cache
        experts = tuple(needed)
        slots = tuple([cache.slot_of[expert] for expert in experts])
        loads = tuple([Load(expert, expert, NO_EXPERT) for expert in experts if cache.slot_of[expert] < 0])
        late = tuple([expert for expert in experts if expert in cache.in_flight])
        num_misses, num_late = len(loads), len(late)
        wave = Wave(experts, slots, loads, None, late)
        return Plan(Split.STREAM, (wave,), len(experts) - num_misses - num_late, num_late, num_misses, 0)

    def _plan_by_tokens(self, groups: list[tuple[int, list[int]]]) -> Plan:
        waves = [(_members(mask), tuple(rows)) for mask, rows in groups]
        return self._plan_waves(Split.TOKENS, waves)

    def _plan_by_experts(self, needed: dict[int, None]) -> Plan:
        """First everything that is resident, where it lies; then the rest through at most half of the slots.

        The other half keeps its residents: a wide step must not flush the working set of the narrow ones.
        """
        slot_of = self.cache.slot_of
        present = tuple(expert for expert in needed if slot_of[expert] >= 0)
        absent = [expert for expert in needed if slot_of[expert] < 0]
        window = max(1, self.cache.num_slots // 2)
        chunks = [tuple(absent[start : start + window]) for start in range(0, len(absent), window)]
        return self._plan_waves(Split.EXPERTS, [(experts, None) for experts in (present, *chunks) if experts])

    def _plan_waves(self, split: Split, groups: Sequence[tuple[tuple[int, ...], tuple[int, ...] | None]]) -> Plan:
        """Wide steps neither promote what they hit nor keep what they bring: all their loads are cold.

        Split by experts, the first wave with loads chooses the slots that the later ones use as well.
        """
        cache = self.cache
        waves: list[Wave] = []
        num_misses = num_lookups = num_evictions = 0
        for experts, rows in groups:
            if waves:
                cache.complete([load.expert for load in waves[-1].loads], cold=True)
            absent = [expert for expert in experts if cache.slot_of[expert] < 0]
            protected = set(experts)
            if split is Split.EXPERTS and waves and waves[-1].loads:
                protected |= set(cache.expert_in) - {load.expert for load in waves[-1].loads}
            loads = cache.begin_loads(absent, protected)
            waves.append(Wave(experts, tuple([cache.slot_of[expert] for expert in experts]), loads, rows))
            num_lookups += len(experts)
            num_misses += len(absent)
            num_evictions += _num_evictions(loads)
        return Plan(split, tuple(waves), num_lookups - num_misses, 0, num_misses, num_evictions)

    def _group_tokens(self, ids: Sequence[int]) -> list[tuple[int, list[int]]] | None:
        """First-fit grouping of tokens into (expert bit mask, rows), at most C experts each.

        The first group starts as the resident set, so that the tokens it can serve need no load.
        None when more than `max_token_waves` groups would be needed.
        """
        rows_of = self._rows_by_mask(ids)
        num_slots = self.cache.num_slots
        resident = _mask(expert for expert in self.cache.expert_in if expert >= 0)
        groups: list[tuple[int, list[int]]] = []
        covered = [rows for mask, rows in rows_of.items() if not mask & ~resident]
        if covered:
            used = _mask_union(mask for mask in rows_of if not mask & ~resident)
            groups.append((used, sorted(row for rows in covered for row in rows)))
        for mask, rows in rows_of.items():
            if not mask & ~resident:
                continue
            for index, (group_mask, group_rows) in enumerate(groups):
                if (group_mask | mask).bit_count() <= num_slots:
                    groups[index] = (group_mask | mask, group_rows)
                    group_rows.extend(rows)
                    break
            else:
                if len(groups) == self.max_token_waves:
                    return None
                groups.append((mask, list(rows)))
        return groups

    def _rows_by_mask(self, ids: Sequence[int]) -> dict[int, list[int]]:
        """Rows grouped by the bit mask of their experts; rows that are all padding are left out."""
        top_k = self.top_k
        rows_of: dict[int, list[int]] = {}
        for row, start in enumerate(range(0, len(ids), top_k)):
            mask = _mask(expert for expert in ids[start : start + top_k] if expert >= 0)
            if mask:
                rows_of.setdefault(mask, []).append(row)
        return rows_of


def _needed(ids: Iterable[int]) -> dict[int, None]:
    """The distinct expert ids in order of first appearance, without padding."""
    needed = dict.fromkeys(ids)
    if min(needed, default=0) < 0:
        needed = {expert: None for expert in needed if expert >= 0}
    return needed


def _num_evictions(loads: tuple[Load, ...]) -> int:
    return sum(load.victim >= 0 for load in loads)


def _mask(experts: Iterable[int]) -> int:
    mask = 0
    for expert in experts:
        mask |= 1 << expert
    return mask


def _mask_union(masks: Iterable[int]) -> int:
    union = 0
    for mask in masks:
        union |= mask
    return union


def _members(mask: int) -> tuple[int, ...]:
    members = []
    while mask:
        low = mask & -mask
        members.append(low.bit_length() - 1)
        mask ^= low
    return tuple(members)
