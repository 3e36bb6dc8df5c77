"""Read an append-only file that another process writes, in whole lines, and give back what was delivered."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from msgspec import Struct

from rbee.contracts.stretches import split
from rbee.processes.linux import punch_hole, require_linux

CHUNK_BYTES = 64 * 1024


class Stretch(Struct, frozen=True):
    """Bytes of a file that make up whole pieces (see `contracts.stretches`).

    Attributes:
        offset: The byte of the file they begin at.
        data: The bytes, newlines included; empty when no piece is complete yet.
        part: How many parts of the line at `offset` came before it; 0 at a line's start.
    """

    offset: int
    data: bytes
    part: int


class Loss(Struct, frozen=True):
    """What `forget` threw away: up to which offset, how many bytes and how many lines."""

    offset: int
    lost_bytes: int
    lost_lines: int


class FileFollower:
    """Follows one file from a position on. It never waits: combine it with `FileWatch`.

    The file is the memory: the position may be set back to any offset that was not acknowledged, and the same
    bytes come again, cut at the same places.
    """

    def __init__(self, path: Path, *, offset: int = 0, part: int = 0) -> None:
        """Open a file that exists.

        Args:
            path: The file.
            offset: Where a piece begins.
            part: How many parts of the line at `offset` came before it.

        Raises:
            ConfigurationError: This is not Linux.
            OSError: The file cannot be opened for reading and writing.
        """
        require_linux()
        self.path = path
        self.truncations = 0
        """How often the writer cut its file shorter; what stood there is lost, and `skip_hole` tells how much."""
        self._fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        self._position = offset
        self._part = part
        self._end: int | None = None
        self._seen = 0
        self._gone = 0
        self._block_bytes = os.fstat(self._fd).st_blksize
        self._punched = 0
        self._can_punch = True

    @property
    def open_path(self) -> Path:
        """A path that leads to this very file, wherever its name went."""
        return Path(f"/proc/self/fd/{self._fd}")

    @property
    def position(self) -> int:
        """The offset that the next `read` begins at."""
        return self._position

    @property
    def part(self) -> int:
        """How many parts of the line at `position` came before it."""
        return self._part

    @property
    def size(self) -> int:
        """The size of the file in bytes; after `seal`, the size it had then."""
        return os.fstat(self._fd).st_size if self._end is None else self._end

    @property
    def allocated_bytes(self) -> int:
        """The disk space the file really takes; all of it where nothing can be given back."""
        stat = os.fstat(self._fd)
        return stat.st_blocks * 512 if self._can_punch else stat.st_size

    @property
    def exhausted(self) -> bool:
        """Tell whether everything up to `size` was read."""
        return self._position >= self.size

    def seal(self) -> int:
        """Say that the writer is dead: fix the end at the size of this moment and return it.

        From now on `read` counts an unfinished last line, and takes nothing of what a heir of the file
        appends later. A second call changes nothing.
        """
        if self._end is None:
            self._notice_cut()
            self._end = self.size
        return self._end

    def read(self, max_bytes: int, *, final: bool = False) -> Stretch:
        """Return the complete pieces from the position on, and move the position behind them.

        Args:
            max_bytes: How much at most; one piece is returned even when it is longer (a `token` line: 1 MiB).
            final: The writer is dead: an unfinished last line counts too (implied after `seal`).

        Nothing is returned while the line at the position is unfinished, and when the position lies in a hole,
        or in what was lost when the writer cut its file: there `exhausted` is false and `skip_hole` goes on.
        Holds at most `max_bytes`, or 1 MiB + 64 KiB.
        """
        self._notice_cut()
        if self._position < self._gone:
            return Stretch(self._position, b"", self._part)
        size = max(self.size, self._position)
        end = min(size, self._next_hole(size))
        # A line that runs into a hole will never be finished: its end is the hole.
        final = final or self._end is not None or end < size
        wanted = max(1, max_bytes)
        data = self._bytes(self._position, min(wanted, end - self._position))
        taken, part = self._complete(data, final=final and self._position + len(data) >= end)
        while not taken and self._position + len(data) < end:
            more = self._bytes(self._position + len(data), min(CHUNK_BYTES, end - self._position - len(data)))
            if not more:
                break
            data += more
            taken, part = self._first(data, final=final and self._position + len(data) >= end)
        stretch = Stretch(self._position, data[:taken], self._part)
        if taken:
            self._position, self._part = self._position + taken, part
        return stretch

    def _complete(self, data: bytes, *, final: bool) -> tuple[int, int]:
        """Return how many bytes are whole pieces, and the part count behind them.

        What ends in a newline is whole however it is cut, so only the rest behind the last one has to be cut.
        """
        lines = data.rfind(b"\n") + 1
        rest = split(data[lines:], offset=lines, part=0 if lines else self._part, final=final)
        return rest.offset, rest.part

    def _first(self, data: bytes, *, final: bool) -> tuple[int, int]:
        """Return the length of the first piece, or 0, and the part count behind it."""
        found = split(data, offset=0, part=self._part, final=final)
        if len(found.pieces) < 2:
            return found.offset, found.part
        following = found.pieces[1]
        return following.offset, (following.part or 1) - 1

    def _bytes(self, offset: int, count: int) -> bytes:
        return os.pread(self._fd, count, offset) if count > 0 else b""

    def _next_hole(self, size: int) -> int:
        """Return where the data at the position ends: the size, or before it a hole."""
        if self._position >= size:
            return size
        try:
            return os.lseek(self._fd, self._position, os.SEEK_HOLE)
        except OSError as error:
            if error.errno in (errno.ENXIO, errno.EINVAL):  # cut meanwhile; no holes known here
                return size
            raise

    def _notice_cut(self) -> None:
        """Notice that the writer cut its file, which else only grows.

        What had not been read, and what was written since under offsets that were used before, is gone. The file
        is made longer than all of that, so that what is appended from now on gets offsets not yet used.
        """
        size = os.fstat(self._fd).st_size
        seen = max(self._seen, self._position)
        if size >= seen or self._end is not None:
            self._seen = size
            return
        gone = seen + size if self._seen >= self._position else seen  # what we have not seen, others read
        try:
            os.posix_fallocate(self._fd, gone - 1, 1)  # never cuts what the writer appends meanwhile
        except OSError as error:
            if error.errno == errno.EBADF:
                raise
            return  # no room, say: the next look tries again
        self.truncations += 1
        self._seen, self._gone = gone, gone if gone > self._position else self._gone

    def acknowledge(self, offset: int, *, part: int = 0) -> None:
        """Take everything below `offset` as delivered: give its blocks back, and never read it again.

        Args:
            offset: The first byte that is still needed.
            part: The part count there, where it is known; used when the position was behind.
        """
        if offset > self._position:
            self._position, self._part = offset, part
        self._give_back(offset)

    def _give_back(self, offset: int) -> None:
        # Only whole blocks: in a half one the kernel would write zeros that no reader can tell from data.
        end = min(offset, os.fstat(self._fd).st_size) // self._block_bytes * self._block_bytes
        if not self._can_punch or end <= self._punched:
            return
        try:
            punch_hole(self._fd, self._punched, end - self._punched)
        except OSError as error:
            if error.errno in (errno.EOPNOTSUPP, errno.ENOSYS):
                self._can_punch = False
            elif error.errno == errno.EBADF:
                raise
            # Else the blocks stay, and the next acknowledgement tries again: it is room that is lost, not words.
        else:
            self._punched = end

    def rewind(self, offset: int, *, part: int = 0) -> None:
        """Set the position to `offset`; call `skip_hole` next when it may have been acknowledged before."""
        self._position, self._part = offset, part

    def skip_hole(self) -> int:
        """Move a position in a hole, or in what a cut took, behind that; return how many bytes are lost."""
        if lost := max(0, self._gone - self._position):
            self._position, self._part = self._gone, 0
            return lost
        size = self.size
        if self._position >= size:
            return 0
        try:
            data_at = min(size, os.lseek(self._fd, self._position, os.SEEK_DATA))
        except OSError as error:
            if error.errno == errno.EINVAL:  # this file system knows of no holes
                return 0
            if error.errno != errno.ENXIO:  # ENXIO: nothing but hole up to the end
                raise
            data_at = size
        lost = data_at - self._position
        if lost:
            self._position, self._part = data_at, 0
        return lost

    def forget(self, start: int, until: int) -> Loss:
        """Throw away what was not delivered, from `start` to the end of the line at `until`, and count it.

        The loss ends behind a newline, so that what follows begins with a whole line; without one, at the end
        of the file. The position moves there if it was behind.
        """
        size = self.size
        offset, lines, done = start, 0, start >= size
        while not done:
            data = self._bytes(offset, min(CHUNK_BYTES, size - offset))
            newline = data.find(b"\n", max(0, until - offset)) if until < offset + len(data) else -1
            taken = newline + 1 or len(data)
            lines += data.count(b"\n", 0, taken)
            offset += taken
            done = newline >= 0 or not data or offset >= size
        self.acknowledge(offset)
        return Loss(offset, offset - start, lines)

    def begins_line(self, offset: int) -> bool:
        """Tell whether a line is known to begin at an offset; right behind a hole none is."""
        return offset == 0 or self._bytes(offset - 1, 1) == b"\n"

    def tail(self, max_bytes: int) -> bytes:
        """Return the last lines that were not read yet, at most so many bytes, and leave the position alone.

        It begins where a line does. Where blocks were given back there are zeros. It works also when the file was
        removed.
        """
        size = self.size
        start = max(self._position, size - max_bytes)
        if start == self._position and self.begins_line(start):
            return self._bytes(start, size - start)
        return self._bytes(start - 1, size - start + 1).partition(b"\n")[2]

    def close(self) -> None:
        """Close the file. A second call does nothing."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
