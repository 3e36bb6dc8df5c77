"""The client of a queen for programs without an event loop."""

from __future__ import annotations

import weakref
from collections.abc import AsyncGenerator, Callable, Generator, Mapping
from types import TracebackType
from typing import Any, Self, TypeVar

from rbee.client.ahead import ReadAhead
from rbee.client.contact import GIVE_UP_S, OnContact
from rbee.client.follow import IDLE_S
from rbee.client.job_client import JobClient
from rbee.client.loop_thread import LoopThread
from rbee.client.place import FindUrl
from rbee.contracts.model_settings import SettingsInForce
from rbee.contracts.operations import Operation
from rbee.contracts.views import Accepted, HiveView, JobView, Page, Status, WorkerView

T = TypeVar("T")
Events = Generator[dict[str, Any], None, None]


class SyncJobClient:
    """Talks to one queen, from any number of threads: a `JobClient` in an event loop of its own thread.

    Close it, best as a context manager; one that is forgotten is closed when it is collected or the program
    ends. It is of no use in a process that was forked from the one that made it.

    Args:
        base_url: Where the queen listens, such as `http://127.0.0.1:8500`.
        api_key: The credential, where the queen asks for one.
        correlation_id: Sent with every request; made when it is not given.
        idle_s: How long a connection may be silent.
        give_up_s: How long submitting, cancelling and following go on without a sign of life.
        on_contact: Told, in the client's thread, when the queen is away meanwhile, and when she is back.
        find_url: Asked, in the client's thread, where the queen is now when nobody listens at `base_url`.

    Raises:
        ConfigurationError: `base_url` is no address.
    """

    def __init__(
        self,
        base_url: str,
        *,
        api_key: str | None = None,
        correlation_id: str | None = None,
        idle_s: float = IDLE_S,
        give_up_s: float = GIVE_UP_S,
        on_contact: OnContact | None = None,
        find_url: FindUrl | None = None,
    ) -> None:
        self._client = JobClient(
            base_url,
            api_key=api_key,
            correlation_id=correlation_id,
            idle_s=idle_s,
            give_up_s=give_up_s,
            on_contact=on_contact,
            find_url=find_url,
        )
        self._loop = LoopThread(self._client)
        self._close = weakref.finalize(self, self._loop.close)

    def __enter__(self) -> Self:
        """Return the client; it is open already."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the client."""
        self.close()

    def close(self) -> None:
        """End every connection and the thread; what waits in another thread fails with InternalError."""
        self._close()

    @property
    def base_url(self) -> str:
        """Where the queen was last."""
        return self._client.base_url

    @property
    def correlation_id(self) -> str:
        """What is sent with every request."""
        return self._client.correlation_id

    def submit(self, operation: Operation | Mapping[str, Any], *, idempotency_key: str | None = None) -> Accepted:
        """Submit a job; see `JobClient.submit`."""
        return self._loop.run(self._client.submit, operation, idempotency_key=idempotency_key)

    def job(self, job_id: str) -> JobView:
        """Return one job."""
        return self._loop.run(self._client.job, job_id)

    def jobs(self, **filters: str | int | None) -> Page[JobView]:
        """Return one page of jobs; filters are `state operation model … limit cursor`."""
        return self._loop.run(self._client.jobs, **filters)

    def cancel(self, job_id: str) -> JobView:
        """Ask for a job's cancellation; its end follows in its log."""
        return self._loop.run(self._client.cancel, job_id)

    def hives(self) -> list[HiveView]:
        """Return the hives the queen knows."""
        return self._loop.run(self._client.hives)

    def workers(self) -> list[WorkerView]:
        """Return the workers of all hives."""
        return self._loop.run(self._client.workers)

    def status(self) -> Status:
        """Return the queen at a glance."""
        return self._loop.run(self._client.status)

    def models(self) -> list[dict[str, Any]]:
        """Return the models that can be asked for, in OpenAI's form."""
        return self._loop.run(self._client.models)

    def model_settings(self) -> SettingsInForce:
        """Return what the queen loads and asks models with."""
        return self._loop.run(self._client.model_settings)

    def get_json(self, path: str, kind: type[T]) -> T:
        """Read `path` as a `kind`; see `JobClient.get_json`."""
        return self._loop.run(self._client.get_json, path, kind)

    def follow(self, job_id: str, *, after: int = 0) -> Events:
        """Yield a job's events from number `after + 1` to its end, across reconnects.

        Leaving the loop early ends the connection with the generator, the job goes on.

        Raises:
            RbeeError: See `LogFollower.events`.
        """
        return self._events(lambda: self._client.follow(job_id, after=after))

    def follow_log(self, path: str, *, after: int = 0) -> Events:
        """Yield the events of a worker's or hive's log; see `JobClient.follow_log`."""
        return self._events(lambda: self._client.follow_log(path, after=after))

    def _events(self, follow: Callable[[], AsyncGenerator[dict[str, Any], None]]) -> Events:
        async def begin() -> ReadAhead:
            return ReadAhead(follow())

        reading = self._loop.run(begin)
        try:
            while batch := self._loop.run(reading.take):
                yield from batch
        finally:
            self._loop.finish(reading.close)
