"""A disk that is full, broken or read-only: refused in clear words, nothing by half, on without a restart."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import signal
import sqlite3
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from rbee.errors import RbeeError
from rbee.testing import LocalStack
from tests.chaos.conftest import Size
from tests.chaos.job_life import STEPS
from tests.chaos.registry_life import Life
from tests.chaos.strace_stage import Point, require_strace

FAULTS = {
    "ENOSPC": ("pwrite64", "ftruncate", "fallocate"),
    "EIO": ("pwrite64", "fsync", "fdatasync", "ftruncate", "pread64"),
    "EROFS": ("pwrite64", "ftruncate"),
}
SPELL_MAX = 12
READS_TO_OPEN = 15  # what fails while the file is opened is the start's to tell
DISK_BYTES = 8 * 2**20


@pytest.fixture
def life(tmp_path: Path) -> Life:
    require_strace()
    return Life(tmp_path)


def _endured(life: Life, error: str, point: Point, spell: int) -> list[dict[str, Any]]:
    """Live the jobs' lives while some calls in a row fail; returns what was said."""
    life.prepare()
    window = f"{point.number}..{point.number + spell - 1}"
    done = life.run("endure", f"{point.call}:error={error}:when={window}")
    assert "Traceback" not in done.stderr, f"{error} at {point} for {spell}: {done.stderr[-2000:]}"
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_registry_whose_writes_fail_for_a_while_refuses_clearly_and_goes_on(
    life: Life, size: Size, seed: int, figure: Callable[[str, object], None]
) -> None:
    life.prepare()
    choice = random.Random(seed)
    calls = sorted({call for calls in FAULTS.values() for call in calls})
    by_call = life.points(calls)
    cases = [
        (error, point)
        for error, calls in FAULTS.items()
        for point in by_call
        if point.call in calls and (point.call != "pread64" or point.number > READS_TO_OPEN)
    ]
    refusals: Counter[int] = Counter()
    messages = set()
    for error, point in choice.sample(cases, min(size.of(8, 500), len(cases))):
        said = _endured(life, error, point, choice.randint(1, SPELL_MAX))
        refused = [line for line in said if "refused" in line]
        for line in refused:
            assert line["status"] in (503, 507) or line["refused"] == "open", line
            assert line["is_unchanged"] is not False, f"{error} at {point}: {line}"
            messages.add(line["message"])
            refusals[line["status"]] += 1
        assert [line["acknowledged"] for line in said if "acknowledged" in line] == list(range(len(STEPS)))
        assert said[-2:] == [{"is_as_ever": True}, {"closed": True}], f"{error} at {point}"
    assert refusals[507]
    figure("places where a call could fail", len(cases))
    figure("refusals by status", dict(refusals))
    figure("what was said", sorted(messages))


