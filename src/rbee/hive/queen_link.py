"""How a hive speaks to its queen: heartbeats, and batches on a road of their own."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import aiohttp
import msgspec

from rbee.client.answers import error_from, error_of, read_bounded, reason_of
from rbee.contracts.events import encode_json
from rbee.contracts.heartbeats import Cursors, Heartbeat, HeartbeatAnswer
from rbee.errors import UnavailableError
from rbee.hive.batch_road import ANSWER_BYTES_MAX, BatchRoad, Road

T = TypeVar("T")

TIMEOUT_S = 10.0
HEARTBEAT_TIMEOUT_S = 4.0  # so that three connections in a row may be dead before the hive counts as lost
BACKOFF_S = (0.05, 0.1, 0.2, 0.5, 1.0)


class QueenLink:
    """Sends to one queen. Close it."""

    def __init__(
        self,
        session: aiohttp.ClientSession,
        queen_url: str,
        hive_id: str,
        api_key: str | None,
        *,
        make_road: Callable[[str, Mapping[str, str]], Road] = BatchRoad,
    ) -> None:
        """Take a session for heartbeats, whose queen it is, and what makes the road of batches."""
        self._session = session
        self._base = f"{queen_url.rstrip('/')}/v1/hives/{hive_id}"
        self._headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
        self.queen_url = queen_url
        headers = {**self._headers, "content-type": "application/x-ndjson"}
        self._road = make_road(self._base + "/events", headers)

    def close(self) -> None:
        """Close the road; the session is somebody else's."""
        self._road.close()

    async def heartbeat(self, beat: Heartbeat) -> HeartbeatAnswer:
        """Send a heartbeat.

        Raises:
            RbeeError: What the queen refused it with; UnavailableError when she cannot be reached.
        """
        headers = {**self._headers, "content-type": "application/json"}
        timeout = aiohttp.ClientTimeout(total=HEARTBEAT_TIMEOUT_S)
        try:
            async with self._session.post(
                self._base + "/heartbeat",
                data=encode_json(beat),
                headers=headers,
                timeout=timeout,
                allow_redirects=False,
            ) as answer:
                if answer.status != 200:
                    raise await error_of(answer)
                content = await read_bounded(answer, ANSWER_BYTES_MAX)
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise self._unreachable(error) from error
        return self._decoded(content, HeartbeatAnswer)

    async def events(self, parts: Sequence[bytes]) -> dict[str, int]:
        """Send a batch; returns the cursors, the acknowledgement.

        Raises:
            RbeeError: As for `heartbeat`.
        """
        try:
            answer = await self._road.post(b"".join(parts), TIMEOUT_S)
        except (TimeoutError, OSError) as error:
            raise self._unreachable(error) from error
        if answer.status != 200:
            url = self._base + "/events"
            raise error_from(answer.status, answer.body, url=url, retry_after=answer.retry_after)
        return self._decoded(answer.body, Cursors).cursors

    def _unreachable(self, error: BaseException) -> UnavailableError:
        return UnavailableError(f"The queen at {self.queen_url} cannot be reached ({reason_of(error)}).")

    def _decoded(self, content: bytes, kind: type[T]) -> T:
        try:
            return msgspec.json.decode(content, type=kind)
        except (msgspec.MsgspecError, UnicodeDecodeError):
            raise UnavailableError(f"What answers at {self.queen_url} is no queen of this version.") from None


def backoff_s(attempt: int) -> float:
    """Return how long to wait after the failed attempt number `attempt` (from 0), with jitter."""
    return BACKOFF_S[min(attempt, len(BACKOFF_S) - 1)] * random.uniform(0.75, 1.25)
