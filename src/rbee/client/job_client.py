"""The asynchronous client of a queen (or of a hive's job routes)."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from types import TracebackType
from typing import Any, Self, TypeVar
from urllib.parse import quote, urlencode, urlsplit

import aiohttp
import msgspec

from rbee.client.answers import error_of, read_bounded, unreachable
from rbee.client.follow import CONNECT_S, GIVE_UP_S, IDLE_S, LogFollower, OnContact
from rbee.contracts.events import encode_json
from rbee.contracts.ids import new_correlation_id
from rbee.contracts.operations import Operation
from rbee.contracts.views import Accepted, HiveView, JobView, Page, Status, WorkerView
from rbee.errors import ConfigurationError, InternalError

T = TypeVar("T")

MAX_ANSWER_BYTES = 64 * 1024 * 1024


class JobClient:
    """Talks to one queen; use it as an asynchronous context manager.

    Args:
        base_url: Where the queen listens, such as `http://127.0.0.1:8500`.
        api_key: The credential, where the queen asks for one.
        correlation_id: Sent with every request; made when it is not given.
        session: A session to use instead of an own one; it is not closed here.
        idle_s: How long a connection may be silent.
        give_up_s: How long following a log goes on without a sign of life.
        on_contact: Told when a followed queen is away, and when it is back.
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
    ) -> None:
        self.base_url = checked_url(base_url)
        self.correlation_id = correlation_id or new_correlation_id()
        self.on_contact = on_contact
        self._given = session
        self._own: aiohttp.ClientSession | None = None
        self._idle_s = idle_s
        self._give_up_s = give_up_s
        self._headers = {"x-correlation-id": self.correlation_id}
        if api_key:
            self._headers["Authorization"] = f"Bearer {api_key}"

    async def __aenter__(self) -> Self:
        """Open the session."""
        if self._given is None:
            self._own = aiohttp.ClientSession(cookie_jar=aiohttp.DummyCookieJar())
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
            idempotency_key: With the same key the same job is answered, however often it is sent.

        Raises:
            RbeeError: What the queen refused it with.
            UnavailableError: The queen cannot be reached.
        """
        headers = {"Content-Type": "application/json"}
        if idempotency_key:
            headers["Idempotency-Key"] = idempotency_key
        return await self._call("POST", "/v1/jobs", Accepted, body=encode_json(operation), headers=headers)

    async def job(self, job_id: str) -> JobView:
        """Return one job."""
        return await self.get_json(job_path(job_id), JobView)

    async def jobs(self, **filters: str | int | None) -> Page[JobView]:
        """Return one page of jobs; filters are `state operation model … limit cursor`."""
        return await self.get_json(with_query("/v1/jobs", filters), Page[JobView])

    async def cancel(self, job_id: str) -> JobView:
        """Ask for a job's cancellation; its end follows in its log."""
        return await self._call("DELETE", job_path(job_id), JobView)

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

    async def follow(self, job_id: str, *, after: int = 0) -> AsyncGenerator[dict[str, Any], None]:
        """Yield a job's events from number `after + 1` to its end, across reconnects.

        Raises:
            RbeeError: See `LogFollower.events`.
        """
        async with aclosing(self._follower(job_path(job_id) + "/stream", after).events()) as events:
            async for event in events:
                yield event

    async def follow_log(self, path: str, *, after: int = 0) -> AsyncGenerator[dict[str, Any], None]:
        """Yield the events of a worker's or hive's log, such as `/v1/workers/<id>/stream`.

        Such a log forgets its oldest part, so the first event is whatever the oldest one is.
        """
        async with aclosing(self._follower(path, after, from_oldest=True).events()) as events:
            async for event in events:
                yield event

    async def get_json(self, path: str, kind: type[T]) -> T:
        """Read `path` as a `kind`.

        Raises:
            RbeeError: What the server refused with.
            UnavailableError: The server cannot be reached.
        """
        return await self._call("GET", path, kind)

    def _follower(self, path: str, after: int, *, from_oldest: bool = False) -> LogFollower:
        return LogFollower(
            self._session,
            self.base_url + path,
            headers=self._headers,
            after=after,
            from_oldest=from_oldest,
            idle_s=self._idle_s,
            give_up_s=self._give_up_s,
            on_contact=self.on_contact,
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
    ) -> T:
        """Make one request and decode its answer; only silence is a timeout."""
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_S, sock_read=self._idle_s)
        url = self.base_url + path
        try:
            async with self._session.request(
                method,
                url,
                data=body,
                headers={**self._headers, **(headers or {})},
                timeout=timeout,
                allow_redirects=False,
            ) as response:
                if response.status >= 300:
                    raise await error_of(response)
                answer = await read_bounded(response, MAX_ANSWER_BYTES)
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise unreachable(self.base_url, error) from error
        try:
            return msgspec.json.decode(answer, type=kind)
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise InternalError(f"{url} answered something else than was expected: {error}.") from None


def job_path(job_id: str) -> str:
    """Return the path of a job, whatever was given as its id."""
    return "/v1/jobs/" + quote(job_id, safe="")


def with_query(path: str, values: Mapping[str, str | int | None]) -> str:
    """Return `path` with the values that are given as its query."""
    given = {key: value for key, value in values.items() if value is not None}
    return f"{path}?{urlencode(given)}" if given else path


def checked_url(url: str) -> str:
    """Return the address of a server without a slash at its end.

    Raises:
        ConfigurationError: It is not of the form `http://host:port`.
    """
    try:
        parts = urlsplit(url)
        port_is_fine = parts.port is None or parts.port > 0
    except ValueError:
        port_is_fine = False
    if not port_is_fine or parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigurationError(
            f"`{url}` is not the address of a queen.",
            remedy="Give it with scheme, host and port, such as http://127.0.0.1:8500.",
        )
    return url.rstrip("/")
