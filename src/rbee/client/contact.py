"""Bear with a server that is away: how long to wait, when to tell, when to give up."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable

import aiohttp

from rbee.client.retry import reconnect_s

GIVE_UP_S = 120.0

OnContact = Callable[[bool, str], None]
"""Told `(False, why)` once when the server stays away, and `(True, "")` once when it is back."""

BROKEN = (aiohttp.ClientError, TimeoutError, OSError)
"""What asking fails with where there is no answer, or none that is understood."""

LOST = (aiohttp.ClientConnectionError, aiohttp.ClientPayloadError, TimeoutError, OSError)
"""What it fails with when the connection broke, or cannot be made."""

NOBODY_THERE = (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError)
"""What it fails with when nobody could be connected to."""


class Contact:
    """What one reader or caller knows of its server being there.

    Args:
        give_up_s: How long to go on without any sign of life.
        on_contact: Told when the server is away and when it is back.
    """

    def __init__(self, *, give_up_s: float = GIVE_UP_S, on_contact: OnContact | None = None) -> None:
        self.give_up_s = give_up_s
        self.failures = 0
        self._on_contact = on_contact
        self._told_away = False
        self._away_since: float | None = None

    def heard(self, *, is_progress: bool = True) -> None:
        """Note a sign of life; where it brought nothing new, the waits do not begin to grow anew."""
        self._away_since = None
        if is_progress:
            self.failures = 0
        if self._told_away:
            self._told_away = False
            if self._on_contact is not None:
                self._on_contact(True, "")

    async def wait(self, why: str, *, asked_s: float | None = None) -> bool:
        """Wait before asking again; tell of the second failure in a row. False at once when it took too long.

        The time runs from the first failure on: one who was busy, or stopped, since the last sign of life is not
        told that the server was silent.

        Args:
            why: What went wrong, in a few words.
            asked_s: How long the server asked to be left alone.
        """
        now = time.monotonic()
        if self._away_since is None:
            self._away_since = now
        left_s = self._away_since + self.give_up_s - now
        if left_s <= 0:
            return False
        if self.failures >= 1 and not self._told_away:
            self._told_away = True
            if self._on_contact is not None:
                self._on_contact(False, why)
        delay_s = reconnect_s(self.failures, asked_s=asked_s, jitter=random.random())
        self.failures += 1
        await asyncio.sleep(min(delay_s, left_s))
        return True
