"""Sizing, what a checkpoint tells of its experts before it is loaded, and replays of traces. No torch, no vLLM."""
