"""One model, several ways to serve it, compared on the machine at hand: servers, load, rounds, a verdict."""


class BenchError(RuntimeError):
    """A comparison that cannot be made. The message names the flag and the remedy."""
