"""Ghost caches, which count what more slots would give, in a worker that starts."""

from vllm_expert_prefetch.cache.base import Caches
from vllm_expert_prefetch.config import CONFIG_KEY, GHOST_SCALES, ConfigError
from vllm_expert_prefetch.serving import compat


def add_ghosts(caches: Caches | None) -> None:
    """Beside a worker's `caches`; None where every expert is resident, and nothing is counted.

    Raises ConfigError where the platform cannot plan for them.
    """
    if caches is None:
        compat.logger().warning("expert_prefetch: ghost_caches counts nothing: every expert has a slot")
        return
    try:
        caches.add_ghosts([float(scale) for scale in GHOST_SCALES])
    except ValueError as error:
        raise ConfigError(f"{CONFIG_KEY}: ghost_caches cannot be planned here, set it to false: {error}") from error