@pytest.fixture
def small_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A disk of a few MiB, on which every temporary directory is made meanwhile."""
    place = tmp_path / "disk"
    place.mkdir()
    with _mounted(place, DISK_BYTES) as disk:
        monkeypatch.setattr(tempfile, "tempdir", str(disk))
        yield disk


@contextlib.contextmanager
def _mounted(place: Path, size_bytes: int) -> Iterator[Path]:
    """Mount a small disk, or skip."""
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size_bytes},mode=700", "tmpfs", str(place)]
    mounted = subprocess.run(mount, capture_output=True, text=True, check=False)
    if mounted.returncode != 0:
        pytest.skip(f"a small disk cannot be mounted here: {mounted.stderr.strip()}")
    try:
        yield place
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


def _fill(disk: Path) -> Path:
    """Take all the room there is; returns what to remove to give it back."""
    ballast = disk / "ballast"
    with ballast.open("ab", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(b"x" * 4096):
            pass
    return ballast


async def _keep_full(disk: Path, seconds: float) -> None:
    """Take all the room again and again, also what a hive gives back of what it has read; then give it back."""
    until = asyncio.get_running_loop().time() + seconds
    while asyncio.get_running_loop().time() < until:
        ballast = _fill(disk)
        await asyncio.sleep(0.002)
    ballast.unlink()


async def _refused(stack: LocalStack, operation: dict[str, Any]) -> RbeeError:
    """Submit until the programs have used up what was left of the room in files they have already."""
    async with asyncio.timeout(30), stack.client() as client:
        while True:
            try:
                job_id = (await client.submit(operation)).job_id
            except RbeeError as error:
                return error
            log = [event async for event in client.follow(job_id)]
            assert log[-1]["kind"] == "end"


async def test_stack_whose_home_is_full_refuses_clearly_answers_questions_and_goes_on_when_there_is_room(
    small_disk: Path, figure: Callable[[str, object], None]
) -> None:
    async with LocalStack() as stack:
        before = await stack.run_job({"operation": "hive_check", "lines": 2})
        ballast = _fill(small_disk)
        error = await _refused(stack, {"operation": "queen_check", "lines": 50})
        async with stack.client() as client:
            listed = {job.job_id for job in (await client.jobs()).data}
            assert (await client.job(before[0]["job_id"])).state == "completed"
            assert [event async for event in client.follow(before[0]["job_id"])] == before
        assert (error.status, error.retryable) == (507, True), error
        figure("what a full home says", error.message)
        ballast.unlink()
        for operation in ("queen_check", "hive_check"):
            log = await stack.run_job({"operation": operation})
            assert (log[-1]["kind"], log[-1]["state"]) == ("end", "completed"), log
            assert [event["seq"] for event in log] == list(range(1, len(log) + 1))
            assert log[0]["job_id"] not in listed
        assert await stack.until_hive_is_live()


async def test_answer_that_its_worker_can_no_longer_write_fails_and_the_next_one_is_whole(
    rbee_models: Path, figure: Callable[[str, object], None]
) -> None:
    asked = {"operation": "infer", "prompt": "Count", "max_tokens": 3000, "ignore_eos": True}
    async with LocalStack(models=rbee_models) as stack, asyncio.TaskGroup() as group:
        with _mounted(stack.home / "workers", 256 * 1024) as disk:
            tokens = 0
            async with asyncio.timeout(90), stack.client() as client:
                job_id = (await client.submit(asked)).job_id
                async for event in client.follow(job_id):
                    tokens += event["kind"] == "token"
                    if tokens == 20:
                        filling = group.create_task(_keep_full(disk, 1.0))
            figure("how it ended", (event["state"], event["reason"], event["message"]))
            assert (event["kind"], event["state"], event["reason"]) == ("end", "failed", "overloaded")
            assert event["error"]["code"] == "storage_full"
            await filling
            log = await stack.run_job({**asked, "max_tokens": 5})
            assert log[-1]["state"] == "completed", log[-1]
            assert log[-1]["result"]["usage"]["completion_tokens"] == 5


async def test_hive_that_died_starts_and_adopts_its_worker_once_its_full_home_has_room(
    rbee_models: Path, small_disk: Path, figure: Callable[[str, object], None]
) -> None:
    asked = {"operation": "infer", "prompt": "Say hello.", "max_tokens": 4}
    async with LocalStack(models=rbee_models) as stack:
        first = await stack.run_job(asked)
        assert stack.hive is not None
        stack.hive.signal(signal.SIGKILL)
        await stack.hive.wait()
        with contextlib.closing(sqlite3.connect(stack.home / "hive.db")) as registry:
            registry.execute("PRAGMA wal_checkpoint(TRUNCATE)")  # or the hive makes itself room by doing so
        ballast = _fill(small_disk)
        refused = await stack.program("rbee-hive", "--port", "0", "--queen-url", stack.url)
        assert (refused.exit_code, "No space left on device" in refused.stderr) == (3, True), refused
        assert "Traceback" not in refused.stderr, refused.stderr
        figure("what a hive says that cannot start", refused.stderr.strip())
        ballast.unlink()
        await stack.start_hive()
        await stack.until_hive_is_live()
        again = await stack.run_job(asked)
        assert again[-1]["state"] == "completed", again[-1]
        assert "worker_startup" in [event.get("action") for event in first]
        assert "worker_startup" not in [event.get("action") for event in again]
