"""Models with real routing to try the plugin on: a trained tiny MoE, and a MoE made from SmolLM2-135M-Instruct."""

TINY = "tiny"
SMOLLM2_MOE = "smollm2-moe"
KINDS = (TINY, SMOLLM2_MOE)


class DemoError(RuntimeError):
    """A demo model cannot be made. The message says why and names the remedy."""
