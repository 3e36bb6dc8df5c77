"""The servers that peers keep their jobs in: an own Redis, an own database of PostgreSQL; gone afterwards."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from benchmarks.pipeline_stage import free_port

READY_S = 30.0
STOP_S = 10.0
POSTGRES_PORT = 5432
_POSTGRES_PROGRAMS = "/usr/lib/postgresql"


class ServiceMissingError(Exception):
    """This machine does not have a server that is wanted."""


@contextmanager
def program(
    command: Sequence[str | Path],
    *,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    user: str | None = None,
    grace_s: float = STOP_S,
) -> Iterator[subprocess.Popen[bytes]]:
    """Run a program beside the block, with all it starts; what it says is shown only when the block fails.

    Args:
        grace_s: How long it may take to end by itself until it is killed.
    """
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(
            command, stdout=said, stderr=said, env=env, cwd=cwd, user=user, start_new_session=True
        )
        try:
            yield process
        except BaseException as error:
            said.seek(0)
            error.add_note(f"{command[0]} said:\n{said.read().decode('utf-8', 'replace')}")
            raise
        finally:
            _stop(process, grace_s)


def _stop(process: subprocess.Popen[bytes], grace_s: float) -> None:
    """End a program and its group."""
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(grace_s)
    with contextlib.suppress(ProcessLookupError):  # nobody of the group is left
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _until_listening(port: int, process: subprocess.Popen[bytes]) -> None:
    deadline_s = time.monotonic() + READY_S
    while True:
        try:
            socket.create_connection(("127.0.0.1", port)).close()
            return
        except ConnectionRefusedError:
            if process.poll() is not None or time.monotonic() > deadline_s:
                raise
        time.sleep(0.02)


@contextmanager
def redis(appendfsync: str) -> Iterator[str]:
    """Run a Redis that appends to its file, `everysec` or `always` with fsync; yields its URL.

    Raises:
        ServiceMissingError: Redis is not installed.
    """
    server = shutil.which("redis-server")
    if server is None:
        raise ServiceMissingError("redis-server is not installed")
    port = free_port()
    with tempfile.TemporaryDirectory(prefix="rbee-bench-") as name:
        options = ["--port", str(port), "--bind", "127.0.0.1", "--dir", name, "--save", ""]
        durable = ["--appendonly", "yes", "--appendfsync", appendfsync]
        with program([server, *options, *durable]) as process:
            _until_listening(port, process)
            yield f"redis://127.0.0.1:{port}/0"


@contextmanager
def postgres() -> Iterator[str]:
    """Make a database, in the local server where that lets anybody in, else in an own one; yields its URL.

    Raises:
        ServiceMissingError: PostgreSQL is not installed.
    """
    if _is_open(POSTGRES_PORT):
        with _database(POSTGRES_PORT) as url:
            yield url
    else:
        with _own_postgres() as port, _database(port) as url:
            yield url


def _is_open(port: int) -> bool:
    """Tell whether a server listens that asks for no password."""
    asked = [_postgres_program("psql"), *_address(port), "--command", "SELECT 1", "postgres"]
    return subprocess.run(asked, capture_output=True, check=False).returncode == 0


def _address(port: int) -> list[str]:
    return ["--host", "127.0.0.1", "--port", str(port), "--username", "postgres", "--no-password"]


@contextmanager
def _database(port: int) -> Iterator[str]:
    name = f"rbee_bench_{os.getpid()}"
    _postgres("createdb", *_address(port), name)
    url = f"postgresql://postgres@127.0.0.1:{port}/{name}"
    try:
        _postgres("psql", "--command", f"ALTER DATABASE {name} SET synchronous_commit = on", url)
        yield url
    finally:
        _postgres("dropdb", "--force", *_address(port), name)


@contextmanager
def _own_postgres() -> Iterator[int]:
    user = "postgres" if os.geteuid() == 0 else None  # the server does not run as root
    port = free_port()
    with tempfile.TemporaryDirectory(prefix="rbee-bench-") as name:
        if user is not None:
            shutil.chown(name, user)
        made = [_postgres_program("initdb"), "--auth", "trust", "--username", "postgres", "--pgdata", name]
        subprocess.run(made, check=True, capture_output=True, user=user, cwd=name)
        options = ["-D", name, "-h", "127.0.0.1", "-p", str(port), "-k", name]
        with program([_postgres_program("postgres"), *options], user=user, cwd=Path(name)) as process:
            _until_listening(port, process)
            yield port


def _postgres(name: str, *arguments: str) -> None:
    subprocess.run([_postgres_program(name), *arguments], check=True, capture_output=True)


def _postgres_program(name: str) -> str:
    places = sorted(Path(_POSTGRES_PROGRAMS).glob("*/bin"), reverse=True)
    found = shutil.which(name, path=os.pathsep.join([*map(str, places), os.environ["PATH"]]))
    if found is None:
        raise ServiceMissingError(f"{name} of PostgreSQL is not installed")
    return found
