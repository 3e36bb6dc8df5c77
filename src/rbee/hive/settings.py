"""The hive's settings."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, ClassVar

from msgspec import Meta

from rbee.contracts.settings import Settings

DEFAULT_PORT = 9000
Positive = Annotated[float, Meta(gt=0)]
Port = Annotated[int, Meta(ge=0, le=65535)]


class HiveSettings(Settings, kw_only=True, frozen=True):
    """Run workers on this machine for a queen, and carry to her what they say.

    Attributes:
        host: Address to listen on; anything but loopback needs RBEE_API_KEY.
        port: Port to listen on (default 9000, or a free one if that is taken); 0 takes any free one.
        listen_fd: Number of an inherited listening socket to use instead of host and port.
        ready_file: File to write {url, pid, boot_id} to, whole, once requests are answered.
        queen_url: The queen to serve (RBEE_QUEEN_URL).
        public_url: The URL the queen reaches this hive under, where it is not the one it listens on.
        allowed_hosts: Names besides loopback that a Host header may have, separated by commas.
        allowed_origins: Origins of web pages that may call, separated by commas.
        api_key: The credential callers need, and the one shown to the queen (RBEE_API_KEY).
        models: Directory of the model files (RBEE_MODELS); default: models in RBEE_HOME.
        workers_max: How many workers run at most; by default as many as the memory holds.
        heartbeat_s: Seconds between heartbeats.
        stop_grace_s: Seconds a worker has to end by itself before it is killed.
        worker_lease_s: Seconds a worker lives on after its hive is gone.
        load_timeout_s: Seconds a worker's start may take, besides 20 s per GiB of its model.
        queued_max: How many of the queen's commands may wait.
        retention_days: Days that a command is kept after its end; past any of these three the oldest goes first.
        retention_jobs: How many commands that have ended are kept.
        retention_bytes: How much of the disk all commands and logs may use until ended ones are forgotten.
    """

    program: ClassVar[str] = "rbee-hive"
    table: ClassVar[str] = "hive"
    env: ClassVar[dict[str, str]] = {"port": "HIVE_PORT", "queen_url": "RBEE_QUEEN_URL"}
    flags_only: ClassVar[frozenset[str]] = frozenset({"home", "listen_fd", "ready_file"})

    host: str = "127.0.0.1"
    port: Port | None = None
    listen_fd: int | None = None
    ready_file: Path | None = None
    queen_url: str = "http://127.0.0.1:8500"
    public_url: str | None = None
    allowed_hosts: tuple[str, ...] = ()
    allowed_origins: tuple[str, ...] = ()
    api_key: str | None = None
    models: Path | None = None
    workers_max: Annotated[int, Meta(ge=1, le=1024)] | None = None
    heartbeat_s: Positive = 1.0
    stop_grace_s: Positive = 10.0
    worker_lease_s: Positive = 30.0
    load_timeout_s: Positive = 300.0
    queued_max: Annotated[int, Meta(ge=1)] = 512
    retention_days: Positive = 30.0
    retention_jobs: Annotated[int, Meta(ge=1)] = 1_000_000
    retention_bytes: Annotated[int, Meta(ge=1)] = 2 * 1024**3
