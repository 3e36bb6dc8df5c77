"""Count what a request used, from whatever the engine's chunks say about it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

Clock = Callable[[], float]


class Tally:
    """What the closing line of one request says in numbers; None where nobody told.

    The engine's `timings` come first; `usage` where there are none; for an answer that was broken off before
    either came, what was counted on the way.

    Attributes:
        finish_reason: Why the engine stopped, in its dialect's word.
        frames: How many token lines were written; None for a relayed request.
    """

    def __init__(self, choices: int = 1, clock: Clock = time.monotonic) -> None:
        """Start the clock; `choices` is how many answers are made of one prompt (`n`)."""
        self._clock = clock
        self.choices = max(1, choices)
        self._started_s = clock()
        self._first_s: float | None = None
        self._last_s = self._started_s
        self._by_choice: dict[int, Mapping[str, Any]] = {}
        self._closed: list[Mapping[str, Any]] = []
        self._usage: dict[str, Any] = {}
        self._deltas = 0
        self.finish_reason: str | None = None
        self.frames: int | None = None

    def note_arrival(self) -> None:
        """Note that something of the answer has come just now."""
        self._last_s = self._clock()
        if self._first_s is None:
            self._first_s = self._last_s

    def note_delta(self) -> None:
        """Note that a chunk added text, which is a token at least."""
        self._deltas += 1

    def observe(self, chunk: Mapping[str, Any]) -> None:
        """Take what a chunk says about use and ending."""
        choices = chunk.get("choices")
        choice = choices[0] if isinstance(choices, list) and choices else {}
        timings = chunk.get("timings")
        if isinstance(timings, dict):
            if choices == []:
                self._closed.append(timings)  # the chunk that carries the usage has no index
            else:
                self._by_choice[choice.get("index", 0)] = timings
        self._note_usage(chunk)
        self._note_finish(chunk, choice)

    def _note_usage(self, chunk: Mapping[str, Any]) -> None:
        for holder in (chunk, chunk.get("response"), chunk.get("message")):
            usage = holder.get("usage") if isinstance(holder, dict) else None
            if isinstance(usage, dict):
                self._usage |= {key: value for key, value in usage.items() if isinstance(value, int)}

    def _note_finish(self, chunk: Mapping[str, Any], choice: Mapping[str, Any]) -> None:
        response, delta = chunk.get("response"), chunk.get("delta")
        found: Any = choice.get("finish_reason")
        if found is None and isinstance(delta, dict):
            found = delta.get("stop_reason")
        if found is None and isinstance(response, dict) and response.get("status") != "in_progress":
            found = response.get("status")
        if isinstance(found, str):
            self.finish_reason = found

    @property
    def _timings(self) -> list[Mapping[str, Any]]:
        return self._closed or list(self._by_choice.values())

    @property
    def prompt_tokens(self) -> int | None:
        """Tokens of the prompt, those found in the cache too; counted once for all its answers."""
        if self._timings:
            total = sum(one.get("cache_n", 0) + one.get("prompt_n", 0) for one in self._timings)
            return int(total) // min(max(1, self.choices), len(self._timings))
        if "prompt_tokens" in self._usage:
            return int(self._usage["prompt_tokens"])
        if "input_tokens" in self._usage:
            return int(self._usage["input_tokens"]) + int(self._usage.get("cache_read_input_tokens", 0))
        return None

    @property
    def completion_tokens(self) -> int | None:
        """Tokens generated so far, over all answers."""
        timings = self._timings
        if timings:
            return int(sum([one.get("predicted_n", 0) for one in timings]))
        for name in ("completion_tokens", "output_tokens"):
            if self._usage.get(name):
                return int(self._usage[name])
        is_told = "completion_tokens" in self._usage or "output_tokens" in self._usage
        return self._deltas or (0 if is_told else None)

    @property
    def time_to_first_token_s(self) -> float | None:
        """Seconds from the request to the first bytes of its answer."""
        return None if self._first_s is None else round(self._first_s - self._started_s, 6)

    @property
    def tokens_per_s(self) -> float | None:
        """Tokens generated a second after the first, over all answers."""
        rates = [float(one.get("predicted_per_second") or 0) for one in self._timings]
        if any(rates):
            return round(sum(rates), 3)
        tokens, first_s = self.completion_tokens, self._first_s
        if first_s is None or tokens is None or tokens < 2 or self._last_s <= first_s:
            return None
        return round((tokens - 1) / (self._last_s - first_s), 3)

    def fields(self) -> dict[str, Any]:
        """Return the numbers by the names they have in the closing line."""
        numbers: dict[str, Any] = {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "time_to_first_token_s": self.time_to_first_token_s,
            "tokens_per_s": self.tokens_per_s,
            "finish_reason": self.finish_reason,
        }
        return numbers if self.frames is None else {**numbers, "frames": self.frames}
