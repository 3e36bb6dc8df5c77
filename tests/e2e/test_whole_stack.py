"""The whole stack: one prompt through keeper, queen, hive and worker, and everything told on the way."""

from __future__ import annotations

import asyncio
import json
import signal
from pathlib import Path

from rbee.testing import LocalStack
from tests.e2e.reading import MAIN_PATH, MODEL, actions, answer, assert_whole, first, infer, states


async def test_cold_infer_tells_eight_events_from_four_processes(rbee_stack: LocalStack) -> None:
    """The first prompt: eight steps in causal order, told by processes of their own, and the answer."""
    async with rbee_stack.keeper_process(
        "infer",
        "--json",
        "-m",
        MODEL,
        "--max-tokens",
        "8",
        "--temperature",
        "0",
        "Tell a long story about a river.",
    ) as keeper:
        out, err = await keeper.communicate()
        keeper_pid = keeper.pid
    assert keeper.returncode == 0, err.decode()
    events = [json.loads(line) for line in out.decode().splitlines()]
    assert_whole(events)
    assert actions(events) == MAIN_PATH
    assert states(events) == ["queued", "running", "completed"]
    assert answer(events) == events[-1]["result"]["text"] != ""
    assert events[-1]["result"]["usage"]["completion_tokens"] == 8
    assert [first(events, action)["actor"] for action in MAIN_PATH] == [
        "queen",
        "queen",
        "hive",
        "worker",
        "worker",
        "worker",
        "worker",
        "queen",
    ]
    assert rbee_stack.queen is not None
    assert rbee_stack.hive is not None
    worker_pid = first(events, "worker_ready")["fields"]["pid"]
    assert len({keeper_pid, rbee_stack.queen.pid, rbee_stack.hive.pid, worker_pid}) == 4
    assert worker_pid in rbee_stack.processes()


async def test_second_infer_reuses_the_worker(rbee_stack: LocalStack) -> None:
    """On a worker that is there, nothing is told that did not happen."""
    cold = await rbee_stack.run_job(infer())
    warm = await rbee_stack.run_job(infer())
    assert_whole(warm)
    assert actions(warm) == ["queen_receive", "queen_forward", "worker_inference", "queen_complete"]
    assert first(warm, "worker_inference")["worker_id"] == first(cold, "worker_ready")["worker_id"]
    assert first(warm, "queen_forward")["seq"] < first(warm, "worker_inference")["seq"]


async def test_keeper_prints_the_answer_alone_on_stdout(rbee_stack: LocalStack) -> None:
    """stdout has the answer and nothing else; the narration is on stderr; -q leaves it out."""
    told = await rbee_stack.keeper(
        "infer", "-m", MODEL, "--max-tokens", "8", "--seed", "1", "Tell a long story about a river."
    )
    quiet = await rbee_stack.keeper(
        "infer", "-q", "-m", MODEL, "--max-tokens", "8", "--seed", "1", stdin="Tell a long story about a river."
    )
    assert (told.exit_code, quiet.exit_code) == (0, 0)
    assert told.stdout.endswith("\n")
    assert told.stdout.strip()
    assert "[worker    ] worker_inference: " in told.stderr
    assert "[" not in told.stdout.splitlines()[0][:1]
    assert quiet.stderr == ""


