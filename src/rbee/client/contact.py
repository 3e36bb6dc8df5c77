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
        self._heard_at = time.monotonic()

    def heard(self) -> None:
        """Note a sign of life."""
        self._heard_at = time.monotonic()
        self.failures = 0
        if self._told_away:
            self._told_away = False
            if self._on_contact is not None:
                self._on_contact(True, "")

    async def wait(self, why: str, *, asked_s: float | None = None) -> bool:
        """Wait before asking again; tell of the second failure in a row. False at once when it took too long.

        Args:
            why: What went wrong, in a few words.
            asked_s: How long the server asked to be left alone.
        """
        left_s = self._heard_at + self.give_up_s - time.monotonic()
        if left_s <= 0:
            return False
        if self.failures == 1 and not self._told_away:
            self._told_away = True
            if self._on_contact is not None:
                self._on_contact(False, why)
        delay_s = reconnect_s(self.failures, asked_s=asked_s, jitter=random.random())
        self.failures += 1
        await asyncio.sleep(min(delay_s, left_s))
        return True
