"""A real worker whose engine is a server of its own: llama.cpp on a port, in another interpreter."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import psutil
import pytest

from rbee.contracts.home import Home
from rbee.contracts.ids import new_id
from rbee.hive.models import ModelStore
from rbee.processes import FileLock, find_marked
from tests.integration.worker_process import CHAT, HIVE_ID, WorkerProcess

SERVER = str(Path(__file__).with_name("tcp_llama.py"))
HELLO = [{"role": "user", "content": "Tell a long story about a river."}]
JOB_ID = "job-00000000000000000000000001"
KEPT = {"x-job-id": JOB_ID, "x-request-id": f"{JOB_ID}.1", "x-rbee-keep": "1"}
LONG = {"messages": HELLO, "max_tokens": 2000, "ignore_eos": True}
Start = Callable[..., WorkerProcess]


def config(*words: str, purposes: str = '["generate"]') -> str:
    """Describe the engine."""
    command = [sys.executable, SERVER, "{model}", "{port}", "{slots}", "{context_tokens}", *words]
    return f"[engines.tcp]\ncommand = {msgspec.json.encode(command).decode()}\npurposes = {purposes}\n"


@pytest.fixture
def start(rbee_models: Path, tmp_path: Path) -> Iterator[Start]:
    """Start workers on the demo model, with their engine in the configuration; and end them all."""
    model = ModelStore(rbee_models).find("smollm2:135m")
    assert model is not None
    started: list[WorkerProcess] = []

    def start_one(*flags: str, text: str = "", environ: dict[str, str] | None = None) -> WorkerProcess:
        (tmp_path / "rbee.toml").write_text(text or config(), "utf-8")
        asked = ("--model", str(model.path), "--alias", "smollm2:135m", "--engine", "tcp", "--slots", "2", *flags)
        # What carries a worker's id is stopped with it: another test's must not.
        started.append(
            WorkerProcess(tmp_path, *asked, environ={"RBEE_WORKER_ID": new_id("worker"), **(environ or {})})
        )
        return started[-1]

    yield start_one
    for worker in started:
        worker.close()


def engine_of(worker: WorkerProcess) -> psutil.Process:
    """Find the worker's engine."""
    (child,) = psutil.Process(worker.process.pid).children()
    return child


def left_of(worker: WorkerProcess) -> list[tuple[int, int]]:
    """Find what is left of a worker and its engine."""
    return find_marked("RBEE_HOME", str(worker.directory.parent.parent))


async def gone(worker: WorkerProcess) -> None:
    """Wait until nothing is left."""
    await worker.until(lambda: left_of(worker) == [])


async def test_answers_stream_and_do_not_and_are_kept(start: Start) -> None:
    """With the tokens counted, the model under its own name, and the engine named in the story."""
    worker = start(environ={"JOB_ID": JOB_ID})
    body = {"model": "smollm2:135m", "messages": HELLO, "max_tokens": 6, "ignore_eos": True}
    async with await worker.session() as session:
        async with session.post(CHAT, json={**body, "stream": True}) as response:
            frames = (await response.read()).split(b"\n\n")
        assert frames[-2:] == [b"data: [DONE]", b""]
        assert not any(b'"usage":{' in frame for frame in frames)
        async with session.post(CHAT, json=body) as response:
            answer = await response.json()
        async with session.post(CHAT, json=body, headers=KEPT) as response:
            assert response.status == 202
        closing = await worker.closing(JOB_ID)
    assert answer["usage"]["completion_tokens"] == 6
    assert answer["choices"][0]["message"]["content"]
    assert (closing["fields"]["outcome"], closing["fields"]["completion_tokens"]) == ("completed", 6)
    assert "on tcp" in worker.said("worker_startup")[0]["message"]
    assert worker.said("worker_startup")[0]["fields"]["engine"] == "tcp"


async def test_engines_words_go_to_stderr_and_no_secret_reaches_it(start: Start) -> None:
    """Stdout has events alone; the worker's token is not in the engine's environment."""
    worker = start()
    await worker.ready()
    assert {line["kind"] for line in worker.lines()} == {"narration"}
    assert "model loaded" in worker.stderr.read_text()
    environment = engine_of(worker).environ()
    assert "RBEE_WORKER_TOKEN" not in environment
    assert environment["RBEE_HOME"]


async def test_cancel_stops_the_engine(start: Start) -> None:
    """It uses no more of the processor, and both slots answer at once."""
    worker = start()
    async with await worker.session() as session:
        async with session.post(CHAT, json=LONG, headers=KEPT):
            pass
        await worker.has_begun(JOB_ID)
        async with session.delete(f"/requests/{JOB_ID}.1") as response:
            assert response.status == 202
        assert (await worker.closing(JOB_ID))["fields"]["outcome"] == "cancelled"
        engine = engine_of(worker)
        await worker.until(lambda: engine.cpu_percent(0.5) < 20)
        async with session.post(CHAT, json={"messages": HELLO, "max_tokens": 2}) as response:
            assert response.status == 200


async def test_killed_engine_ends_its_worker(start: Start) -> None:
    """It says how the engine ended; the request it had has no closing line, for the job goes on elsewhere."""
    worker = start()
    async with await worker.session() as session:
        async with session.post(CHAT, json=LONG, headers=KEPT):
            pass
        await worker.has_begun(JOB_ID)
        engine_of(worker).kill()
        assert await worker.end() == 1
    said = worker.lines()[-1]
    assert (said["action"], said["level"]) == ("worker_failed", "error")
    assert said["message"] == "The engine tcp was ended by SIGKILL. Without it, this worker ends."
    assert worker.said("worker_inference") == []
    await gone(worker)


