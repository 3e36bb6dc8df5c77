"""Start a process whose output goes to two files."""

from __future__ import annotations

import os
import subprocess
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from msgspec import Struct

from rbee.errors import StartError
from rbee.processes.child import Child, ExitStatus, adopt
from rbee.processes.linux import require_linux
from rbee.processes.parent_death import dies_with_parent
from rbee.processes.procfs import read_process

__all__ = ["Child", "ExitStatus", "ProcessSpec", "adopt", "spawn"]


class ProcessSpec(Struct, frozen=True, kw_only=True):
    """What to start.

    Attributes:
        command: The program and its arguments; no shell is involved.
        env: The whole environment of the child; `PATH` in it is where the program is looked for.
        stdout: The file its stdout is appended to, made when missing (0600).
        stderr: The file its stderr is appended to, made when missing (0600).
        cwd: The directory it starts in; ours when None.
        parent_death_signal: What it is sent when the thread that starts it ends, however that comes about.
    """

    command: tuple[str, ...]
    env: Mapping[str, str]
    stdout: Path
    stderr: Path
    cwd: Path | None = None
    parent_death_signal: int | None = None


def spawn(spec: ProcessSpec) -> Child:
    """Start a process in a session and group of its own, with stdin from /dev/null and its output to files.

    Call it from the main thread: what a child inherits from the thread that started it must not end with a
    pool's thread. Blocks until the program runs (about a millisecond).

    Raises:
        StartError: The program or one of its files is not there or may not be used; it says which.
        RuntimeError: Called from another thread.
        ConfigurationError: This is not Linux.
    """
    require_linux()
    if threading.current_thread() is not threading.main_thread():
        raise RuntimeError("spawn() must be called from the main thread.")
    if not spec.command:
        raise StartError("There is no command to start.", remedy="Give a program and its arguments.")
    with _output(spec.stdout) as stdout, _output(spec.stderr) as stderr:
        process = _popen(spec, stdout, stderr)
    return _held(process)


@contextmanager
def _output(path: Path) -> Iterator[int]:
    try:
        fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise StartError(
            f"The output file {path} cannot be opened: {error.strerror}.",
            remedy="See that its directory exists, may be written to and has room.",
        ) from error
    try:
        yield fd
    finally:
        os.close(fd)


def _popen(spec: ProcessSpec, stdout: int, stderr: int) -> subprocess.Popen[bytes]:
    number = spec.parent_death_signal
    try:
        return subprocess.Popen(
            spec.command,
            env=dict(spec.env),
            cwd=spec.cwd,
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
            start_new_session=True,
            close_fds=True,
            preexec_fn=None if number is None else dies_with_parent(number),
        )
    except (OSError, ValueError) as error:
        raise _start_error(spec, error) from error


def _start_error(spec: ProcessSpec, error: OSError | ValueError) -> StartError:
    why = error.strerror if isinstance(error, OSError) else str(error)
    if isinstance(error, OSError) and spec.cwd is not None and str(error.filename) == str(spec.cwd):
        return StartError(
            f"`{spec.command[0]}` cannot be started in the directory {spec.cwd}: {why}.",
            remedy="Name a directory that exists.",
        )
    return StartError(
        f"`{spec.command[0]}` cannot be started: {why}.",
        remedy="See that the program is installed, executable, and found by the PATH it is given.",
    )


def _held(process: subprocess.Popen[bytes]) -> Child:
    try:
        pidfd = os.pidfd_open(process.pid)
    except OSError as error:
        process.kill()
        process.wait()
        raise StartError(f"Process {process.pid} cannot be watched: {error.strerror}.") from error
    entry = read_process(process.pid)
    # The pidfd is what waits for it; Popen must neither do so behind our back nor warn that nobody did.
    process.returncode = 0
    if entry is None:  # a child that was not waited for is there, at least as a zombie
        os.close(pidfd)
        raise StartError(
            f"Process {process.pid} vanished when it was started.",
            remedy="Do not ignore SIGCHLD in a program that starts processes.",
        )
    return Child(process.pid, entry.start_time, pidfd)
