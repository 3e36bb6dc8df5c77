"""What a source of models promises."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from msgspec import Struct

from rbee.contracts.models import ModelRef
from rbee.hive.sources.partial_file import PartialFile

Progress = Callable[[int, int | None], None]
"""Called on the event loop with the bytes that are done and, where it is known, of how many."""


class Fetched(Struct, frozen=True, kw_only=True):
    """What a source says about the file it wrote.

    Attributes:
        origin: Where the file is from, for people: a wheel's name, or a hub's repository and file.
        sha256: The digest the file must have; None when the source does not know it.
    """

    origin: str
    sha256: str | None


class Source(Protocol):
    """One place that model files come from."""

    async def fetch(self, ref: ModelRef, into: PartialFile, progress: Progress) -> Fetched:
        """Write the model's file into `into`.

        It goes on with what an earlier download left there where it can (`into.take_up`), else begins anew
        (`into.restart`). The digest is the caller's to compare. Whatever else is written goes to
        `into.work_directory`, which the caller removes.

        Raises:
            ModelNotFoundError: The source is there but does not have the model.
            InvalidRequestError: The reference fits several files, or one of a kind that is not supported.
            DownloadFailedError: It could not be fetched; `retryable` says whether trying again can help.

        Cancellation: takes effect within some seconds; no process and no open file is left behind.
        """
        ...


def ignore_progress(done_bytes: int, total_bytes: int | None) -> None:
    """Take no notice of how far a download is."""
