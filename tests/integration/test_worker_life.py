"""How a real worker begins and ends."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import socket
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from rbee.contracts.home import Home
from rbee.hive.models import ModelStore
from rbee.processes import FileLock, find_marked
from tests.integration.patched_model import with_template
from tests.integration.worker_process import CHAT, HIVE_ID, WORKER_ID, WorkerProcess

HELLO = [{"role": "user", "content": "Tell a long story about a river."}]
JOB_ID = "job-00000000000000000000000001"
HIVE = {"RBEE_HIVE_ID": HIVE_ID, "JOB_ID": JOB_ID, "CORRELATION_ID": "corr-1"}
Start = Callable[..., WorkerProcess]


@pytest.fixture
def model(rbee_models: Path) -> str:
    """Return the demo model's file."""
    found = ModelStore(rbee_models).find("smollm2:135m")
    assert found is not None
    return str(found.path)


@pytest.fixture
def start() -> Iterator[Start]:
    """Start workers, and end them all."""
    started: list[WorkerProcess] = []

    def start_one(home: Path, *flags: str, environ: dict[str, str] | None = None) -> WorkerProcess:
        started.append(WorkerProcess(home, *flags, environ=environ))
        return started[-1]

    yield start_one
    for worker in started:
        worker.close()


async def status_of_an_answer(worker: WorkerProcess) -> int:
    """Ask for two tokens and return the status."""
    body = {"messages": HELLO, "max_tokens": 2}
    async with await worker.session() as session, session.post(CHAT, json=body) as response:
        return int(response.status)


async def test_start_is_told_to_the_job_it_is_for(start: Start, tmp_path: Path, model: str) -> None:
    """Three sentences in order, with every id, before anything is asked; Ctrl-C is for the hive to act on."""
    lock = FileLock(Home.at(tmp_path).hive_lock)
    assert lock.acquire()
    worker = start(tmp_path, "--model", model, "--alias", "smollm2:135m", "--slots", "1", environ=HIVE)
    url = await worker.ready()
    story = worker.lines()
    assert [line["action"] for line in story] == ["worker_startup", "worker_load_model", "worker_ready"]
    for line in story:
        assert (line["actor"], line["job_id"], line["correlation_id"]) == ("worker", JOB_ID, "corr-1")
        assert (line["hive_id"], line["worker_id"], line["model"]) == (HIVE_ID, WORKER_ID, "smollm2:135m")
    fields = story[-1]["fields"]
    assert (fields["slots"], fields["context_tokens"], fields["pid"]) == (1, 4096, worker.process.pid)
    assert url.startswith("http://127.0.0.1:")
    worker.process.send_signal(signal.SIGINT)
    worker.process.send_signal(signal.SIGTERM)
    assert await worker.end() == 0
    assert worker.lines()[-1]["action"] == "worker_stopping"
    lock.release()


async def test_context_is_told_as_the_model_has_it(start: Start, tmp_path: Path, model: str) -> None:
    """Asked for more than the model was made for, the worker says what there is."""
    worker = start(tmp_path, "--model", model, "--slots", "1", "--context-tokens", "10000")
    await worker.ready()
    assert worker.said("worker_ready")[0]["fields"]["context_tokens"] == 8192


async def test_home_with_a_long_path_is_no_obstacle(start: Start, tmp_path: Path, model: str) -> None:
    """A unix socket's path may have 107 bytes; a home's may have more."""
    home = tmp_path / ("long-" * 30) / "home"
    worker = start(home, "--model", model, "--slots", "1")
    assert await status_of_an_answer(worker) == 200
    assert stat.S_ISSOCK((worker.directory / "engine.sock").stat().st_mode)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "There is no model file at "),
        (b"junk", " is not a GGUF model file."),
        (b"GGUF\x03\x00\x00\x00" + b"\xff" * 200, "The model cannot be loaded: the file is damaged or not one "),
    ],
)
async def test_model_that_cannot_be_loaded_ends_with_4(
    start: Start, tmp_path: Path, content: bytes | None, said: str
) -> None:
    """With one plain sentence, told to the job, and nothing ready."""
    path = tmp_path / "m.gguf"
    if content is not None:
        path.write_bytes(content)
    worker = start(tmp_path, "--model", str(path), environ={"JOB_ID": JOB_ID})
    assert await worker.end() == 4
    last = worker.lines()[-1]
    assert (last["action"], last["level"], last["job_id"]) == ("worker_failed", "error", JOB_ID)
    assert said in last["message"]
    assert last["fields"]["error"]["code"] == "model_invalid"


