"""What can be decided about a job, and what it is decided from."""

from __future__ import annotations

from msgspec import Struct

from rbee.queen.inventory import ANY_ENGINE, CPU, Kind, WorkerSpot


class Wanted(Struct, frozen=True):
    """What kind of worker a job needs, and how one is started for it.

    Attributes:
        slots_min: With how few slots a worker is worth starting.
        device: The only device that will do.
        workers_max: How many workers of the model there may be; by default one on a processor.
        hive_id: The only hive that will do.
        is_any_engine: A worker that is there will do whatever its engine is.
        goes_on: The answer was begun by another worker.
        is_another: A worker is asked for even where others of the kind are.
    """

    kind: Kind
    slots: int = 4
    slots_min: int = 1
    context_tokens: int = 4096
    device: str | None = None
    workers_max: int | None = None
    hive_id: str | None = None
    is_any_engine: bool = False
    goes_on: bool = False
    is_another: bool = False

    @property
    def served_by(self) -> Kind:
        """The kind of worker that will do, of those that are there."""
        return self.kind._replace(engine=ANY_ENGINE) if self.is_any_engine else self.kind

    @property
    def model(self) -> str:
        """The model's reference."""
        return self.kind.model


class Use(Struct, frozen=True):
    """Take a slot of this worker."""

    hive_id: str
    worker_id: str
    why: str


class Start(Struct, frozen=True, kw_only=True):
    """Start a worker on this hive.

    Attributes:
        room: The device whose memory it takes.
        device: The device it is told to use; None leaves it to its hive, which has but one.
        memory_bytes: What it will take.
        evict: The workers that are stopped first.
        is_additional: The model has workers, all of them full.
    """

    hive_id: str
    why: str
    room: str = CPU
    device: str | None = None
    slots: int = 4
    context_tokens: int = 4096
    memory_bytes: int = 0
    evict: tuple[WorkerSpot, ...] = ()
    is_additional: bool = False


class Claim(Struct, frozen=True):
    """What nothing else is placed on, so that a job that waits for this memory gets it."""

    hive_id: str
    device: str
    worker_ids: tuple[str, ...]


class Wait(Struct, frozen=True):
    """Nothing can be done now; `why` says what for.

    Attributes:
        needs_hive: Nothing that runs can change it: a hive has to come (back), or memory has to become free.
        claim: The workers that make room once they have nothing to do.
    """

    why: str
    needs_hive: bool = False
    claim: Claim | None = None


class Refuse(Struct, frozen=True):
    """It cannot be started: its workers failed again and again, on every hive that could take it."""

    hive_id: str


Decision = Use | Start | Wait | Refuse


class Closed(Struct, frozen=True):
    """What is kept for jobs whose turn is earlier: devices (by hive), and workers."""

    rooms: frozenset[tuple[str, str]] = frozenset()
    worker_ids: frozenset[str] = frozenset()

    def and_by(self, claim: Claim) -> Closed:
        """Return what is closed with one more claim."""
        return Closed(self.rooms | {(claim.hive_id, claim.device)}, self.worker_ids | set(claim.worker_ids))


NOTHING_CLOSED = Closed()
