"""The load on a server: `vllm bench serve` as the client, chats of texts of several domains, and what was counted."""

import contextlib
import io
import json
import random
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_expert_prefetch.metrics.rates import NoMetrics, Scrape, parse_scrape

_SPREAD_PROMPT, _SPREAD_ANSWER = 0.8, 0.6
"""Standard deviations of the logarithm of lengths, as those of chats have."""


@dataclass(frozen=True)
class Lengths:
    """In words; a word takes one and a half tokens of large models, two to three of the demo models."""

    prompt: int = 50
    """Median."""
    answer: int = 20
    most_prompt: int = 90
    most_answer: int = 45


def ask(
    url: str, model: str, tokenizer: str, concurrency: int, num_requests: int, folder: Path, lengths: Lengths
) -> dict[str, Any]:
    """What `vllm bench serve` finds, which runs in this process: starting it takes as long as a load.

    Greedy, no answer ends early. Raises RuntimeError where a request fails.
    """
    from vllm.benchmarks import serve as client
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    prompts = folder / "prompts.json"
    prompts.write_text(json.dumps(conversations(num_requests, concurrency, lengths)))
    command = ["--backend", "openai", "--base-url", url, "--model", model, "--tokenizer", tokenizer]
    command += ["--dataset-name", "sharegpt", "--dataset-path", str(prompts), "--disable-shuffle"]
    command += ["--ignore-eos", "--temperature", "0", "--disable-tqdm", "--seed", "0"]
    command += ["--num-prompts", str(num_requests), "--max-concurrency", str(concurrency)]
    command += ["--percentile-metrics", "ttft,tpot,itl", "--metric-percentiles", "50,99"]
    arguments = FlexibleArgumentParser()
    client.add_cli_args(arguments)
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        found: dict[str, Any] = client.main(arguments.parse_args(command))
    if found["completed"] != num_requests:
        raise RuntimeError(
            f"{num_requests - found['completed']} of {num_requests} requests failed: {printed.getvalue()}"
        )
    return found


def conversations(number: int, seed: int, lengths: Lengths = Lengths()) -> list[dict[str, Any]]:
    """Questions from passages of all domains in turn, and texts as long as the answers are to be."""
    from vllm_expert_prefetch.demo.text import load_documents

    rng = random.Random(seed)
    documents = [document.text.split() for document in load_documents()]
    made = []
    for index in range(number):
        words = documents[index * 7 % len(documents)]
        drawn = round(rng.lognormvariate(0, _SPREAD_PROMPT) * lengths.prompt)
        length = min(lengths.most_prompt, max(4, drawn))
        start = rng.randrange(max(1, len(words) - length))
        drawn = round(rng.lognormvariate(0, _SPREAD_ANSWER) * lengths.answer)
        answer = min(lengths.most_answer, max(4, drawn))
        texts = words[start : start + length], (words * 2)[start + length : start + length + answer]
        made.append({"conversations": [{"value": " ".join(text)} for text in texts]})
    return made


def scrape(page: str) -> Scrape:
    """The plugin's series on a page of /metrics; none where plain vLLM serves."""
    try:
        return parse_scrape(page, time.monotonic())
    except NoMetrics:
        return Scrape(time.monotonic(), {})
