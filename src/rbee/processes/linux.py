"""What the kernel is asked for directly: the check that this is Linux, and the C library."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable
from functools import cache
from typing import cast

from rbee.errors import ConfigurationError


def require_linux() -> None:
    """Refuse to go on anywhere but on Linux.

    Raises:
        ConfigurationError: This is another system.
    """
    if sys.platform != "linux":
        raise ConfigurationError(
            f"Processes can be started and watched on Linux only, and this is {sys.platform}.",
            remedy="Run the hive on Linux (WSL2 is fine); the keeper and the client run here.",
        )


@cache
def libc() -> ctypes.CDLL:
    """Return the C library of this process, with the types of the calls made here declared."""
    library = ctypes.CDLL(None, use_errno=True)
    library.inotify_add_watch.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_uint32]
    library.inotify_rm_watch.argtypes = [ctypes.c_int, ctypes.c_int]
    return library


@cache
def _fallocate() -> Callable[[int, int, int, int], int]:
    call = getattr(libc(), "fallocate64", None) or libc().fallocate
    call.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
    return cast("Callable[[int, int, int, int], int]", call)


def checked(result: int, about: str | None = None) -> int:
    """Return what a C call returned, or raise the OSError it left in errno."""
    if result >= 0:
        return result
    number = ctypes.get_errno()
    raise OSError(number, os.strerror(number), about)


def punch_hole(fd: int, offset: int, length: int) -> None:
    """Give the blocks of a range back; the range then reads as a hole and the size stays.

    Raises:
        OSError: The file system cannot do it (ENOTSUP), or could not now.
    """
    keep_size, punch = 0x01, 0x02
    checked(_fallocate()(fd, keep_size | punch, offset, length))
