"""The trained tiny MoE that lives in the repository (not in the wheel)."""

from pathlib import Path

from vllm_expert_prefetch.demo import DemoError
from vllm_expert_prefetch.demo.manifest import sha256_of

SOURCE = Path(__file__).parents[2] / "tests" / "models" / "tiny-moe"
WEIGHTS = "model.safetensors"
WEIGHTS_SHA256 = "2fe4240932f4f880c10f7b05fb70d1fc3746dd0c17da9564647ef7f838e357b0"


def tiny_folder() -> Path:
    """The directory of the tiny MoE, its weights verified. Raises DemoError without the repository or when damaged."""
    weights = SOURCE / WEIGHTS
    if not weights.is_file():
        raise DemoError(
            f"the tiny model is part of the repository and not of this installation ({SOURCE} is missing); "
            "use --kind smollm2-moe, or clone the repository and run this command from it"
        )
    found = sha256_of(weights)
    if found != WEIGHTS_SHA256:
        raise DemoError(
            f"{weights} is damaged: SHA-256 {found}, expected {WEIGHTS_SHA256}; restore it with git checkout"
        )
    return SOURCE
