"""A place for an engine's unix socket, in the worker's own directory."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from rbee.errors import StartError

SOCKET_NAME = "engine.sock"


def socket_place(directory: Path) -> str:
    """Return the path for a socket in a directory that is the user's alone, and remove what lies there.

    The path goes by a directory descriptor, which stays open for the life of this process: a unix socket's own
    path may have 107 bytes only. Processes of the same user can use it, too.

    Raises:
        StartError: The directory cannot be used.
    """
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        directory.chmod(0o700)
        fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(SOCKET_NAME, dir_fd=fd)
    except OSError as error:
        raise StartError(
            f"The worker's directory {directory} cannot be used: {error.strerror or error}."
        ) from error
    return f"/proc/{os.getpid()}/fd/{fd}/{SOCKET_NAME}"
