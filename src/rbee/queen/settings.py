"""The queen's settings."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, ClassVar, Literal

from msgspec import Meta

from rbee.contracts.models import DEFAULT_MODEL
from rbee.contracts.settings import Settings

DEFAULT_PORT = 8500
Positive = Annotated[float, Meta(gt=0)]
Port = Annotated[int, Meta(ge=0, le=65535)]


class QueenSettings(Settings, kw_only=True, frozen=True):
    """Accept jobs, place them on hives, keep their logs and serve the API.

    Attributes:
        host: Address to listen on; anything but loopback needs RBEE_API_KEY.
        port: Port to listen on (default 8500, or a free one if that is taken); 0 takes any free one.
        listen_fd: Number of an inherited listening socket to use instead of host and port.
        ready_file: File to write {url, pid, boot_id} to, whole, once requests are answered.
        allowed_hosts: Names besides loopback that a Host header may have, separated by commas.
        allowed_origins: Origins of web pages that may call, separated by commas.
        api_key: The credential callers need (RBEE_API_KEY).
        model: The model of a request that names none.
        pull: Whether a known model that is on no disk is pulled (missing) or refused (never).
        queued_max: How many jobs may wait.
        retention_days: Days that a job is kept after its end; past any of these three the oldest goes first.
        retention_jobs: How many jobs that have ended are kept.
        retention_bytes: How much of the disk all jobs and logs may use until ended jobs are forgotten.
        slots: Concurrent answers of a worker that is started on demand.
        context_tokens: Context of one request on a worker that is started on demand, in tokens.
        keep_alive_s: Seconds a worker may be idle before it is stopped; negative: for ever.
        hive_timeout_s: Seconds a job waits for a hive that cannot be reached.
        hive_stale_s: Seconds without a heartbeat until nothing new is placed on a hive.
        hive_lost_s: Seconds without a heartbeat until a hive counts as lost.
        stop_grace_s: Seconds a stopped request has to say its last line.
        stall_s: Seconds without a token, after the first, until an answer counts as stalled.
        first_token_s: Seconds until the first token, from placement.
    """

    program: ClassVar[str] = "queen-rbee"
    table: ClassVar[str] = "queen"
    env: ClassVar[dict[str, str]] = {"port": "QUEEN_PORT", "model": "RBEE_MODEL"}
    flags_only: ClassVar[frozenset[str]] = frozenset({"home", "listen_fd", "ready_file"})

    host: str = "127.0.0.1"
    port: Port | None = None
    listen_fd: int | None = None
    ready_file: Path | None = None
    allowed_hosts: tuple[str, ...] = ()
    allowed_origins: tuple[str, ...] = ()
    api_key: str | None = None
    model: str = DEFAULT_MODEL
    pull: Literal["missing", "never"] = "missing"
    queued_max: Annotated[int, Meta(ge=1)] = 512
    retention_days: Positive = 30.0
    retention_jobs: Annotated[int, Meta(ge=1)] = 1_000_000
    retention_bytes: Annotated[int, Meta(ge=1)] = 2 * 1024**3
    slots: Annotated[int, Meta(ge=1, le=256)] = 4
    context_tokens: Annotated[int, Meta(ge=16)] = 4096
    keep_alive_s: float = 300.0
    hive_timeout_s: Positive = 45.0
    hive_stale_s: Positive = 3.0
    hive_lost_s: Positive = 15.0
    stop_grace_s: Positive = 10.0
    stall_s: Positive = 30.0
    first_token_s: Positive = 300.0
