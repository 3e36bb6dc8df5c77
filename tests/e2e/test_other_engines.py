"""The whole path with an engine that is a server of its own: llama.cpp on a port, and another engine in Rust."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest
from openai import AsyncOpenAI

from rbee.testing import LocalStack
from tests.e2e.reading import MODEL, actions, answer, assert_whole, infer

HERE = Path(__file__).parent
TCP = HERE.parent / "integration" / "tcp_llama.py"
RUST_VERSION = "0.9.5"
RUST = HERE.parents[1] / ".cache" / f"mistralrs-{RUST_VERSION}"


def rust_engine() -> Path:
    """Return where mistral.rs is installed, once a checkout; skip where it cannot be had."""
    if not (RUST / "mistralrs").is_dir():
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--only-binary", ":all:"]
        own = RUST.with_name(f".{RUST.name}-{os.getpid()}")  # other test processes may do the same
        command += ["--target", str(own), f"mistralrs=={RUST_VERSION}"]
        try:
            made = subprocess.run(command, capture_output=True, text=True, timeout=90)
        except subprocess.TimeoutExpired:
            pytest.skip(f"mistralrs {RUST_VERSION} was not installed within 90 s")
        if made.returncode != 0:
            pytest.skip(f"mistralrs {RUST_VERSION} cannot be installed: {made.stderr.strip()[-300:]}")
        with contextlib.suppress(OSError):  # another one was first
            own.rename(RUST)
        shutil.rmtree(own, ignore_errors=True)
    return RUST


def described(name: str, command: Sequence[str], **more: Any) -> str:
    """Describe an engine in TOML."""
    values = {"command": list(command), "env": {}, **more}
    env = ", ".join(f'{key} = "{value}"' for key, value in values.pop("env").items())
    lines = [f"{key} = {msgspec.json.encode(value).decode()}" for key, value in values.items()]
    return "\n".join([f"[engines.{name}]", *lines, f"env = {{ {env} }}", ""])


@pytest.fixture(params=["tcp", "rust"])
async def engine(request: pytest.FixtureRequest, rbee_models: Path) -> AsyncIterator[tuple[LocalStack, str]]:
    """Give a stack whose hive knows the engine, and the worker that runs it."""
    if request.param == "tcp":
        words = ["{model}", "{port}", "{slots}", "{context_tokens}"]
        config = described("tcp", [sys.executable, str(TCP), *words])
    else:
        env = {"PYTHONPATH": str(rust_engine()), "RAYON_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        words = [sys.executable, str(HERE / "rust_server.py"), "{model}", "{port}"]
        config = described("rust", words, env=env, ready="/alive")
    async with LocalStack(models=rbee_models, config=config) as stack:
        spawned = await stack.keeper("workers", "spawn", MODEL, "--engine", request.param, "--slots", "2")
        assert spawned.exit_code == 0, spawned.stderr
        async with stack.client() as client:
            (worker,) = await client.workers()
        yield stack, worker.worker_id


async def processes_of(stack: LocalStack) -> tuple[int, psutil.Process]:
    """Return the worker's number and its engine."""
    async with stack.client() as client:
        (worker,) = await client.workers()
    assert worker.pid is not None
    (child,) = psutil.Process(worker.pid).children()
    return worker.pid, child


async def test_answers_come_in_every_way_and_stop_leaves_nothing(engine: tuple[LocalStack, str]) -> None:
    """Kept, streamed and whole, each counted; the engine's own words are in the worker's log."""
    stack, worker_id = engine
    kept = await stack.run_job(infer(max_tokens=6))
    assert_whole(kept)
    assert actions(kept) == ["queen_receive", "queen_forward", "worker_inference", "queen_complete"]
    assert kept[-1]["state"] == "completed"
    assert kept[-1]["result"]["usage"]["completion_tokens"] == 6
    assert kept[-1]["result"]["usage"]["prompt_tokens"] > 6
    assert answer(kept) == kept[-1]["result"]["text"]
    async with AsyncOpenAI(base_url=f"{stack.url}/v1", api_key="none") as client:
        asked: dict[str, Any] = {"model": MODEL, "messages": [{"role": "user", "content": "Tell a long story."}]}
        whole = await client.chat.completions.create(**asked, max_tokens=5)
        assert whole.choices[0].message.content
        assert whole.usage is not None
        assert whole.usage.completion_tokens == 5
        stream = await client.chat.completions.create(**asked, max_tokens=5, stream=True)
        chunks = [chunk async for chunk in stream]
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        assert chunks[-1].choices[0].finish_reason == "length"
    async with asyncio.timeout(30), stack.client() as client:
        async for event in client.follow_log(f"/v1/workers/{worker_id}/stream"):
            if event["kind"] == "raw" and event["stream"] == "stderr":
                break
    stopped = await stack.keeper("workers", "stop", worker_id)
    assert stopped.exit_code == 0, stopped.stderr
    assert sorted(stack.processes()) == sorted([running.pid for running in stack._programs])


