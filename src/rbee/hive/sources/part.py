"""What a part of a model file is a part of: written beside it, so that another download can go on with it."""

from __future__ import annotations

from pathlib import Path

import msgspec
from msgspec import Struct

from rbee.contracts.home import write_whole

PART_FILE = "part.json"
PART_FILE_BYTES_MAX = 64 * 1024


class Part(Struct, frozen=True, kw_only=True):
    """The whole file that is being downloaded, as its source tells of it.

    Attributes:
        ref: The model's reference.
        origin: Where the file is from, as the source names it.
        size_bytes: How large it will be; None where that is not told.
        sha256: The digest it will have; None where that is not told.
        etag: The server's word for this very version of it.
        machine_boot_id: The start of the machine on which it was begun.
    """

    ref: str
    origin: str
    size_bytes: int | None
    sha256: str | None
    etag: str | None = None
    machine_boot_id: str = ""

    def can_go_on(self, kept: Part) -> bool:
        """Tell whether bytes that were kept of an earlier download are bytes of this file.

        With a digest the end decides. Without one the server has to say that its version is the same (`etag`),
        and bytes from before a power failure are not trusted: nothing would show that they were lost.
        """
        if (self.ref, self.origin, self.size_bytes, self.sha256) != (
            kept.ref,
            kept.origin,
            kept.size_bytes,
            kept.sha256,
        ):
            return False
        return self.sha256 is not None or (is_strong(kept.etag) and kept.machine_boot_id == self.machine_boot_id)


def is_strong(etag: str | None) -> bool:
    """Tell whether a server's word for a version changes with every byte of it."""
    return bool(etag) and not str(etag).startswith("W/")


def read_part(path: Path) -> Part | None:
    """Read what was written down of a part; None when there is nothing that can be used."""
    try:
        with path.open("rb") as file:
            return msgspec.json.decode(file.read(PART_FILE_BYTES_MAX), type=Part)
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError):
        return None


def write_part(path: Path, part: Part) -> None:
    """Write down what a part belongs to, whole."""
    write_whole(path, msgspec.json.encode(part) + b"\n")
