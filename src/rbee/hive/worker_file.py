"""What a hive writes down of each worker, so that its next start can adopt the process: `worker.json`, 0600."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct

from rbee.contracts.home import write_whole
from rbee.hive.worker_wanted import WorkerWanted
from rbee.processes import Child, ExitStatus, adopt, find_marked, machine_boot_id
from rbee.processes.procfs import read_process

NAME = "worker.json"


class WorkerFile(Struct, frozen=True, kw_only=True):
    """One worker as its hive knew it last.

    Attributes:
        token: The credential its front asks for.
        machine_boot_id: The start of the machine that `start_time` belongs to.
        pid: None until the process was started.
        url: None until it was ready.
        status: How it ended, once that is known.
    """

    wanted: WorkerWanted
    token: str
    machine_boot_id: str
    pid: int | None = None
    start_time: int | None = None
    url: str | None = None
    status: ExitStatus | None = None

    def write(self, directory: Path) -> None:
        """Write it down, whole."""
        write_whole(directory / NAME, msgspec.json.encode(self, enc_hook=str) + b"\n")


def new_worker_file(wanted: WorkerWanted, token: str) -> WorkerFile:
    """Return what is written before the process is started."""
    return WorkerFile(wanted=wanted, token=token, machine_boot_id=machine_boot_id())


def read_worker_file(directory: Path) -> WorkerFile | None:
    """Read what an earlier start of the hive wrote; None when there is nothing that can be used."""
    try:
        return msgspec.json.decode((directory / NAME).read_bytes(), type=WorkerFile, dec_hook=_path)
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError):
        return None


def _path(kind: type[Any], value: Any) -> Any:
    if kind is Path and isinstance(value, str):
        return Path(value)
    raise NotImplementedError(kind)


def adopted(file: WorkerFile) -> Child | None:
    """Hold on to the process of a worker that an earlier start of the hive left running; None when it is gone.

    A hive that was killed between starting the process and writing its number down left a process that carries
    the worker's token, as its engine does not, and leads its session.
    """
    if file.status is not None:
        return None
    if file.pid is not None and file.start_time is not None:
        return adopt(file.pid, file.start_time, boot_id=file.machine_boot_id)
    for pid, start_time in find_marked("RBEE_WORKER_TOKEN", file.token):
        entry = read_process(pid)
        if entry is not None and entry.session == pid:
            return adopt(pid, start_time)
    return None
