"""Remember the ids of requests, so that asking twice starts nothing twice and a cancel may come first."""

from __future__ import annotations

from enum import Enum, auto

MAX_REMEMBERED = 100_000


class Memory(Enum):
    """What is known of an id."""

    NEW = auto()
    STARTED = auto()
    CANCELLED_BEFORE = auto()


class RequestIds:
    """The ids seen in this worker's life, the oldest forgotten beyond `limit`."""

    def __init__(self, limit: int = MAX_REMEMBERED) -> None:
        """Begin with none."""
        self._limit = limit
        self._started: dict[str, bool] = {}

    def recall(self, request_id: str) -> Memory:
        """Tell what is known of an id."""
        started = self._started.get(request_id)
        if started is None:
            return Memory.NEW
        return Memory.STARTED if started else Memory.CANCELLED_BEFORE

    def start(self, request_id: str) -> None:
        """Remember that the request was taken on."""
        self._note(request_id, started=True)

    def cancel(self, request_id: str) -> None:
        """Remember that the request is unwanted, unless it was taken on already."""
        if request_id not in self._started:
            self._note(request_id, started=False)

    def _note(self, request_id: str, *, started: bool) -> None:
        self._started[request_id] = started
        if len(self._started) > self._limit:
            del self._started[next(iter(self._started))]
