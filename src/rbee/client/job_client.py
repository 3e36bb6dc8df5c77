"""The asynchronous client of a queen (or of a hive's job routes)."""

from __future__ import annotations

import uuid
from collections.abc import AsyncGenerator, Mapping
from types import TracebackType
from typing import Any, Self, TypeVar

import aiohttp
import msgspec

from rbee.client.answers import unreachable
from rbee.client.calls import Call, insist, send
from rbee.client.contact import BROKEN, GIVE_UP_S, Contact, OnContact
from rbee.client.follow import IDLE_S, LogFollower, only_idle
from rbee.client.place import FindUrl, Place, job_path, with_query
from rbee.contracts.events import encode_json
from rbee.contracts.ids import new_correlation_id
from rbee.contracts.model_settings import SettingsInForce
from rbee.contracts.operations import Operation
from rbee.contracts.views import Accepted, HiveView, JobView, Page, Status, WorkerView
from rbee.errors import InternalError

T = TypeVar("T")


class JobClient:
    """Talks to one queen; use it as an asynchronous context manager.

    Only silence is a timeout; nothing limits how long an answer or a log takes. What is submitted or cancelled
    is asked again when the connection breaks, and a log is followed on when the queen comes back.

    Args:
        base_url: Where the queen listens, such as `http://127.0.0.1:8500`.
        api_key: The credential, where the queen asks for one.
        correlation_id: Sent with every request; made when it is not given.
        session: A session to use instead of an own one; it is not closed here.
        idle_s: How long a connection may be silent.
        give_up_s: How long submitting, cancelling and following go on without a sign of life.
        on_contact: Told when the queen is away meanwhile, and when she is back.
        find_url: Asked where the queen is now when nobody listens at `base_url` any more.

    Raises:
        ConfigurationError: `base_url` is no address.
    """

    def __init__(
        self,
        base_url: str,
        *,
        api_key: str | None = None,
        correlation_id: str | None = None,
        session: aiohttp.ClientSession | None = None,
        idle_s: float = IDLE_S,
        give_up_s: float = GIVE_UP_S,
        on_contact: OnContact | None = None,
        find_url: FindUrl | None = None,
    ) -> None:
        self.correlation_id = correlation_id or new_correlation_id()
        self.on_contact = on_contact
        self._place = Place(base_url, find_url)
        self._given = session
        self._own: aiohttp.ClientSession | None = None
        self._idle_s = idle_s
        self._give_up_s = give_up_s
        self._headers = {"x-correlation-id": self.correlation_id}
        if api_key:
            self._headers["Authorization"] = f"Bearer {api_key}"

    @property
    def base_url(self) -> str:
        """Where the queen was last."""
        return self._place.url

    async def __aenter__(self) -> Self:
        """Open the session."""
        if self._given is None:
            connector = aiohttp.TCPConnector(limit=0)  # or the 101st log that is followed waits for an end
            self._own = aiohttp.ClientSession(connector=connector, cookie_jar=aiohttp.DummyCookieJar())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the session, unless it was given."""
        if self._own is not None:
            await self._own.close()
            self._own = None

    async def submit(
        self, operation: Operation | Mapping[str, Any], *, idempotency_key: str | None = None
    ) -> Accepted:
        """Submit a job; it starts whether or not anybody follows it.

        Args:
            operation: What to do, as a contract struct or as the JSON object itself.
            idempotency_key: With the same key the same job is answered, however often it is sent; made when it
                is not given.

        Raises:
            RbeeError: What the queen refused it with.
            UnavailableError: The queen cannot be reached, or was away for too long. With the key that was given
                the same can be submitted again.
        """
        headers = {"Content-Type": "application/json", "Idempotency-Key": idempotency_key or str(uuid.uuid4())}
        return await self._call(
            "POST", "/v1/jobs", Accepted, body=encode_json(operation), headers=headers, is_insisted_on=True
        )

    async def job(self, job_id: str) -> JobView:
        """Return one job."""
        return await self.get_json(job_path(job_id), JobView)

    async def jobs(self, **filters: str | int | None) -> Page[JobView]:
        """Return one page of jobs; filters are `state operation model … limit cursor`."""
        return await self.get_json(with_query("/v1/jobs", filters), Page[JobView])

    async def cancel(self, job_id: str) -> JobView:
        """Ask for a job's cancellation; its end follows in its log."""
        return await self._call("DELETE", job_path(job_id), JobView, is_insisted_on=True)

    async def hives(self) -> list[HiveView]:
        """Return the hives the queen knows."""
        return (await self.get_json("/v1/hives", Page[HiveView])).data

    async def workers(self) -> list[WorkerView]:
        """Return the workers of all hives."""
        return (await self.get_json("/v1/workers", Page[WorkerView])).data

    async def status(self) -> Status:
        """Return the queen at a glance."""
        return await self.get_json("/v1/status", Status)

    async def models(self) -> list[dict[str, Any]]:
        """Return the models that can be asked for, in OpenAI's form."""
        return (await self.get_json("/v1/models", Page[dict[str, Any]])).data

    async def model_settings(self) -> SettingsInForce:
        """Return what the queen loads and asks models with."""
        return await self.get_json("/v1/model-settings", SettingsInForce)

    def follow(self, job_id: str, *, after: int = 0) -> AsyncGenerator[dict[str, Any], None]:
        """Yield a job's events from number `after + 1` to its end, across reconnects.

        Raises:
            RbeeError: See `LogFollower.events`.
        """
        return self._follower(job_path(job_id) + "/stream", after).events()

    def follow_log(self, path: str, *, after: int = 0) -> AsyncGenerator[dict[str, Any], None]:
        """Yield the events of a worker's or hive's log, such as `/v1/workers/<id>/stream`.

        Such a log forgets its oldest part, so the first event is whatever the oldest one is.
        """
        return self._follower(path, after, from_oldest=True).events()

    async def get_json(self, path: str, kind: type[T]) -> T:
        """Read `path` as a `kind`.

        Raises:
            RbeeError: What the server refused with.
            UnavailableError: The server cannot be reached.
        """
        return await self._call("GET", path, kind)

    def _follower(self, path: str, after: int, *, from_oldest: bool = False) -> LogFollower:
        def find_url() -> str:
            self._place.look_again()
            return self._place.url + path

        return LogFollower(
            self._session,
            self._place.url + path,
            headers=self._headers,
            after=after,
            from_oldest=from_oldest,
            idle_s=self._idle_s,
            give_up_s=self._give_up_s,
            on_contact=self.on_contact,
            find_url=find_url,
        )

    @property
    def _session(self) -> aiohttp.ClientSession:
        session = self._given or self._own
        if session is None:
            raise InternalError("A JobClient is used inside `async with`.")
        return session

    async def _call(
        self,
        method: str,
        path: str,
        kind: type[T],
        *,
        body: bytes | None = None,
        headers: Mapping[str, str] | None = None,
        is_insisted_on: bool = False,
    ) -> T:
        """Make one request and decode its answer; only silence is a timeout."""
        call = Call(method, path, {**self._headers, **(headers or {})}, body)

        async def ask() -> bytes:
            return await send(self._session, self._place, call, only_idle(self._idle_s))

        try:
            if is_insisted_on:
                contact = Contact(give_up_s=self._give_up_s, on_contact=self.on_contact)
                answer = await insist(ask, contact)
            else:
                answer = await ask()
        except BROKEN as error:
            raise unreachable(self.base_url, error) from error
        try:
            return msgspec.json.decode(answer, type=kind)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise InternalError(
                f"{self.base_url}{path} answered something else than was expected: {error}."
            ) from None
