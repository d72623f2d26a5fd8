"""Serve Mixture-of-Experts models whose experts do not fit the GPU, from stock vLLM, token for token."""

from importlib.metadata import version

__version__ = version("vllm-expert-prefetch")
