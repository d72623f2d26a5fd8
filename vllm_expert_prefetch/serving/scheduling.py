"""vLLM's scheduler, held to `max_decode_delay_ms`: prompts beside decodes come in pieces that keep steps short."""

import time
import weakref
from typing import Any

from vllm_expert_prefetch.config import CONFIG_KEY, ConfigError, ExpertPrefetchConfig, config_of
from vllm_expert_prefetch.serving.prompt_limit import PromptLimit

_bounds: "weakref.WeakKeyDictionary[Any, Bound | None]" = weakref.WeakKeyDictionary()
"""By scheduler."""


class Bound:
    """What one scheduler is held to, and when its steps were scheduled."""

    def __init__(self, limit: PromptLimit) -> None:
        self.limit = limit
        self._steps: dict[int, tuple[float, int]] = {}
        """By the id of a step that decodes: when it was scheduled, and its prompt tokens."""
        self._last_ended = 0.0

    def schedule(self, scheduler: Any, schedule: Any) -> Any:
        """The step that `schedule()` gives while `scheduler` may take no more prompt tokens than the limit."""
        decoding = [request for request in scheduler.running if request.num_output_tokens]
        if not decoding:
            return schedule()
        settings, most = scheduler.scheduler_config, scheduler.max_num_scheduled_tokens
        threshold = settings.long_prefill_token_threshold
        # Of running prompts each gets a share: one that stands before the decodes must leave them theirs. The threshold
        # holds for decodes as well, which verify a token and its drafts.
        num_prompts = max(1, len(scheduler.running) - len(decoding))
        each = max(1 + scheduler.num_spec_tokens, self.limit.tokens // num_prompts)
        wanted = sum(1 + len(request.spec_token_ids) for request in decoding)
        scheduler.max_num_scheduled_tokens = min(most, wanted + max(self.limit.tokens, each * num_prompts))
        settings.long_prefill_token_threshold = min(each, threshold) if threshold else each
        try:
            step = schedule()
        finally:
            scheduler.max_num_scheduled_tokens, settings.long_prefill_token_threshold = most, threshold
        names = {request.request_id for request in decoding}
        num_prompt_tokens = sum(number for name, number in step.num_scheduled_tokens.items() if name not in names)
        self._steps[id(step)] = time.monotonic(), num_prompt_tokens
        return step

    def ended(self, step: Any) -> None:
        """The output of `step` is there. Steps follow each other: it began when it was scheduled, or later."""
        now = time.monotonic()
        began, num_prompt_tokens = self._steps.pop(id(step), (now, 0))
        if num_prompt_tokens:
            self.limit.note(num_prompt_tokens, now - max(began, self._last_ended))
        self._last_ended = now


def extend_scheduler() -> None:
    """Hold every scheduler to the bound of its configuration, where that has one."""
    from vllm.v1.core.sched.scheduler import Scheduler

    schedule, update = Scheduler.schedule, Scheduler.update_from_output

    def schedule_within(self: Any, *args: Any, **kwargs: Any) -> Any:
        bound = bound_of(self)
        if bound is None:
            return schedule(self, *args, **kwargs)
        return bound.schedule(self, lambda: schedule(self, *args, **kwargs))

    def update_and_note(self: Any, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        bound = bound_of(self)
        if bound is not None:
            bound.ended(scheduler_output)
        return update(self, scheduler_output, *args, **kwargs)

    Scheduler.schedule, Scheduler.update_from_output = schedule_within, update_and_note


def bound_of(scheduler: Any) -> Bound | None:
    """What `scheduler` is held to; None where nothing was asked for."""
    if scheduler not in _bounds:
        config = config_of(scheduler.vllm_config)
        seconds = None if config is None else config.max_decode_delay_ms
        limit = None if seconds is None else PromptLimit(seconds / 1000, scheduler.max_num_scheduled_tokens)
        _bounds[scheduler] = None if limit is None else Bound(limit)
    return _bounds[scheduler]


def check_scheduler(vllm_config: Any, config: ExpertPrefetchConfig) -> None:
    """Raise ConfigError where vLLM's scheduler cannot be held to the bound that was asked for."""
    if config.max_decode_delay_ms is None:
        return
    settings = vllm_config.scheduler_config
    asked = f"{CONFIG_KEY}: max_decode_delay_ms is {config.max_decode_delay_ms:g}, and"
    if not settings.enable_chunked_prefill:
        raise ConfigError(f"{asked} prompts come in one piece: drop --no-enable-chunked-prefill, or the key")
    if getattr(settings, "long_prefill_token_threshold_adaptive", False):
        raise ConfigError(
            f"{asked} vLLM lets prompts exceed any threshold: drop --long-prefill-token-threshold-adaptive, or the key"
        )
    own = settings.scheduler_cls
    if own is not None and not str(own).startswith("vllm."):
        raise ConfigError(f"{asked} {own} is not vLLM's scheduler: drop --scheduler-cls, or the key")
