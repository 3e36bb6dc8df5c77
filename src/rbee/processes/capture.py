"""Run any program and follow what it says: its narration as events, everything else as lines."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
import uuid
from collections import deque
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import msgspec
from msgspec import Struct

from rbee.contracts.events import decode_source_line
from rbee.contracts.stretches import Piece, split
from rbee.narration import parse_bracket
from rbee.processes.child import Child, ExitStatus
from rbee.processes.follower import CHUNK_BYTES, FileFollower
from rbee.processes.linux import require_linux
from rbee.processes.procfs import Marker
from rbee.processes.spawn import ProcessSpec, spawn
from rbee.processes.tree import StopReport, stop_tree
from rbee.processes.watch import FileWatch

STOP_GRACE_S = 10.0
_LOOK_AGAIN_S = 60.0

Stream = Literal["stdout", "stderr"]


class CapturedEvent(Struct, frozen=True):
    """Something the program narrated.

    Attributes:
        stream: Where it said it.
        offset: The byte of that stream's file it begins at.
        event: The event as a dictionary, with the capture's ids where the program gave none.
        parsed: It was written in the bracket form, `[actor] action: message`.
    """

    stream: Stream
    offset: int
    event: dict[str, Any]
    parsed: bool


class CapturedLine(Struct, frozen=True):
    """Something else the program printed.

    Attributes:
        stream: Where it was printed.
        offset: The byte of that stream's file it begins at.
        text: The line without its end; bytes that are no UTF-8 became U+FFFD.
        part: None for a whole line; 1, 2, … for the parts of one over 16 KiB.
        claimed: It is an event in the name of a job that is not the capture's, and not to be trusted.
    """

    stream: Stream
    offset: int
    text: str
    part: int | None = None
    claimed: bool = False


class ProcessNarrationCapture:
    """Starts programs on behalf of a job and hands out what they say.

    The program writes to two files, not to pipes, so it is never held up by its reader and never dies of a
    missing one, and nothing it wrote is lost when it is killed.

    Example:
        ```python
        import asyncio, sys
        from rbee.processes import CapturedEvent, ProcessNarrationCapture

        async def main() -> None:
            capture = ProcessNarrationCapture(job_id="job-1")
            program = "print('[cook] cook_taste: Needs salt')"
            async with await capture.spawn([sys.executable, "-c", program]) as process:
                async for item in process.events():
                    if isinstance(item, CapturedEvent):
                        print(item.event["job_id"], item.event["message"])
                print((await process.wait()).describe())

        asyncio.run(main())
        ```
    """

    def __init__(
        self,
        job_id: str | None = None,
        correlation_id: str | None = None,
        directory: Path | None = None,
        env: Mapping[str, str] | None = None,
        *,
        marker: Marker | None = None,
    ) -> None:
        """Say for whom and with what programs are started.

        Args:
            job_id: The job they work for: `JOB_ID` of their environment, and of what they narrate without one.
            correlation_id: The same for `CORRELATION_ID`.
            directory: Where `stdout` and `stderr` are kept, one process at a time; a temporary one when None.
            env: Their whole environment (but for these ids); ours when None.
            marker: A variable of that environment, with its value, by which a process that left its parents
                is found when the tree is stopped; one is made when None.
        """
        require_linux()
        self.job_id = job_id
        self.correlation_id = correlation_id
        self.directory = directory
        self.env = env
        self.marker = marker
        self._last: CapturedProcess | None = None

    async def spawn(
        self, command: Sequence[str], *, env: Mapping[str, str] | None = None, cwd: Path | None = None
    ) -> CapturedProcess:
        """Start a program; its output is read only when it is asked for.

        Args:
            command: The program and its arguments.
            env: Its whole environment, instead of the capture's.
            cwd: The directory it starts in.

        Raises:
            StartError: The program cannot be started; it says why.
            RuntimeError: Not called from the main thread, or the directory's last process still runs.
        """
        if self.directory is not None and self._last is not None and self._last.child.poll() is None:
            raise RuntimeError(f"Process {self._last.child.pid} still writes to {self.directory}.")
        marker = self.marker or ("RBEE_CAPTURE_ID", uuid.uuid4().hex)
        directory = self.directory or Path(tempfile.mkdtemp(prefix="rbee-capture-"))
        temporary = directory if self.directory is None else None
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            process = self._start(command, self._environment(env, marker), cwd, directory, marker)
        except BaseException:
            if temporary is not None:
                shutil.rmtree(temporary)
            raise
        process.temporary = temporary
        self._last = process
        return process

    def _environment(self, env: Mapping[str, str] | None, marker: Marker) -> dict[str, str]:
        base = env if env is not None else self.env if self.env is not None else os.environ
        ids = {"JOB_ID": self.job_id, "CORRELATION_ID": self.correlation_id}
        kept = {name: value for name, value in base.items() if name not in ids}
        given = {name: value for name, value in ids.items() if value is not None}
        return {"PYTHONUNBUFFERED": "1", **kept, marker[0]: marker[1], **given}

    def _start(
        self,
        command: Sequence[str],
        env: Mapping[str, str],
        cwd: Path | None,
        directory: Path,
        marker: Marker,
    ) -> CapturedProcess:
        paths = directory / "stdout", directory / "stderr"
        sizes = [path.stat().st_size if path.exists() else 0 for path in paths]
        child = spawn(ProcessSpec(command=tuple(command), env=env, cwd=cwd, stdout=paths[0], stderr=paths[1]))
        stdout, stderr = (FileFollower(path, offset=size) for path, size in zip(paths, sizes, strict=True))
        return CapturedProcess(
            child, stdout, stderr, job_id=self.job_id, correlation_id=self.correlation_id, marker=marker
        )


class CapturedProcess:
    """One program whose output is captured. Use it as an async context manager, or `aclose` it.

    Leaving the context stops the program with everything it started, and removes a temporary directory.
    """

    def __init__(
        self,
        child: Child,
        stdout: FileFollower,
        stderr: FileFollower,
        *,
        job_id: str | None = None,
        correlation_id: str | None = None,
        marker: Marker | None = None,
    ) -> None:
        """Put together what `ProcessNarrationCapture.spawn` made, or what was found of an adopted process."""
        self.child = child
        self.stdout = stdout
        self.stderr = stderr
        self.job_id = job_id
        self.correlation_id = correlation_id
        self.marker = marker
        self.lost_bytes = 0
        """How much of its output `events` could not read: the program cut its files, or left holes in them."""
        self.temporary: Path | None = None
        """The directory to remove at the end, made only when none was given."""
        self._unread: deque[tuple[Stream, Piece]] = deque()

    async def wait(self) -> ExitStatus:
        """Wait for the program to end and return how."""
        return await self.child.wait()

    async def stop(self, grace_s: float = STOP_GRACE_S) -> StopReport:
        """Stop the program and everything it started; see `stop_tree`."""
        return await stop_tree(self.child, marker=self.marker, grace_s=grace_s)

    async def events(self) -> AsyncIterator[CapturedEvent | CapturedLine]:
        """Yield what the program says, as it says it, and end when it has ended and all of it was yielded.

        The order within a stream is kept. The program's own end counts: a process it left behind, which keeps
        the files open, delays nothing. Leave the loop and call this again to go on where it stopped. One reader
        at a time; a reader that takes its time holds up nobody, what it has not read stays in the files.
        """
        with FileWatch() as watch:
            watch.add(self.stdout.open_path)  # which is there also when the program removed its files
            watch.add(self.stderr.open_path)
            ended = self.child.exit_future()
            ended.add_done_callback(lambda _: watch.wake())
            try:
                while True:
                    while self._unread:
                        yield self._captured(*self._unread.popleft())
                    is_last = ended.done()
                    if not self._take(is_last=is_last):
                        if is_last:
                            return
                        await watch.wait(_LOOK_AGAIN_S)
            finally:
                ended.cancel()

    def _take(self, *, is_last: bool) -> bool:
        """Read on in both files; tell whether there was anything."""
        streams: tuple[tuple[Stream, FileFollower], ...] = (("stdout", self.stdout), ("stderr", self.stderr))
        for stream, follower in streams:
            if self.temporary is not None:  # nobody else wants these files
                follower.acknowledge(follower.position, part=follower.part)
            if is_last:
                follower.seal()
            self.lost_bytes += follower.skip_hole()
            stretch = follower.read(CHUNK_BYTES)
            pieces = split(stretch.data, offset=stretch.offset, part=stretch.part, final=True).pieces
            self._unread.extend((stream, piece) for piece in pieces)
        return bool(self._unread)

    def _captured(self, stream: Stream, piece: Piece) -> CapturedEvent | CapturedLine:
        claimed = False
        if piece.part is None:
            if decoded := decode_source_line(piece.data):
                claimed = decoded.job_id is not None and decoded.job_id != self.job_id
                if not claimed:
                    event: dict[str, Any] = msgspec.json.decode(piece.data)
                    return CapturedEvent(stream, piece.offset, self._with_ids(event), parsed=False)
            elif words := parse_bracket(piece.data):
                return CapturedEvent(stream, piece.offset, self._with_ids(_narration(*words)), parsed=True)
        text = piece.data.removesuffix(b"\r").decode("utf-8", "replace")
        return CapturedLine(stream, piece.offset, text, piece.part, claimed)

    def _with_ids(self, event: dict[str, Any]) -> dict[str, Any]:
        for name, value in (("job_id", self.job_id), ("correlation_id", self.correlation_id)):
            if event.get(name) is None and value is not None:
                event[name] = value
        return event

    async def aclose(self, grace_s: float = STOP_GRACE_S) -> None:
        """Stop the program, close the files and remove a temporary directory. A second call does nothing."""
        try:
            await self.stop(grace_s)
        finally:
            self.stdout.close()
            self.stderr.close()
            self.child.close()
            if self.temporary is not None:
                shutil.rmtree(self.temporary, ignore_errors=True)  # the program may have removed it itself
                self.temporary = None

    async def __aenter__(self) -> CapturedProcess:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()


def _narration(actor: str, action: str, message: str) -> dict[str, Any]:
    return {
        "v": 1,
        "kind": "narration",
        "ts": time.time_ns(),
        "actor": actor,
        "action": action,
        "message": message,
        "level": "info",
    }