async def test_model_cut_short_ends_with_4(start: Start, tmp_path: Path, model: str) -> None:
    """Half a download has a whole header."""
    path = tmp_path / "m.gguf"
    shutil.copyfile(model, path)
    os.truncate(path, 20_000_000)
    worker = start(tmp_path, "--model", str(path))
    assert await worker.end() == 4
    assert worker.said("worker_failed")[0]["message"].startswith("The model cannot be loaded: the file is damaged")


async def test_template_that_cannot_be_read_ends_with_4(start: Start, tmp_path: Path, model: str) -> None:
    """The sentence says that it is the template."""
    path = with_template(Path(model), "{% for m in messages %}{{ m.content ", tmp_path / "m.gguf")
    worker = start(tmp_path, "--model", str(path))
    assert await worker.end() == 4
    message = worker.said("worker_failed")[0]["message"]
    assert message.startswith("The model cannot be loaded: the chat template in its file cannot be used (")


async def test_template_that_refuses_is_a_400_and_the_worker_lives_on(
    start: Start, tmp_path: Path, model: str
) -> None:
    """Streaming or not, kept or not: the caller is told what the template says, narration is not."""
    template = (
        "{% if messages|length > 2 %}{{ raise_exception('Only two, not ' + messages[2].content) }}{% endif %}"
        "{% for m in messages %}{{ m.role + ': ' + m.content }}{% endfor %}"
    )
    path = with_template(Path(model), template, tmp_path / "m.gguf")
    worker = start(tmp_path, "--model", str(path), "--slots", "1", "--context-tokens", "512")
    three = [
        {"role": role, "content": f"canary{number}"} for number, role in enumerate(("user", "assistant", "user"))
    ]
    async with await worker.session() as session:
        for is_streaming in (True, False):
            async with session.post(CHAT, json={"messages": three, "stream": is_streaming}) as response:
                error = (await response.json())["error"]
            assert (response.status, error["code"]) == (400, "invalid")
            assert error["message"] == (
                "The model's chat template does not take these messages: Only two, not canary2"
            )
        headers = {"x-job-id": JOB_ID, "x-request-id": f"{JOB_ID}.1", "x-rbee-keep": "1"}
        async with session.post(CHAT, json={"messages": three}, headers=headers) as response:
            assert response.status == 202
        fields = (await worker.closing(JOB_ID))["fields"]
        assert (fields["outcome"], fields["error"]["code"]) == ("failed", "invalid")
        async with session.post(CHAT, json={"messages": HELLO, "max_tokens": 2}) as response:
            assert response.status == 200
    assert b"canary" not in worker.stdout.read_bytes()


@pytest.mark.parametrize("limit_mib", [400, 700])
async def test_memory_that_does_not_suffice_is_told_so(
    start: Start, tmp_path: Path, model: str, limit_mib: int
) -> None:
    """For the file itself, or for its context: the true sentence, and exit code 4."""
    limits = (limit_mib * 2**20, limit_mib * 2**20)
    worker = start(tmp_path, "--model", model, "--context-tokens", "8192")
    resource.prlimit(worker.process.pid, resource.RLIMIT_AS, limits)
    assert await worker.end() == 4
    assert worker.said("worker_failed")[0]["message"] == (
        "The model cannot be loaded: the memory does not suffice for it and its context."
    )


