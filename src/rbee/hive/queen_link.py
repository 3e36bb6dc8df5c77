"""How a hive speaks to its queen: heartbeats and batches over one session, tried again with back-off."""

from __future__ import annotations

import io
import random
from collections.abc import Sequence
from typing import TypeVar

import aiohttp
import msgspec

from rbee.client.answers import error_of, read_bounded, reason_of
from rbee.contracts.events import encode_json
from rbee.contracts.heartbeats import Cursors, Heartbeat, HeartbeatAnswer
from rbee.errors import UnavailableError

T = TypeVar("T")

TIMEOUT_S = 10.0
HEARTBEAT_TIMEOUT_S = 4.0  # so that three connections in a row may be dead before the hive counts as lost
BACKOFF_S = (0.05, 0.1, 0.2, 0.5, 1.0)
ANSWER_BYTES_MAX = 4 * 1024 * 1024


class QueenLink:
    """Sends to one queen."""

    def __init__(self, session: aiohttp.ClientSession, queen_url: str, hive_id: str, api_key: str | None) -> None:
        self._session = session
        self._base = f"{queen_url.rstrip('/')}/v1/hives/{hive_id}"
        self._headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
        self.queen_url = queen_url

    async def heartbeat(self, beat: Heartbeat) -> HeartbeatAnswer:
        """Send a heartbeat.

        Raises:
            RbeeError: What the queen refused it with; UnavailableError when she cannot be reached.
        """
        return await self._post(
            "/heartbeat", encode_json(beat), "application/json", HeartbeatAnswer, HEARTBEAT_TIMEOUT_S
        )

    async def events(self, parts: Sequence[bytes]) -> dict[str, int]:
        """Send a batch; returns the cursors, the acknowledgement.

        Raises:
            RbeeError: As for `heartbeat`.
        """
        body = b"".join(parts)
        return (await self._post("/events", body, "application/x-ndjson", Cursors, TIMEOUT_S)).cursors

    async def _post(self, path: str, body: bytes, media: str, kind: type[T], timeout_s: float) -> T:
        headers = {**self._headers, "content-type": media}
        timeout = aiohttp.ClientTimeout(total=timeout_s)
        try:
            async with self._session.post(
                self._base + path, data=io.BytesIO(body), headers=headers, timeout=timeout, allow_redirects=False
            ) as answer:
                if answer.status != 200:
                    raise await error_of(answer)
                content = await read_bounded(answer, ANSWER_BYTES_MAX)
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise UnavailableError(
                f"The queen at {self.queen_url} cannot be reached ({reason_of(error)})."
            ) from error
        try:
            return msgspec.json.decode(content, type=kind)
        except (msgspec.MsgspecError, UnicodeDecodeError):
            raise UnavailableError(f"What answers at {self.queen_url} is no queen of this version.") from None


def backoff_s(attempt: int) -> float:
    """Return how long to wait after the failed attempt number `attempt` (from 0), with jitter."""
    return BACKOFF_S[min(attempt, len(BACKOFF_S) - 1)] * random.uniform(0.75, 1.25)
