"""How many prompt tokens a step may take beside sequences that decode: as many as keep it within a time."""

LEAST_TOKENS = 16
_FIRST_HOLD, _LONGEST_HOLD = 64, 4096
"""In steps."""


class PromptLimit:
    """A limit that doubles while steps of so many prompt tokens take less than `seconds`, and halves where they do not.

    Steps with prompts tell what they took: nothing is computed from bandwidths. What a step costs hardly grows with
    its tokens while copies are the larger part, so that only a try tells. A limit that was too high is tried again
    after 64 steps, then after twice as many each time.
    """

    def __init__(self, seconds: float, most: int) -> None:
        """`most`: tokens of a step in all, as vLLM has it."""
        self._seconds = seconds
        self._limits = [LEAST_TOKENS]
        while self._limits[-1] * 2 < most:
            self._limits.append(self._limits[-1] * 2)
        self._limits.append(most)
        self._at = 0
        self._was_too_slow = False
        self._num_steps = 0
        self._holds = [_FIRST_HOLD] * len(self._limits)
        self._closed_until = [0] * len(self._limits)

    @property
    def tokens(self) -> int:
        """Prompt tokens that the next step may take."""
        return self._limits[self._at]

    def note(self, num_prompt_tokens: int, seconds: float) -> None:
        """A step with decodes and so many prompt tokens has taken so long. Too long counts when it happens twice in a
        row, or at the first step of a limit."""
        self._num_steps += 1
        if num_prompt_tokens < self.tokens:
            return
        if seconds <= self._seconds:
            self._was_too_slow = False
            self._try_more()
        elif self._was_too_slow and self._at:
            self._closed_until[self._at] = self._num_steps + self._holds[self._at]
            self._holds[self._at] = min(2 * self._holds[self._at], _LONGEST_HOLD)
            self._at -= 1
            self._was_too_slow = False
        else:
            self._was_too_slow = True

    def _try_more(self) -> None:
        above = self._at + 1
        if above < len(self._limits) and self._num_steps >= self._closed_until[above]:
            self._at, self._was_too_slow = above, True
