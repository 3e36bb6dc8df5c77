"""Waiting for the end of one answer: its closing line, its worker's death, a standstill, a lost hive."""

from __future__ import annotations

import asyncio
from typing import Any

from rbee.contracts.states import HiveState
from rbee.errors import DeadlineExceededError, HiveLostError, RbeeError, WorkerLostError, error_classes
from rbee.queen.hives import HiveBook
from rbee.queen.settings import QueenSettings
from rbee.queen.worker_api import WorkerApi
from rbee.queen.workers import Placement

LOOK_EVERY_S = 1.0
CLOSING_S = 2.0


class Answering:
    """Watches over placed jobs."""

    def __init__(self, settings: QueenSettings, book: HiveBook, worker_api: WorkerApi) -> None:
        self._settings = settings
        self._book = book
        self._worker_api = worker_api

    async def closing(self, placement: Placement) -> dict[str, Any]:
        """Wait for the fields of the closing line of a kept answer.

        Timers stand still while the hive is not live: a hive that is stopped does not make an answer stalled.

        Raises:
            WorkerLostError: The worker ended.
            HiveLostError: Its hive was silent for `hive_timeout_s`.
            DeadlineExceededError: No token came for too long (reason `stalled`).
        """
        moved_at = asyncio.get_running_loop().time()
        while True:
            done, _ = await asyncio.wait({placement.closing}, timeout=LOOK_EVERY_S)
            if done:
                return placement.closing.result()
            moved_at = self._check_alive(placement, max(moved_at, placement.heard_at))

    def _check_alive(self, placement: Placement, moved_at: float) -> float:
        """Return since when nothing has moved; raises when that is too long ago."""
        now = asyncio.get_running_loop().time()
        try:
            hive = self._book.hive(placement.hive_id)
        except RbeeError:
            return moved_at
        if self._book.state_of(hive) is not HiveState.LIVE:
            silent_s = self._book.silent_s(hive)
            if silent_s >= self._settings.hive_timeout_s:
                raise HiveLostError(f"The hive {hive.hive_id} has been silent for {silent_s:.0f} s.")
            return now
        limit_s = self._settings.stall_s if placement.heard_at else self._settings.first_token_s
        if now - moved_at > limit_s:
            raise DeadlineExceededError(f"The worker said no token for {limit_s:g} s.", reason="stalled")
        return moved_at

    async def stop(self, placement: Placement, correlation_id: str) -> None:
        """Stop a kept answer and wait for its closing line, within `stop_grace_s`."""
        await self._worker_api.stop(placement, correlation_id)
        await asyncio.wait({placement.closing}, timeout=self._settings.stop_grace_s)

    async def relayed_closing(self, placement: Placement) -> dict[str, Any] | None:
        """Wait for the closing line of a relayed answer whose bytes have all come; None when it stays out."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + CLOSING_S
        while loop.time() < deadline:
            done, _ = await asyncio.wait({placement.closing}, timeout=LOOK_EVERY_S)
            if done:
                return placement.closing.result() if placement.closing.exception() is None else None
            try:
                hive = self._book.hive(placement.hive_id)
            except RbeeError:
                return None
            if self._book.state_of(hive) is HiveState.STALE:
                deadline = loop.time() + CLOSING_S
        return None

    async def true_cause(self, placement: Placement, error: WorkerLostError) -> RbeeError:
        """Replace `cannot be reached` by how the worker really ended, when its hive tells in time."""
        done, _ = await asyncio.wait({placement.closing}, timeout=self._settings.hive_lost_s)
        if done:
            told = placement.closing.exception()
            if isinstance(told, RbeeError):
                return told
        return error


def failure_of(fields: dict[str, Any]) -> RbeeError | None:
    """Make the error of a closing line whose outcome is `failed`; None for another outcome."""
    if fields.get("outcome") != "failed":
        return None
    body = fields.get("error") or {}
    cls = error_classes().get(str(body.get("code")), RbeeError)
    return cls(str(body.get("message") or "The worker could not answer."), remedy=body.get("remedy"))
