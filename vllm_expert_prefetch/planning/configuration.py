"""The file that `vllm serve --config` takes."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from vllm_expert_prefetch.config import CONFIG_KEY


def configuration(words: Sequence[str], settings: Mapping[str, Any] | None) -> str:
    """`words`: the model, then flags with their values. `settings`: the plugin's; None: plain vLLM.

    YAML in the words of JSON, so that nothing needs quoting twice.
    """
    lines = [f"model: {json.dumps(words[0])}"]
    flags = [number for number, word in enumerate(words) if word.startswith("--")]
    for number, end in zip(flags, [*flags[1:], len(words)], strict=True):
        values = words[number + 1 : end]
        value = "true" if not values else json.dumps(values[0] if len(values) == 1 else values)
        lines.append(f"{words[number].removeprefix('--')}: {value}")
    if settings is not None:
        lines.append(f"additional-config:\n  {CONFIG_KEY}:")
        lines += [f"    {key}: {json.dumps(value)}" for key, value in settings.items()]
    return "\n".join(lines) + "\n"
