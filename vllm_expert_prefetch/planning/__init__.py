"""Sizing, and what a checkpoint tells of its experts before it is loaded. No torch, no vLLM."""
