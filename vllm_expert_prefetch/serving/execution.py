"""Running wide steps: stage each wave, turn expert ids into slot ids, call the kernel."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from vllm_expert_prefetch.experts import NativeStaging, SlotPool, Step, TorchStaging, slot_ids_of
from vllm_expert_prefetch.residency import Split, Wave

Kernel = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""(x (T, H), topk_weights (T, K), row ids (T, K)) -> (T, H): vLLM's kernel on the slots or on the stream buffer."""


@dataclass(frozen=True)
class Executor:
    """Runs the wide steps of one layer. `buffer` and `buffer_kernel` are there when steps can be streamed."""

    num_experts: int
    staging: TorchStaging | NativeStaging
    slot_kernel: Kernel
    buffer: SlotPool | None = None
    buffer_kernel: Kernel | None = None

    def run(
        self, step: Step, x: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor
    ) -> tuple[torch.Tensor, Step]:
        """Compute the layer's routed output (T, H), in the dtype of `x`, and add what staging took to the step.

        `x` (T, H); `topk_weights` (T, K) float32; `topk_ids` (T, K) integers, expert ids. Rows that are padding come
        back with any finite value.
        """
        run = {
            Split.STREAM: self._run_streamed,
            Split.TOKENS: self._run_by_tokens,
            Split.EXPERTS: self._run_by_experts,
        }[Split(step.split)]
        self.staging.reset_totals()
        output = run(step.waves, x, topk_weights, topk_ids)
        return output, step._replace(
            num_bytes=step.num_bytes + self.staging.total_bytes,
            stall_seconds=step.stall_seconds + self.staging.total_seconds,
        )

    def _run_streamed(
        self, waves: tuple[Wave, ...], x: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor
    ) -> torch.Tensor:
        """One kernel call with every expert at its own place: the very call that plain vLLM makes."""
        assert self.buffer is not None
        assert self.buffer_kernel is not None
        wave = waves[0]
        loads = [(load.expert, load.slot) for load in wave.loads]
        kept = [(expert, slot) for expert, slot in zip(wave.experts, wave.slots, strict=True) if slot >= 0]
        self.staging.stage_stream(loads, kept, self.buffer)
        return self.buffer_kernel(x, topk_weights, topk_ids)

    def _run_by_tokens(
        self, waves: tuple[Wave, ...], x: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor
    ) -> torch.Tensor:
        """Each token's whole top-k in one wave: no sums across waves, hence bit-equal to one kernel call."""
        output = torch.zeros_like(x)
        for wave in waves:
            self._stage(wave)
            rows = torch.tensor(wave.rows, device=x.device)
            slot_ids = slot_ids_of(wave, topk_ids[rows], self.num_experts, absent=0)
            output[rows] = self.slot_kernel(x[rows], topk_weights[rows], slot_ids)
        return output

    def _run_by_experts(
        self, waves: tuple[Wave, ...], x: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor
    ) -> torch.Tensor:
        """Each wave computes its experts' (row, expert) pairs as top-1 rows; partial sums are float32."""
        total = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
        for wave in waves:
            self._stage(wave)
            slot_ids = slot_ids_of(wave, topk_ids, self.num_experts, absent=-1)
            rows, columns = torch.nonzero(slot_ids >= 0, as_tuple=True)
            weights = topk_weights[rows, columns].unsqueeze(1)
            partial = self.slot_kernel(x[rows], weights, slot_ids[rows, columns].unsqueeze(1))
            total.index_add_(0, rows, partial.float())
        return total.to(x.dtype)

    def _stage(self, wave: Wave) -> None:
        if wave.loads:
            self.staging.stage([(load.expert, load.slot) for load in wave.loads])