async def test_hive_stopped_for_five_seconds_holds_the_story_up_and_loses_nothing(rbee_stack: LocalStack) -> None:
    """The worker's words travel through the hive: while it stands still none arrive, then all do."""
    assert rbee_stack.hive is not None
    hive = rbee_stack.hive
    resumed_at = 0.0
    events = []
    async with rbee_stack.client() as client:
        job_id = (await client.submit(infer(max_tokens=120, ignore_eos=True))).job_id
        loop = asyncio.get_running_loop()
        arrived_while_stopped = []
        async with asyncio.timeout(60):
            async for event in client.follow(job_id):
                events.append(event)
                if loop.time() < resumed_at:
                    arrived_while_stopped.append(event)
                if event.get("action") == "worker_ready":
                    hive.signal(signal.SIGSTOP)
                    resumed_at = loop.time() + 5.0
                    loop.call_later(5.0, hive.signal, signal.SIGCONT)
    said = {event.get("action") or event["kind"] for event in arrived_while_stopped}
    assert "token" not in said
    assert "worker_inference" not in said
    assert_whole(events)
    assert events[-1]["state"] == "completed"
    assert events[-1]["result"]["usage"]["completion_tokens"] == 120
    assert answer(events) == events[-1]["result"]["text"]


async def test_plain_output_goes_to_the_workers_log_and_events_to_the_jobs(rbee_stack: LocalStack) -> None:
    """What the engine prints is no narration: it stays with the worker, whole."""
    await rbee_stack.run_job(infer())
    too_long = await rbee_stack.run_job(infer("word " * 6000))
    worker_id = first(too_long, "worker_inference")["worker_id"]
    assert all(event["kind"] != "raw" for event in too_long)
    async with asyncio.timeout(30), rbee_stack.client() as client:
        async for event in client.follow_log(f"/v1/workers/{worker_id}/stream"):
            if event["kind"] == "raw" and "context size" in event["text"]:
                break
    assert event["stream"] == "stderr"
    assert event["src"]["id"] == f"{worker_id}/stderr"
    shown = await rbee_stack.keeper("logs", "--worker", worker_id, "--json")
    assert shown.exit_code == 0
    assert any("context size" in line for line in shown.stdout.splitlines())


async def test_concurrent_jobs_each_have_their_own_complete_log(rbee_stack: LocalStack) -> None:
    """Twelve at once on four slots, each with a canary word: nothing is mixed, nothing is missing."""
    await rbee_stack.run_job(infer())
    words = [f"canary{number}zq" for number in range(12)]
    prompts = [f"Repeat this word: {word}" for word in words]
    logs = await asyncio.gather(*(rbee_stack.run_job(infer(prompt, max_tokens=24)) for prompt in prompts))
    for log in logs:
        assert_whole(log)
        assert log[-1]["state"] == "completed"
        assert {event["job_id"] for event in log} == {log[0]["job_id"]}
        assert answer(log) == log[-1]["result"]["text"]
    for word, log in zip(words, logs, strict=True):
        others = [canary for canary in words if canary != word]
        assert not any(canary in json.dumps(log) for canary in others)
        narrated = [event for event in log if event["kind"] != "token" and event["kind"] != "end"]
        assert word not in json.dumps(narrated)


async def test_correlation_id_is_one_through_every_hop(rbee_stack: LocalStack) -> None:
    """From the keeper's header to the worker's environment, in every event and every response."""
    correlation_id = "trace-me.42"
    ran = await rbee_stack.keeper(
        "infer", "--json", "-m", MODEL, "--max-tokens", "4", "Hi", env={"RBEE_CORRELATION_ID": correlation_id}
    )
    events = [json.loads(line) for line in ran.stdout.splitlines()]
    assert_whole(events)
    assert {event["correlation_id"] for event in events} == {correlation_id}
    ready = first(events, "worker_ready")
    environment = Path(f"/proc/{ready['fields']['pid']}/environ").read_bytes().split(b"\0")
    assert f"CORRELATION_ID={correlation_id}".encode() in environment
    assert f"JOB_ID={ready['job_id']}".encode() in environment
    async with rbee_stack.client(correlation_id) as client:
        accepted = await client.submit({"operation": "queen_check"})
        assert accepted.correlation_id == correlation_id
        assert (await client.job(accepted.job_id)).correlation_id == correlation_id
        found = await client.jobs(correlation_id=correlation_id)
    assert {job.job_id for job in found.data} == {accepted.job_id, ready["job_id"]}
