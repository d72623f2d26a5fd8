"""vLLM's general plugin. vLLM calls `register` in every process, before any configuration exists."""

_registered = False


def register() -> None:
    """Put the plugin's classes and flag in place. Changes nothing for a model that does not ask for the plugin."""
    global _registered
    if _registered:
        return
    _registered = True
    from vllm_expert_prefetch.serving.activation import install

    install()
