"""What every request passes, asked over a real socket: guards, correlation ids, and errors in one shape."""

from __future__ import annotations

import asyncio
import json
import re
import uuid
from typing import Any

import pytest

from rbee.http.auth import Door
from tests.unit.http.http_stage import BODY_MAX, Stage, http_stage

JSON = {"content-type": "application/json"}


async def told(response: Any, status: int, code: str) -> dict[str, Any]:
    """Check that an answer is an error in the house's shape; return what it says."""
    assert (response.status, response.content_type) == (status, "application/json")
    answer: dict[str, Any] = await response.json()
    assert answer["error"]["code"] == code
    assert answer["error"]["message"]
    assert answer["error"]["remedy"]
    assert answer["error"]["retryable"] is False
    assert answer["correlation_id"] == response.headers["x-correlation-id"]
    error: dict[str, Any] = answer["error"]
    return error


async def test_foreign_host_is_refused_before_anything_else(stage: Stage) -> None:
    async with stage.get("/v1/jobs", headers={"host": "evil.example"}) as response:
        await told(response, 403, "forbidden")
    async with stage.get("/v1/jobs", headers={"host": "[::1"}) as response:
        await told(response, 403, "forbidden")


async def test_foreign_page_is_refused_and_the_servers_own_is_not(stage: Stage) -> None:
    async with stage.get("/v1/me", headers={"origin": "http://evil.example"}) as response:
        await told(response, 403, "forbidden")
    async with stage.get("/v1/me", headers={"origin": stage.url}) as response:
        assert response.status == 200


async def test_key_is_asked_for_everywhere_but_at_liveness() -> None:
    async with http_stage(Door(api_key="key")) as stage:
        async with stage.get("/livez") as response:
            assert response.status == 200
        for path in ("/v1/me", "/v1/jobs", "/openapi.json", "/v1/nothing", "/livez/", "//livez"):
            async with stage.get(path) as response:
                await told(response, 401, "invalid_api_key")
                assert response.headers["www-authenticate"] == "Bearer"
        async with stage.get("/v1/me", headers={"authorization": "Bearer key"}) as response:
            assert await response.json() == {"principal": "key"}
        async with stage.get("/livez", headers={"host": "evil.example"}) as response:
            await told(response, 403, "forbidden")


async def test_correlation_id_of_the_caller_is_taken(stage: Stage) -> None:
    for given in ("abc", "A.b_c:d-9", "x" * 128):
        async with stage.get("/v1/me", headers={"x-correlation-id": given}) as response:
            assert response.headers.getall("x-correlation-id") == [given]


async def test_correlation_id_that_is_missing_or_bad_is_replaced(stage: Stage) -> None:
    for given in (None, "", "a b", "x" * 129, "é", "a/b"):
        headers = {} if given is None else {"x-correlation-id": given}
        async with stage.get("/v1/nothing", headers=headers) as response:
            error = await told(response, 404, "not_found")
            assert "/v1/nothing" in error["message"]
            assert uuid.UUID(response.headers["x-correlation-id"]).version == 7


async def test_correlation_id_given_twice_is_replaced(stage: Stage) -> None:
    headers = [("x-correlation-id", "a"), ("x-correlation-id", "b")]
    async with stage.get("/v1/me", headers=headers) as response:
        (echoed,) = response.headers.getall("x-correlation-id")
        assert uuid.UUID(echoed).version == 7


async def test_correlation_ids_of_concurrent_requests_never_mix(stage: Stage) -> None:
    async def ask(name: str) -> None:
        async with stage.get("/v1/nothing", headers={"x-correlation-id": name}) as response:
            assert (await response.json())["correlation_id"] == name

    await asyncio.gather(*(ask(f"c-{number}") for number in range(50)))


async def test_wrong_method_is_told_which_ones_there_are(stage: Stage) -> None:
    async with stage.client.put(stage.url + "/v1/jobs") as response:
        await told(response, 405, "method_not_allowed")
        assert response.headers["allow"] == "GET, HEAD, POST"
    async with stage.client.post(stage.url + "/v1/jobs/job-1") as response:
        await told(response, 405, "method_not_allowed")
        assert response.headers["allow"] == "DELETE, GET, HEAD"


