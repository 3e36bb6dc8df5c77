"""States, reasons and phases, and which transition may follow which: data that every program shares."""

from __future__ import annotations

from enum import StrEnum


class JobState(StrEnum):
    """Where a job is in its life."""

    QUEUED = "queued"
    RUNNING = "running"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"


TERMINAL_STATES = frozenset({JobState.COMPLETED, JobState.FAILED, JobState.CANCELLED})

TRANSITIONS: dict[JobState, frozenset[JobState]] = {
    JobState.QUEUED: frozenset({JobState.RUNNING, JobState.FAILED, JobState.CANCELLED}),
    # running -> running is a new attempt: the same job placed again.
    JobState.RUNNING: frozenset({JobState.RUNNING, *TERMINAL_STATES}),
    JobState.COMPLETED: frozenset(),
    JobState.FAILED: frozenset(),
    JobState.CANCELLED: frozenset(),
}


class Reason(StrEnum):
    """Why a job ended."""

    OK = "ok"
    USER = "user"
    TIMEOUT = "timeout"
    QUEUE_TIMEOUT = "queue_timeout"
    FIRST_TOKEN_TIMEOUT = "first_token_timeout"
    STALLED = "stalled"
    WORKER_LOST = "worker_lost"
    WORKER_FAILED = "worker_failed"
    HIVE_LOST = "hive_lost"
    QUEEN_LOST = "queen_lost"
    NO_CAPACITY = "no_capacity"
    OVERLOADED = "overloaded"
    CRASH_LOOP = "crash_loop"
    MODEL_NOT_FOUND = "model_not_found"
    MODEL_INVALID = "model_invalid"
    DOWNLOAD_FAILED = "download_failed"
    INVALID = "invalid"
    INTERNAL = "internal"


class Phase(StrEnum):
    """What a job is waiting for or busy with, for people."""

    QUEUED = "queued"
    WAITING_FOR_SLOT = "waiting_for_slot"
    DOWNLOADING_MODEL = "downloading_model"
    STARTING_WORKER = "starting_worker"
    LOADING_MODEL = "loading_model"
    GENERATING = "generating"
    STOPPING = "stopping"


class WorkerState(StrEnum):
    """What a hive knows of a worker; being busy is a number (`slots_used`), not a state."""

    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"
    STOPPED = "stopped"
    FAILED = "failed"


class HiveState(StrEnum):
    """What the lease says of a hive."""

    LIVE = "live"
    STALE = "stale"
    LOST = "lost"
