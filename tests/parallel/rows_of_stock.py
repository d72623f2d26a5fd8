"""What plain vLLM's CPU build lacks under expert parallelism: its kernel takes ids of all experts for a rank's rows."""

from vllm.model_executor.layers.fused_moe.experts import cpu_moe


def told_rows(patch):
    """Let plain vLLM's CPU kernel know which of the ids are a rank's: others get weight 0."""
    kernel, apply = cpu_moe.cpu_fused_moe, cpu_moe.CPUUnquantizedExperts.apply
    maps = []

    def apply_with_map(self, *args, **kwargs):
        maps.append(kwargs["expert_map"])
        apply(self, *args, **kwargs)

    def kernel_with_rows(output, x, w1, w2, b1, b2, weights, ids, *rest):
        rows = maps[-1][ids.long()].to(ids.dtype)
        kernel(output, x, w1, w2, b1, b2, weights * (rows >= 0), rows.clamp(min=0), *rest)

    patch.setattr(cpu_moe.CPUUnquantizedExperts, "apply", apply_with_map)
    patch.setattr(cpu_moe, "cpu_fused_moe", kernel_with_rows)
