"""The bytes: the host store, the row space that vLLM's kernel reads, and the emulated link."""
