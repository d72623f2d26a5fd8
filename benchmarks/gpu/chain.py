"""The text of the random checkpoints: a cycle of tokens, made so that routing has stated statistics.

Token t is followed by t + 1: the output row of t + 1 is what is special about t's embedding. Greedy decoding walks the
cycle, whatever the vLLM and whatever serves the experts, and no kernel of vLLM is replaced. An embedding is the sum of
what all tokens share, what the tokens of a topic share, and what only this token has. Topics last for some tokens.
Routers are random matrices, so what embeddings share decides which experts consecutive tokens share.
"""

import random
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class ChainOptions:
    """Shares of an embedding's variance, the chance that the next token stays in the topic, and the parts of the
    residual that attention and experts add in each layer (they make the next layer's routing less predictable).

    The defaults are near what is published for Qwen3-30B-A3B and its kind: consecutive tokens share about 0.4 of their
    experts, a cache of 40 % hits 0.9, a look-ahead of one layer finds about 0.9.
    """

    common: float = 0.2
    topic: float = 0.5
    stay: float = 0.97
    num_topics: int = 64
    attention_part: float = 0.07
    expert_part: float = 0.1
    seed: int = 1


@dataclass(frozen=True)
class Chain:
    """Embeddings (V, H) and output rows (V, H), both with rows that a normalised residual can be multiplied with."""

    embeddings: torch.Tensor
    outputs: torch.Tensor


LOGIT = 20.0
"""About the logit of the token that follows; the others are near 0."""


def make_chain(vocab: int, hidden: int, options: ChainOptions, device: torch.device) -> Chain:
    """Float32, mean square 1 per embedding."""
    rng = random.Random(options.seed)
    topics = [0]
    while len(topics) < vocab:
        topics.append(topics[-1] if rng.random() < options.stay else rng.randrange(options.num_topics))
    generator = torch.Generator(device).manual_seed(options.seed)
    common, by_topic, own = (
        torch.randn(rows, hidden, generator=generator, device=device) for rows in (1, options.num_topics, vocab)
    )
    own_share = 1 - options.common - options.topic
    parts = (common, options.common), (by_topic[torch.tensor(topics, device=device)], options.topic), (own, own_share)
    embeddings = sum((part * share**0.5 for part, share in parts), torch.zeros((), device=device))
    return Chain(embeddings, own.roll(1, 0) * (LOGIT / (own_share**0.5 * hidden)))


def walk(vocab: int, number: int, num_tokens: int, skip: int = 0) -> list[int]:
    """A piece of the cycle, `skip` tokens after the place where sequence `number` begins."""
    start = number * 7919 + skip
    return [(start + offset) % vocab for offset in range(num_tokens)]


def followed(prompt: list[int], generated: list[int], vocab: int) -> int:
    """How many of the generated tokens are those of the cycle."""
    return sum(token == (prompt[-1] + 1 + offset) % vocab for offset, token in enumerate(generated))