async def test_killed_worker_takes_its_engine_along(start: Start) -> None:
    """Also one that was halted."""
    worker = start()
    await worker.ready()
    engine_of(worker).suspend()
    worker.process.kill()
    assert await worker.end() == -signal.SIGKILL
    await gone(worker)


async def test_killed_worker_takes_along_an_engine_that_is_loading(start: Start) -> None:
    """Before anybody can be asked."""
    worker = start()
    await worker.until(lambda: bool(worker.said("worker_load_model")))
    await worker.until(lambda: bool(psutil.Process(worker.process.pid).children()))
    worker.process.kill()
    assert await worker.end() == -signal.SIGKILL
    await gone(worker)


async def test_stop_lets_the_answer_end_and_leaves_nothing(start: Start) -> None:
    """The engine goes after its last answer, not with the first signal to the worker's group."""
    worker = start()
    body = {"messages": HELLO, "max_tokens": 20, "ignore_eos": True, "stream": True}
    async with await worker.session() as session, session.post(CHAT, json=body) as response:
        await response.content.readany()
        worker.process.terminate()
        assert (await response.content.read()).endswith(b"data: [DONE]\n\n")
    assert await worker.end() == 0
    assert worker.lines()[-1]["fields"]["outcome"] == "completed"
    assert left_of(worker) == []


async def test_stop_ends_an_engine_that_was_halted(start: Start) -> None:
    """And tells the request that it was lost with its worker."""
    worker = start()
    async with await worker.session() as session:
        async with session.post(CHAT, json=LONG, headers=KEPT):
            pass
        await worker.has_begun(JOB_ID)
        engine_of(worker).suspend()
        worker.process.terminate()
        assert await worker.end() == 0
    assert (await worker.closing(JOB_ID))["fields"]["error"]["code"] == "worker_lost"
    assert left_of(worker) == []


async def test_lost_hive_ends_worker_and_engine(start: Start, tmp_path: Path) -> None:
    """When the lease is over, both go."""
    lock = FileLock(Home.at(tmp_path).hive_lock)
    assert lock.acquire()
    worker = start("--worker-lease-s", "0.5", environ={"RBEE_HIVE_ID": HIVE_ID})
    await worker.ready()
    lock.release()
    assert await worker.end() == 1
    assert worker.lines()[-1]["action"] == "worker_lease_lost"
    await gone(worker)


def small(behaviour: str) -> str:
    """Describe the small server as an engine."""
    server = Path(__file__).parents[1] / "unit" / "worker" / "small_server.py"
    command = [sys.executable, str(server), "{port}", behaviour]
    return f"[engines.tcp]\ncommand = {msgspec.json.encode(command).decode()}\n"


async def test_engine_that_ends_leaves_nothing(start: Start) -> None:
    """Not what it had started, wherever that went: its memory is wanted."""
    worker = start(text=small("family"))
    await worker.ready()
    engine_of(worker).kill()
    assert await worker.end() == 1
    assert left_of(worker) == []


async def test_lost_hive_ends_all_that_an_engine_started(start: Start, tmp_path: Path) -> None:
    """There may be no hive again to look for it."""
    lock = FileLock(Home.at(tmp_path).hive_lock)
    assert lock.acquire()
    worker = start("--worker-lease-s", "0.5", text=small("family"), environ={"RBEE_HIVE_ID": HIVE_ID})
    await worker.ready()
    lock.release()
    assert await worker.end() == 1
    assert left_of(worker) == []


async def test_lost_hive_ends_an_engine_that_is_loading(start: Start, tmp_path: Path) -> None:
    """The worker waits for it, and is not to be asked."""
    lock = FileLock(Home.at(tmp_path).hive_lock)
    assert lock.acquire()
    worker = start("--worker-lease-s", "0.5", text=small("loading"), environ={"RBEE_HIVE_ID": HIVE_ID})
    await worker.until(lambda: bool(worker.said("worker_load_model")))
    await worker.until(lambda: bool(psutil.Process(worker.process.pid).children()))
    lock.release()
    assert await worker.end() == 1
    assert worker.lines()[-1]["action"] == "worker_lease_lost"
    assert left_of(worker) == []


async def test_engine_for_embeddings_embeds(start: Start) -> None:
    """By the same road; for answers it was not started."""
    worker = start("--embedding", text=config("embed", purposes='["embed"]'))
    async with await worker.session() as session:
        async with session.post("/v1/embeddings", json={"input": ["a river", "a hill"]}) as response:
            answer = await response.json()
            assert response.status == 200, answer
        async with session.post(CHAT, json={"messages": HELLO}) as response:
            error = (await response.json())["error"]
    assert [len(one["embedding"]) for one in answer["data"]] == [576, 576]
    assert error["message"] == "This worker was not started for answers, but for embeddings."


async def test_engine_that_is_not_described_is_named(start: Start) -> None:
    """Before anything is loaded, with those there are."""
    worker = start("--engine", "tpc")
    assert await worker.end() == 3
    assert "There is no engine `tpc` (did you mean `tcp`?)" in worker.said("worker_failed")[0]["message"]


async def test_engine_that_cannot_load_its_model_is_told_with_its_last_words(start: Start, tmp_path: Path) -> None:
    """The engine's own complaint is in the sentence."""
    path = tmp_path / "m.gguf"
    path.write_bytes(b"GGUF" + os.urandom(64))
    worker = start("--model", str(path))
    assert await worker.end() == 3
    message = worker.said("worker_failed")[0]["message"]
    assert message.startswith("The engine tcp ended with exit code 1 before it was ready. Its last words: ")
