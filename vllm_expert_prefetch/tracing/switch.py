"""The switch of one worker's recording: on and off while it serves, between two steps."""

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from vllm_expert_prefetch.tracing.card import TraceError
from vllm_expert_prefetch.tracing.folder import MB, TraceFolder
from vllm_expert_prefetch.tracing.recorder import Recorder

_WAIT_SECONDS = 60
Answer = dict[str, Any]


class TraceSwitch:
    """Starts and stops recordings. `begin_step` and `end_step` belong to the thread that serves.

    A request that comes amid a step waits for its end.
    """

    def __init__(
        self, record: Callable[[TraceFolder, bool], Recorder], attach: Callable[[Recorder | None], None]
    ) -> None:
        """`record` makes a recorder, of gate weights as well or not, or raises TraceError; `attach` gives it to every
        layer, None takes it away."""
        self._record, self._attach = record, attach
        self._recorder: Recorder | None = None
        self._lock = threading.Lock()
        self._is_in_step = False
        self._requests: list[Callable[[], None]] = []
        self._sequences = (0, 0)
        self._tokens: Sequence[tuple[str, int]] = ()
        self.stop_answering: Callable[[], None] = lambda: None
        """Ends the control socket, where there is one."""

    def begin_step(self, prefilling: int, decoding: int) -> None:
        """A step starts with so many sequences in their prompt, and so many beyond their first token."""
        with self._lock:
            self._is_in_step = True
            self._sequences, self._tokens = (prefilling, decoding), ()

    @property
    def is_recording(self) -> bool:
        """Whether the routing of this step is kept."""
        return self._recorder is not None

    def note_tokens(self, tokens: Sequence[tuple[str, int]], finished: Iterable[str]) -> None:
        """The step has so many `tokens` of each request, in this order; requests that had `finished` before are not
        among them."""
        self._tokens, recorder = tokens, self._recorder
        if recorder is not None:
            recorder.forget(finished)

    def end_step(self, seconds: float) -> None:
        """The step is over."""
        with self._lock:
            self._is_in_step = False
            if self._recorder is not None:
                self._recorder.end_step(*self._sequences, seconds, self._tokens)
                if self._recorder.folder.problem is not None:
                    self._stop()
            while self._requests:
                self._requests.pop()()

    def start(self, directory: Path, limit_mb: int, with_weights: bool = False) -> Answer:
        """Record into a folder of its own in `directory`, `with_weights` of the gates or without.

        Raises TraceError where one runs, or none can be written.
        """
        if self._recorder is not None:
            raise TraceError(f"{self._recorder.folder.path} is being recorded: stop it first")
        folder = TraceFolder(directory, limit_mb * MB)
        try:
            self._recorder = self._record(folder, with_weights)
        except TraceError:
            folder.close()
            raise
        self._attach(self._recorder)
        return self.status()

    def status(self) -> Answer:
        """What is recorded, and how much of it there is."""
        if self._recorder is None:
            return {"recording": None}
        own = self._recorder
        return {"recording": str(own.folder.path), "steps": own.num_steps, "dropped_steps": own.num_dropped}

    def answer(self, request: Mapping[str, Any]) -> Answer:
        """What a request comes to: `{"do": "start", "directory": ..., "limit_mb": ..., "weights": ...}`, `stop` or
        `status`.

        Called by another thread than the one that serves.
        """
        kinds: dict[str, Callable[[], Answer]] = {
            "start": lambda: self.start(
                Path(request["directory"]), int(request["limit_mb"]), bool(request.get("weights"))
            ),
            "stop": self._stop,
            "status": self.status,
        }
        do = kinds.get(str(request.get("do")))
        return {"error": f"unknown request {request.get('do')!r}"} if do is None else self._between_steps(do)

    def close(self) -> None:
        """The server ends: write what there is, and answer no more."""
        self.stop_answering()
        if self._recorder is not None:
            self._stop()

    def _between_steps(self, do: Callable[[], Answer]) -> Answer:
        found: Answer = {}
        is_done = threading.Event()

        def act() -> None:
            try:
                found.update(do())
            except (TraceError, KeyError, ValueError) as error:
                found["error"] = str(error)
            is_done.set()

        with self._lock:
            if self._is_in_step:
                self._requests.append(act)
            else:
                act()
        if not is_done.wait(_WAIT_SECONDS):
            return {"error": f"the server has been in one step for {_WAIT_SECONDS} seconds"}
        return found

    def _stop(self) -> Answer:
        own, answer = self._recorder, self.status()
        if own is None:
            return answer
        self._attach(None)
        self._recorder = None
        own.finish()
        return answer | ({"error": own.folder.problem} if own.folder.problem else {})
