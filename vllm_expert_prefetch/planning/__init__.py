"""Sizing and, later, analytic models and trace replay. No torch, no vLLM."""
