"""Routing, recorded while a server runs: the files, who writes them, and the switch. docs/tracing.md has the format."""
