"""Who and what the front lets in."""

from __future__ import annotations

import asyncio
from io import BytesIO
from pathlib import Path

import msgspec
import pytest

from rbee.contracts.operations import MAX_BODY_BYTES
from tests.unit.worker.worker_stage import ASKED, CHAT, HELLO, Script, chat, stage

ROUTES = [
    ("POST", CHAT),
    ("POST", "/v1/completions"),
    ("POST", "/v1/embeddings"),
    ("POST", "/v1/responses"),
    ("POST", "/v1/messages"),
    ("POST", "/v1/rerank"),
    ("POST", "/tokenize"),
    ("POST", "/apply-template"),
    ("GET", "/v1/models"),
    ("DELETE", "/requests/job-a.1"),
    ("GET", "/readyz"),
    ("GET", "/props"),
]


@pytest.mark.parametrize("authorization", [None, "Bearer wrong", "Bearer ", "Basic the-token", "the-token"])
async def test_every_route_wants_the_token(tmp_path: Path, authorization: str | None) -> None:
    """Without it nothing is known, not even which routes there are; the engine is never asked."""
    headers = {"authorization": authorization or ""}
    async with stage(tmp_path) as worker:
        for method, path in ROUTES:
            async with worker.session.request(method, path, headers=headers, json=ASKED) as response:
                assert (response.status, (await response.json())["error"]["code"]) == (401, "invalid_api_key")
        assert worker.lines() == []


@pytest.mark.parametrize("path", ["/livez", "/health"])
async def test_liveness_is_open(tmp_path: Path, path: str) -> None:
    """Anybody may ask whether the worker lives."""
    async with stage(tmp_path) as worker, worker.session.get(path, headers={"authorization": ""}) as response:
        assert (response.status, await response.json()) == (200, {"status": "ok"})


@pytest.mark.parametrize("path", ["/", "/slots", "/props", "/metrics", "/completion", "/requests/", "/v1/chat"])
async def test_route_that_is_not_listed_is_not_there(tmp_path: Path, path: str) -> None:
    """The engine's side doors stay shut."""
    async with stage(tmp_path) as worker, worker.session.get(path) as response:
        assert (response.status, (await response.json())["error"]["code"]) == (404, "not_found")


async def test_other_method_is_refused(tmp_path: Path) -> None:
    """A known route says what it takes."""
    async with stage(tmp_path) as worker, worker.session.get(CHAT) as response:
        assert (response.status, (await response.json())["error"]["message"]) == (405, f"{CHAT} takes POST.")


async def test_web_page_is_refused(tmp_path: Path) -> None:
    """A page in the user's own browser is a stranger, token or not."""
    headers = {"origin": "https://x.example"}
    async with stage(tmp_path) as worker, worker.session.post(CHAT, json=ASKED, headers=headers) as response:
        assert response.status == 403


async def test_body_of_another_media_type_is_refused(tmp_path: Path) -> None:
    """JSON says that it is JSON."""
    async with stage(tmp_path) as worker, worker.session.post(CHAT, data=b"{}") as response:
        assert response.status == 415


async def test_body_over_the_bound_is_refused(tmp_path: Path) -> None:
    """However it is sent; the engine never hears of it."""
    headers = {"content-type": "application/json"}
    body = BytesIO(b" " * (MAX_BODY_BYTES + 1))
    async with stage(tmp_path) as worker, worker.session.post(CHAT, data=body, headers=headers) as response:
        assert response.status == 413
        assert worker.engine.asked == []


async def test_long_body_within_the_bound_is_taken(tmp_path: Path) -> None:
    """A prompt of several MiB reaches the engine whole."""
    asked = {"messages": [{"role": "user", "content": "a" * (MAX_BODY_BYTES // 2)}]}
    headers = {"content-type": "application/json"}
    body = BytesIO(msgspec.json.encode(asked))
    async with stage(tmp_path, Script(parts=list(HELLO))) as worker:
        async with worker.session.post(CHAT, data=body, headers=headers) as response:
            assert response.status == 200
        assert worker.engine.asked == [{**asked, "stream": True}]


@pytest.mark.parametrize(
    ("path", "body", "said"),
    [
        (CHAT, b"{", "The body is not JSON"),
        (CHAT, b"[]", "The body must be a JSON object."),
        (CHAT, b'{"messages":[]}', "`messages` must not be empty."),
        ("/v1/messages", b'{"messages":[]}', "`messages` must not be empty."),
        ("/v1/responses", b'{"input":[]}', "`input` must not be empty."),
        (CHAT, b"[" * 100_000, "The body is"),
    ],
)
async def test_body_that_cannot_be_answered_is_a_400(tmp_path: Path, path: str, body: bytes, said: str) -> None:
    """Refused without asking the engine, and told in the log of the job."""
    headers = {"content-type": "application/json", "x-job-id": "job-a"}
    async with stage(tmp_path) as worker:
        async with worker.session.post(path, data=body, headers=headers) as response:
            error = (await response.json())["error"]
            assert (response.status, error["code"]) == (400, "invalid")
            assert error["message"].startswith(said)
        closing = await worker.closing()
        assert (closing["job_id"], closing["fields"]["outcome"]) == ("job-a", "failed")


@pytest.mark.parametrize(
    ("name", "value"), [("x-request-id", "a b"), ("x-job-id", "x" * 201), ("x-rbee-keep", "yes")]
)
async def test_header_of_another_form_is_a_400(tmp_path: Path, name: str, value: str) -> None:
    """Ids go into every line, so they are checked."""
    async with stage(tmp_path) as worker, worker.session.post(CHAT, json=ASKED, headers={name: value}) as response:
        assert (response.status, (await response.json())["error"]["param"]) == (400, name)


async def test_embeddings_cannot_be_kept(tmp_path: Path) -> None:
    """There is no text to narrate."""
    async with stage(tmp_path) as worker:
        headers = {"x-rbee-keep": "1"}
        async with worker.session.post("/v1/embeddings", json={"input": "a"}, headers=headers) as response:
            assert response.status == 400


async def test_request_beyond_the_slots_is_a_429(tmp_path: Path) -> None:
    """It is told to come back, nothing is remembered of it, and it gets the slot when that is free."""
    go_on = asyncio.Event()
    again = {"x-request-id": "job-b.1", "x-rbee-keep": "1"}
    async with stage(tmp_path, Script(parts=[chat("a"), go_on, *HELLO]), Script(parts=list(HELLO))) as worker:
        headers = {"x-request-id": "job-a.1", "x-rbee-keep": "1"}
        async with worker.session.post(CHAT, json=ASKED, headers=headers) as response:
            assert response.status == 202
        async with worker.session.get("/readyz") as response:
            assert await response.json() == {"status": "ready", "slots": 1, "slots_used": 1}
        for headers in (again, {}):
            async with worker.session.post(CHAT, json=ASKED, headers=headers) as response:
                assert (response.status, response.headers["retry-after"]) == (429, "1")
                assert (await response.json())["error"]["code"] == "overloaded"
        go_on.set()
        await worker.until(lambda: worker.desk.slots_used == 0)
        async with worker.session.post(CHAT, json=ASKED, headers=again) as response:
            assert response.status == 202
        await worker.until(lambda: len(worker.closings()) == 2)


async def test_relayed_request_id_is_taken_once(tmp_path: Path) -> None:
    """An answer that was relayed cannot be had again."""
    async with stage(tmp_path, Script(parts=list(HELLO))) as worker:
        for status in (200, 409):
            async with worker.session.post(CHAT, json=ASKED, headers={"x-request-id": "job-a.1"}) as response:
                assert response.status == status
        assert len(worker.closings()) == 1