async def test_unknown_path_is_not_found(stage: Stage) -> None:
    for path in ("/", "/v1", "/v1/jobs/", "/v1/jobs/job-1/nothing", "/v2/jobs", "/%2e%2e/etc/passwd"):
        async with stage.get(path, allow_redirects=False) as response:
            await told(response, 404, "not_found")


async def test_json_route_with_another_content_type_is_refused(stage: Stage) -> None:
    for media in (None, "text/plain", "application/x-www-form-urlencoded", "application/jsonx"):
        headers = {} if media is None else {"content-type": media}
        async with stage.client.post(stage.url + "/v1/me", data=b"{}", headers=headers) as response:
            await told(response, 415, "unsupported_media_type")


async def test_json_route_with_parameters_of_the_type_is_read(stage: Stage) -> None:
    headers = {"content-type": "Application/JSON; charset=utf-8"}
    async with stage.client.post(stage.url + "/v1/me", data=b"{}", headers=headers) as response:
        assert await response.json() == {"bytes": 2}


@pytest.mark.parametrize("path", ["/v1/me", "/v1/bytes"])
@pytest.mark.parametrize("is_chunked", [False, True])
async def test_body_is_read_up_to_its_limit_and_not_beyond(stage: Stage, path: str, is_chunked: bool) -> None:
    method = "POST" if path == "/v1/me" else "PUT"

    async def pieces(size: int) -> Any:
        for start in range(0, size, 100):
            yield b"x" * min(100, size - start)

    for size, status in ((0, 200), (BODY_MAX, 200), (BODY_MAX + 1, 413)):
        data = pieces(size) if is_chunked else b"x" * size
        async with stage.client.request(method, stage.url + path, data=data, headers=JSON) as response:
            assert response.status == status
            if status == 413:
                await told(response, 413, "payload_too_large")


async def test_body_that_is_announced_too_large_is_refused_before_it_is_sent(stage: Stage) -> None:
    answer = await stage.raw(
        b"POST /v1/me HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\nconnection: close\r\n"
        b"content-length: 99999999999\r\n\r\n"
    )
    assert answer.startswith(b"HTTP/1.1 413 ")
    assert b'"code":"payload_too_large"' in answer


async def test_caller_that_leaves_in_the_middle_of_its_body_is_no_incident(
    stage: Stage, capsys: pytest.CaptureFixture[str]
) -> None:
    _, writer = await asyncio.open_connection(*stage.address)
    writer.write(
        b"POST /v1/me HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: 9\r\n\r\n{"
    )
    await writer.drain()
    writer.close()
    await writer.wait_closed()
    async with stage.get("/v1/me") as response:
        assert response.status == 200
    assert "incident" not in capsys.readouterr().err


async def test_crash_of_a_route_is_an_incident_that_keeps_its_text_to_itself(
    stage: Stage, capsys: pytest.CaptureFixture[str]
) -> None:
    async with stage.get("/v1/crash", headers={"x-correlation-id": "c-9"}) as response:
        error = await told(response, 500, "internal")
        assert (await response.json())["correlation_id"] == "c-9"
    number = re.search(r"incident ([0-9a-f]{12})", error["message"])
    assert number is not None
    assert "canary" not in json.dumps(error)
    kept = capsys.readouterr().err
    assert f"incident {number[1]} in /v1/crash:" in kept
    assert "KeyError: 'canary'" in kept


async def test_number_in_the_query_is_read(stage: Stage) -> None:
    for query, n in (("", 7), ("?n=1", 1), ("?n=500", 500), ("?n=000000000005", 5)):
        async with stage.get("/v1/count" + query) as response:
            assert await response.json() == {"n": n}


async def test_number_in_the_query_that_is_none_or_too_large_is_refused(stage: Stage) -> None:
    for text in ("0", "501", "-1", "1.5", "x", "", "²", "1" * 13, "000000000001999", "1" + "0" * 5000):
        async with stage.get("/v1/count", params={"n": text}) as response:
            error = await told(response, 400, "invalid")
            assert (error["message"], error["param"]) == ("`n` must be a whole number from 1 to 500.", "n")


async def test_head_answers_as_get_does_without_a_body(stage: Stage) -> None:
    async with stage.client.head(stage.url + "/v1/me") as response:
        assert (response.status, await response.read()) == (200, b"")


async def test_server_says_nothing_of_what_it_is_made_of(stage: Stage) -> None:
    async with stage.get("/v1/me") as response:
        assert "server" not in response.headers