async def test_cancel_stops_the_engine_and_its_death_is_told(engine: tuple[LocalStack, str]) -> None:
    """Cancelled, it uses no more of the processor; killed in mid-answer, the job's end says by which signal."""
    stack, worker_id = engine
    _, server = await processes_of(stack)
    async with asyncio.timeout(80), stack.client() as client:
        job_id = (await client.submit(infer(max_tokens=1500, ignore_eos=True))).job_id
        async for event in client.follow(job_id):
            if event["kind"] == "token" and event["tokens"] == 3:
                await client.cancel(job_id)
        assert (await client.job(job_id)).state == "cancelled"
        await stack.until(lambda: server.cpu_percent(0.5) < 20)
        events: list[dict[str, Any]] = []
        job_id = (await client.submit(infer(max_tokens=1500, ignore_eos=True, attempts=1))).job_id
        async for event in client.follow(job_id):
            events.append(event)
            if event["kind"] == "token" and event["tokens"] == 3:
                server.kill()
    assert_whole(events)
    end = events[-1]
    assert (end["state"], end["reason"]) == ("failed", "worker_lost")
    said = (
        r"The worker ended with exit code 1\. The engine \w+ was ended by SIGKILL\. Without it, this worker ends\."
    )
    assert re.fullmatch(said, end["message"])
    assert end["error"]["worker_id"] == worker_id
    assert sum(event["kind"] == "token" for event in events) >= 3


@pytest.mark.parametrize("engine", ["tcp"], indirect=True)
async def test_halted_engine_is_a_stalled_answer_and_its_slots_are_free_again(
    engine: tuple[LocalStack, str],
) -> None:
    """The worker lives, the answer stands still: it ends in time, and the next one is given by the same worker."""
    stack, worker_id = engine
    _, server = await processes_of(stack)
    async with asyncio.timeout(80), stack.client() as client:
        asked = infer(max_tokens=1500, ignore_eos=True, attempts=1, idle_timeout_s=2)
        job_id = (await client.submit(asked)).job_id
        async for event in client.follow(job_id):
            if event["kind"] == "token" and event["tokens"] == 3:
                server.suspend()
        job = await client.job(job_id)
        assert (job.state, job.reason) == ("failed", "stalled")
        server.resume()
        following = await stack.run_job(infer(max_tokens=2))
    assert following[-1]["state"] == "completed"
    assert {event["worker_id"] for event in following if event["kind"] == "token"} == {worker_id}


async def test_killed_worker_takes_its_engine_along(engine: tuple[LocalStack, str]) -> None:
    """Nobody told the engine."""
    stack, _ = engine
    pid, server = await processes_of(stack)
    os.kill(pid, signal.SIGKILL)
    await stack.until(lambda: not server.is_running() or server.status() == psutil.STATUS_ZOMBIE)
    await stack.until(lambda: sorted(stack.processes()) == sorted([running.pid for running in stack._programs]))


SMALL = str(HERE.parent / "unit" / "worker" / "small_server.py")
KNOWN = "\n".join(
    [
        described("cook", ["cook", "{model}", "{port}"]),
        described("reader", [sys.executable, SMALL, "{port}", "good", "{model}"], needs_file=False),
    ]
)


async def test_worker_that_no_engine_here_makes_is_refused(rbee_models: Path) -> None:
    """By name, by purpose, by the program that is not there; the job says so."""
    cases: list[tuple[dict[str, str], str, str]] = [
        (
            {"engine": "cok"},
            "invalid",
            "no engine `cok` (did you mean `cook`?). There are: llama_cpp, cook, reader.",
        ),
        ({"engine": "cook", "purpose": "embed"}, "invalid", "is for generate, not for embed."),
        ({"engine": "cook"}, "worker_failed", "`cook` cannot be started: No such file or directory."),
    ]
    async with LocalStack(models=rbee_models, config=KNOWN) as stack:
        for asked, reason, said in cases:
            events = await stack.run_job({"operation": "worker_spawn", "model": MODEL, **asked})
            assert (events[-1]["state"], events[-1]["reason"]) == ("failed", reason)
            assert said in events[-1]["error"]["message"]


async def test_engine_that_fetches_its_models_needs_no_file() -> None:
    """Nothing is downloaded; the engine is given the name it knows the model by."""
    async with LocalStack(config=KNOWN) as stack:
        spawn = {"operation": "worker_spawn", "model": "hf:org/repo", "engine": "reader"}
        events = await stack.run_job(spawn)
        assert events[-1]["state"] == "completed", events[-1]
        assert "model_download" not in actions(events)
        _, server = await processes_of(stack)
        assert server.cmdline()[-1] == "org/repo"
