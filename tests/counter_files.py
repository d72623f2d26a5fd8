"""Counter files of imaginary workers, in this process or in one of their own."""

from collections.abc import Sequence
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path

from vllm_expert_prefetch.metrics.counters import SUFFIX, Counters
from vllm_expert_prefetch.metrics.definitions import INDEX, INFO_LABELS

INFO = {label: f"some {label}" for label in INFO_LABELS} | {"lookahead_layers": "2"}


def labels(rank: str = "0", model_name: str = "a/model", engine: str = "0") -> dict[str, str]:
    """Labels that tell workers apart."""
    return {"model_name": model_name, "engine": engine, "rank": rank}


def make_counters(
    directory: Path, stem: str = "engine0-rank0-000000", rank: str = "0", layers: Sequence[str] = ()
) -> Counters:
    """Counters of this process."""
    return Counters(directory / f"{stem}{SUFFIX}", labels(rank), INFO, layers)


class Worker:
    """A process of its own with counters, which adds on command. Use as a context manager."""

    def __init__(self, directory: Path, stem: str = "engine0-rank0-000000", rank: str = "0") -> None:
        context = get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, directory, stem, rank), daemon=True)

    def __enter__(self) -> "Worker":
        self._process.start()
        assert self._connection.poll(60), "the worker did not start"
        self.pid = self._connection.recv()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def add(self, series: str, amount: float) -> None:
        """Add, and return when it is done; the worker goes on living."""
        self._connection.send((series, amount))
        assert self._connection.poll(60), "the worker does not answer"
        self._connection.recv()

    def kill(self) -> None:
        """SIGKILL: nothing is cleaned up."""
        self._process.kill()
        self._process.join()


def _serve(connection: Connection, directory: Path, stem: str, rank: str) -> None:
    import os

    counters = make_counters(directory, stem, rank)
    connection.send(os.getpid())
    while True:
        series, amount = connection.recv()
        counters.add(INDEX[series], amount)
        connection.send(None)
