"""The files of a home (`RBEE_HOME`) that more than one program reads or writes."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec
import platformdirs
from msgspec import Struct

from rbee.contracts.views import ReadyFile
from rbee.errors import ConfigurationError, StartError


class Home(Struct, frozen=True):
    """The directory everything of one installation lives under; 0700."""

    root: Path

    @classmethod
    def at(cls, root: Path) -> Home:
        """Make the home's directories where they are missing.

        Raises:
            ConfigurationError: The place cannot be written to.
        """
        home = cls(root.expanduser().absolute())
        try:
            for directory in (home.root, home.run, home.logs, home.workers, home.hive):
                directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigurationError(
                f"RBEE_HOME {home.root} cannot be used: {error.strerror or error}.",
                remedy="Name a directory you may write to with RBEE_HOME or --home.",
            ) from error
        return home

    @property
    def config(self) -> Path:
        """The configuration file; it need not exist."""
        return self.root / "rbee.toml"

    @property
    def run(self) -> Path:
        """Ready files of the servers that run: `<program>.json`."""
        return self.root / "run"

    @property
    def logs(self) -> Path:
        """Output of servers started in the background."""
        return self.root / "logs"

    @property
    def workers(self) -> Path:
        """One directory a worker, named by its id: its stdout, stderr and engine socket."""
        return self.root / "workers"

    @property
    def hive(self) -> Path:
        """The hive's own narration, one file a boot."""
        return self.root / "hive"

    @property
    def hive_lock(self) -> Path:
        """The file a live hive holds a write lock on; workers only ask for it."""
        return self.root / "hive.lock"

    @property
    def queen_lock(self) -> Path:
        """The file a live queen holds a write lock on."""
        return self.root / "queen.lock"

    @property
    def stack_lock(self) -> Path:
        """Held while somebody starts queen and hive, so that two keepers start one stack."""
        return self.root / "stack.lock"

    def ready_file(self, program: str) -> Path:
        """Where `program` (`queen-rbee`, `rbee-hive`, `rbee`) leaves its address."""
        return self.run / f"{program}.json"


def default_home() -> Path:
    """Return `RBEE_HOME`, or the place the platform has for a user's data."""
    named = os.environ.get("RBEE_HOME")
    return Path(named) if named else platformdirs.user_data_path("rbee")


def write_whole(path: Path, data: bytes) -> None:
    """Write a file so that a reader sees all of it or none (temporary file, fsync, rename); 0600."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        with open(fd, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_ready_file(path: Path, ready: ReadyFile) -> None:
    """Announce a server's address in a file.

    Raises:
        StartError: It cannot be written; it says why.
    """
    try:
        write_whole(path, msgspec.json.encode(ready) + b"\n")
    except OSError as error:
        raise StartError(
            f"The ready file {path} cannot be written: {error.strerror or error}.",
            remedy="Free space on its disk, or make its directory writable, then start again.",
        ) from error


def read_ready_file(path: Path) -> ReadyFile | None:
    """Read what a server announced; None when there is nothing that can be read or its process is gone."""
    try:
        ready = msgspec.json.decode(path.read_bytes(), type=ReadyFile)
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError):
        return None
    return ready if _is_alive(ready.pid) else None


def _is_alive(pid: int) -> bool:
    """Tell whether a process lives; a zombie does not."""
    try:
        os.kill(pid, 0)
        status = Path(f"/proc/{pid}/stat").read_bytes()
    except PermissionError:
        return True
    except FileNotFoundError:
        return not Path("/proc/self").exists()  # without /proc, the signal's answer has to do
    except (OSError, OverflowError):
        return False
    return status.rpartition(b") ")[2][:1] not in (b"Z", b"X")
