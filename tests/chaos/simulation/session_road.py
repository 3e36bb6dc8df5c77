"""The road of batches through the network in memory."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

import aiohttp

from rbee.client.answers import read_bounded
from rbee.hive.batch_road import ANSWER_BYTES_MAX, Answer


class SessionRoad:
    """Brings each body by a request of a session."""

    def __init__(self, session: aiohttp.ClientSession, url: str, headers: Mapping[str, str]) -> None:
        self._session = session
        self._url = url
        self._headers = headers

    async def post(self, body: bytes, timeout_s: float) -> Answer:
        """Send a body and return the answer."""
        try:
            async with (
                asyncio.timeout(timeout_s),
                self._session.post(self._url, data=body, headers=self._headers) as response,
            ):
                return Answer(response.status, await read_bounded(response, ANSWER_BYTES_MAX))
        except aiohttp.ClientError as error:
            raise ConnectionError(str(error)) from error

    def close(self) -> None:
        """Keep nothing."""