async def test_port_in_use_ends_with_3(start: Start, tmp_path: Path, model: str) -> None:
    """Before anything is loaded."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        worker = start(tmp_path, "--model", model, "--port", str(port))
        assert await worker.end() == 3
    assert [line["action"] for line in worker.lines()] == ["worker_startup", "worker_failed"]
    assert f"The port {port} cannot be had" in worker.lines()[-1]["message"]


async def test_missing_token_ends_with_2(start: Start, tmp_path: Path, model: str) -> None:
    """Started by hand without one, the worker says what to do."""
    worker = start(tmp_path, "--model", model, environ={"RBEE_WORKER_TOKEN": ""})
    assert await worker.end() == 2
    assert "RBEE_WORKER_TOKEN is not set" in worker.stderr.read_text()
    assert worker.lines() == []


async def test_stop_while_answering_tells_the_end_and_exits_with_0(
    start: Start, tmp_path: Path, model: str
) -> None:
    """What does not end in time is told as lost with its worker; the engine is not torn down, which takes long."""
    worker = start(tmp_path, "--model", model, "--slots", "1", "--context-tokens", "8192")
    async with await worker.session() as session:
        headers = {"x-job-id": JOB_ID, "x-request-id": f"{JOB_ID}.1", "x-rbee-keep": "1"}
        body = {"messages": HELLO, "max_tokens": 8000, "ignore_eos": True}
        async with session.post(CHAT, json=body, headers=headers) as response:
            assert response.status == 202
        await worker.has_begun(JOB_ID)
        worker.process.terminate()
        assert await worker.end() == 0
    fields = (await worker.closing(JOB_ID))["fields"]
    assert (fields["outcome"], fields["error"]["code"]) == ("failed", "worker_lost")
    assert worker.lines()[-1]["action"] == "worker_inference"


async def test_stop_lets_a_stream_end(start: Start, tmp_path: Path, model: str) -> None:
    """An answer in progress is sent whole, nobody new is let in, and the worker ends with 0."""
    worker = start(tmp_path, "--model", model, "--slots", "1", "--threads", "1")
    body = {"messages": HELLO, "max_tokens": 5, "ignore_eos": True, "stream": True}
    async with await worker.session() as session, session.post(CHAT, json=body) as response:
        await response.content.readany()
        worker.process.terminate()
        await worker.until(lambda: bool(worker.said("worker_stopping")))
        assert (await response.content.read()).endswith(b"data: [DONE]\n\n")
    assert await worker.end() == 0
    assert worker.lines()[-1]["fields"]["outcome"] == "completed"


async def test_killed_worker_leaves_nothing_and_its_place_can_be_taken(
    start: Start, tmp_path: Path, model: str
) -> None:
    """No process, and a socket file that keeps nobody out."""
    worker = start(tmp_path, "--model", model, "--slots", "1")
    await worker.ready()
    worker.process.kill()
    assert await worker.end() == -signal.SIGKILL
    assert find_marked("RBEE_HOME", str(tmp_path)) == []
    worker.stdout.unlink()
    again = start(tmp_path, "--model", model, "--slots", "1")
    assert await status_of_an_answer(again) == 200


async def test_worker_ends_when_its_hive_is_gone_for_longer_than_the_lease(
    start: Start, tmp_path: Path, model: str
) -> None:
    """While the hive holds its lock the worker lives; without it, it says why it ends."""
    lock = FileLock(Home.at(tmp_path).hive_lock)
    assert lock.acquire()
    worker = start(tmp_path, "--model", model, "--slots", "1", "--worker-lease-s", "0.5", environ=HIVE)
    async with await worker.session() as session, session.get("/readyz") as response:
        assert response.status == 200
    lock.release()
    assert await worker.end() == 1
    assert worker.lines()[-1]["action"] == "worker_lease_lost"


async def test_worker_for_embeddings_embeds(start: Start, tmp_path: Path, model: str) -> None:
    """Also an input longer than a batch; one longer than the context is a 400 with both numbers."""
    flags = ("--slots", "1", "--context-tokens", "1024", "--embedding")
    worker = start(tmp_path, "--model", model, *flags)
    async with await worker.session() as session:
        async with session.post("/v1/embeddings", json={"input": ["hi " * 900, "there"]}) as response:
            answer = await response.json()
            assert response.status == 200, answer
            assert [len(one["embedding"]) for one in answer["data"]] == [576, 576]
        async with session.post("/v1/embeddings", json={"input": "hi " * 2000}) as response:
            error = (await response.json())["error"]
            assert (response.status, error["code"]) == (400, "context_length_exceeded")
            assert error["message"] == "The prompt has 2001 tokens; the context holds 1024."


async def test_kernel_can_be_asked_which_worker_a_process_is(start: Start, tmp_path: Path, model: str) -> None:
    """The program's own name stands in its command line, and no token does."""
    worker = start(tmp_path, "--model", model, "--slots", "1")
    await worker.ready()
    command = Path(f"/proc/{worker.process.pid}/cmdline").read_bytes().split(b"\0")
    assert any(os.path.basename(part) == b"llama-worker-rbee" for part in command)
    assert not any(b"token" in part for part in command)
