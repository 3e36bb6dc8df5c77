"""The closed door: loopback by default, a key beyond it, no stranger's page."""

from __future__ import annotations

import aiohttp
import pytest

from rbee.testing import LocalStack

KEY = "a-long-and-secret-key"


@pytest.mark.parametrize("program", ["queen-rbee", "rbee-hive"])
async def test_serving_beyond_loopback_without_a_key_is_refused(program: str) -> None:
    """Exit 3, before anything else is looked at; the message names RBEE_API_KEY."""
    async with LocalStack(with_hive=False) as stack:
        ran = await stack.program(program, "--host", "0.0.0.0", "--port", "0", "--home", "/proc/nowhere")
    assert ran.exit_code == 3
    assert "RBEE_API_KEY" in ran.stderr


async def test_with_a_key_every_route_but_liveness_wants_it() -> None:
    """Queen and hive alike; the stack works with it, and the key is in nothing that is printed."""
    async with LocalStack(env={"RBEE_API_KEY": KEY}) as stack:
        assert stack.hive is not None
        async with aiohttp.ClientSession() as session:
            for url in (stack.url, stack.hive.url):
                for path, status in (("/livez", 200), ("/health", 200), ("/readyz", 401), ("/v1/jobs", 401)):
                    async with session.get(url + path) as answer:
                        assert answer.status == status, (url, path)
                async with session.get(url + "/v1/jobs", headers={"authorization": "Bearer wrong"}) as answer:
                    assert answer.status == 401
                    assert answer.headers["www-authenticate"] == "Bearer"
                async with session.get(url + "/v1/jobs", headers={"authorization": f"Bearer {KEY}"}) as answer:
                    assert answer.status == 200
        events = await stack.run_job({"operation": "hive_check"})
        assert events[-1]["state"] == "completed"
        assert KEY not in stack.logs()


async def test_foreign_hosts_origins_and_media_types_are_refused() -> None:
    """403 for a host or page that is not ours, 415 for a body that does not say it is JSON."""
    async with LocalStack(with_hive=False) as stack, aiohttp.ClientSession(stack.url) as session:
        body = b'{"operation": "queen_check"}'
        json_type = {"content-type": "application/json"}
        cases = [
            ({"host": "evil.example"}, 403),
            ({"origin": "https://evil.example"}, 403),
            ({"origin": "null"}, 403),
            ({"content-type": "text/plain"}, 415),
            ({"content-type": "application/x-www-form-urlencoded"}, 415),
            ({"origin": stack.url}, 202),
            ({}, 202),
        ]
        for headers, status in cases:
            async with session.post("/v1/jobs", data=body, headers={**json_type, **headers}) as answer:
                assert answer.status == status, headers
