"""A small hub on loopback that speaks Hugging Face's protocol, and can be told to misbehave."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from aiohttp import web

COMMIT = "c0ffee" * 6 + "c0ff"


@dataclass
class LocalHub:
    """One repository `org/repo` and what becomes of requests for it.

    Attributes:
        files: The repository's files.
        digests: Digests to announce instead of the true ones; None announces none.
        cuts: After how many bytes the next responses break off; each is used once.
        ignores_ranges: Answers a request for a part with the whole.
        ignores_conditions: Sends a part of whatever version there is.
        etag: The word for the version of every file; its digest where None, no word where it is empty.
        conditions: The If-Range header of every download that was asked for.
        hides_sizes: Neither the list nor a whole file says how long it is.
        hold: After this many bytes every response stands still until `go_on` is set.
        refuse: The status and headers to answer with instead of anything else.
        fail_once: Statuses that the next requests are answered with; each is used once.
        elsewhere: A base URL that downloads are redirected to.
        requests: Method, path and Range header of every request that came.
        authorizations: The Authorization header of every request that came.
    """

    files: dict[str, bytes] = field(default_factory=dict)
    digests: dict[str, str | None] = field(default_factory=dict)
    cuts: list[int] = field(default_factory=list)
    ignores_ranges: bool = False
    ignores_conditions: bool = False
    etag: str | None = None
    conditions: list[str | None] = field(default_factory=list)
    hides_sizes: bool = False
    hold: int | None = None
    refuse: tuple[int, dict[str, str]] | None = None
    fail_once: list[int] = field(default_factory=list)
    elsewhere: str | None = None
    requests: list[tuple[str, str, str | None]] = field(default_factory=list)
    authorizations: list[str | None] = field(default_factory=list)
    held: asyncio.Event = field(default_factory=asyncio.Event)
    go_on: asyncio.Event = field(default_factory=asyncio.Event)
    url: str = ""

    def downloads(self) -> list[str | None]:
        """Return the Range header of every download that was asked for."""
        return [part for _, path, part in self.requests if "/resolve/" in path]

    async def _list(self, request: web.Request) -> web.StreamResponse:
        if (refusal := self._refusal(request)) is not None:
            return refusal
        if request.match_info["repo"] != "org/repo":
            return web.Response(status=404, headers={"X-Error-Code": "RepoNotFound"})
        assert request.query["blobs"] == "true"
        siblings = [
            {"rfilename": name, "size": None if self.hides_sizes else len(data), "blobId": "0" * 40}
            | self._lfs(name, data)
            for name, data in self.files.items()
        ]
        return web.json_response({"id": "org/repo", "sha": COMMIT, "siblings": siblings})

    def _lfs(self, name: str, data: bytes) -> dict[str, object]:
        digest = self.digests.get(name, hashlib.sha256(data).hexdigest())
        return {"lfs": {"sha256": digest, "size": len(data), "pointerSize": 134}} if digest else {}

    async def _resolve(self, request: web.Request) -> web.StreamResponse:
        if (refusal := self._refusal(request)) is not None:
            return refusal
        if self.elsewhere is not None:
            return web.Response(status=302, headers={"Location": self.elsewhere + request.path})
        assert request.match_info["revision"] == COMMIT
        data = self.files[request.match_info["name"]]
        etag = f'"{hashlib.sha256(data).hexdigest()}"' if self.etag is None else self.etag
        headers = {"Accept-Ranges": "bytes"} | ({"ETag": etag} if etag else {})
        condition = request.headers.get("If-Range")
        self.conditions.append(condition)
        start = 0
        is_fulfilled = self.ignores_conditions or condition in (None, etag)
        if "Range" in request.headers and not self.ignores_ranges and is_fulfilled:
            start = int(request.headers["Range"].removeprefix("bytes=").removesuffix("-"))
            if start >= len(data):
                return web.Response(status=416, headers={"Content-Range": f"bytes */{len(data)}"})
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        response = web.StreamResponse(status=206 if "Content-Range" in headers else 200, headers=headers)
        if self.hides_sizes:
            response.enable_chunked_encoding()
        else:
            response.content_length = len(data) - start
        await response.prepare(request)
        await self._send(request, response, data[start:])
        return response

    async def _send(self, request: web.Request, response: web.StreamResponse, data: bytes) -> None:
        if self.cuts:
            await response.write(data[: self.cuts.pop(0)])
            assert request.transport is not None
            request.transport.close()
            return
        if self.hold is not None:
            await response.write(data[: self.hold])
            data = data[self.hold :]
            self.held.set()
            await self.go_on.wait()
        await response.write(data)

    def _refusal(self, request: web.Request) -> web.Response | None:
        self.requests.append((request.method, request.path, request.headers.get("Range")))
        self.authorizations.append(request.headers.get("Authorization"))
        if self.refuse is not None:
            return web.Response(status=self.refuse[0], headers=self.refuse[1])
        return web.Response(status=self.fail_once.pop(0)) if self.fail_once else None

    def app(self) -> web.Application:
        """Return the application."""
        app = web.Application()
        app.router.add_get("/api/models/{repo:.+}", self._list)
        app.router.add_get("/{repo:[^/]+/[^/]+}/resolve/{revision}/{name:.+}", self._resolve)
        return app


@asynccontextmanager
async def serving(hub: LocalHub) -> AsyncIterator[LocalHub]:
    """Serve a hub on a free port of loopback; responses that stand still are let go at the end."""
    runner = web.AppRunner(hub.app(), shutdown_timeout=1.0)
    await runner.setup()
    try:
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        host, port = runner.addresses[0][:2]
        hub.url = f"http://{host}:{port}"
        yield hub
    finally:
        hub.go_on.set()
        await runner.cleanup()


class Steps:
    """Collects the progress that a download reports, and calls `then` on each step."""

    def __init__(self, then: Callable[[int], None] | None = None) -> None:
        self.seen: list[tuple[int, int | None]] = []
        self._then = then

    def __call__(self, done_bytes: int, total_bytes: int | None) -> None:
        """Take note of one step."""
        self.seen.append((done_bytes, total_bytes))
        if self._then is not None:
            self._then(done_bytes)
