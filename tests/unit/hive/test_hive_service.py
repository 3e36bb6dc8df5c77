from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from starlette.requests import Request

from rbee.contracts.heartbeats import DeviceInfo
from rbee.contracts.home import Home
from rbee.contracts.ids import new_boot_id, new_id
from rbee.contracts.operations import HiveCheck, ModelDelete, ModelDownload, WorkerSpawn, WorkerStop
from rbee.contracts.states import JobState, Reason
from rbee.errors import UnavailableError
from rbee.hive.app import submit
from rbee.hive.catalog import LocalModel
from rbee.hive.outbox import Outbox
from rbee.hive.service import HiveService, open_narration_file, read_hive_id
from rbee.hive.settings import HiveSettings
from rbee.hive.worker_wanted import WorkerWanted
from rbee.jobs import JobRegistry
from rbee.jobs.records import JobRecord
from rbee.jobs.store import all_jobs
from rbee.narration import FileSink, configure
from rbee.narration.emit import captured_narration
from rbee.testing.tiny_gguf import tiny_gguf
from tests.unit.hive.small_queen import SmallQueen, small_queen, until
from tests.unit.hive.test_model_store import REF, older_model


class Hive:
    """A hive's service, with an outbox that runs."""

    def __init__(self, service: HiveService, queen: SmallQueen) -> None:
        self.service = service
        self.queen = queen

    async def run(self, operation: HiveCheck | WorkerStop | WorkerSpawn, **values: str) -> JobState:
        """Give a command and wait for its end."""
        record = await self.service.registry.create(operation, correlation_id="c", **values)  # type: ignore[arg-type]
        job = self.service.runner.launch(record, operation)
        assert job.task is not None
        await job.task
        return (await self.service.registry.get(record.job_id)).state


@pytest.fixture
async def registry() -> AsyncIterator[JobRegistry]:
    registry = JobRegistry.open(None)
    yield registry
    await registry.close()


@pytest.fixture
async def hive(tmp_path: Path, registry: JobRegistry) -> AsyncIterator[Hive]:
    home = Home.at(tmp_path / "home")
    boot_id, hive_id = new_boot_id(), read_hive_id(home)
    with captured_narration("hive"):
        configure(actor="hive", hive_id=hive_id, sink=FileSink(open_narration_file(home, boot_id)))
        async with small_queen() as (queen, link):
            outbox = Outbox(link)
            settings = HiveSettings(home=home.root, models=tmp_path / "models", heartbeat_s=0.02)
            service = HiveService(
                settings, home, registry, link, outbox, hive_id=hive_id, boot_id=boot_id, url="http://hive"
            )
            running = asyncio.ensure_future(outbox.run())
            try:
                yield Hive(service, queen)
            finally:
                await service.close()
                await service.deliveries.close()
                running.cancel()
                await asyncio.gather(running, return_exceptions=True)
                outbox.close()


async def test_commands_of_an_earlier_boot_go_on_however_many_there_are(hive: Hive, registry: JobRegistry) -> None:
    registry.queued_max = 1000
    left = [(await registry.create(HiveCheck(), correlation_id="c")).job_id for _ in range(501)]
    await registry.start(left[0], owner="an earlier boot")

    await hive.service.open()
    await asyncio.gather(*(job.task for job in list(hive.service.runner.running.values()) if job.task))

    assert (await registry.store.counts())["completed"] == 501
    begun = await registry.get(left[0])
    assert (begun.owner, begun.attempt) == (hive.service.boot_id, 1)


async def test_stop_of_a_worker_that_an_earlier_boot_had_begun_completes_once_it_is_gone(
    hive: Hive, registry: JobRegistry
) -> None:
    operation = WorkerStop(worker_id=new_id("worker"))
    job_id = (await registry.create(operation, correlation_id="c")).job_id
    await registry.start(job_id, owner="an earlier boot")

    await hive.service.open()
    await asyncio.gather(*(job.task for job in list(hive.service.runner.running.values()) if job.task))

    assert (await registry.get(job_id)).state is JobState.COMPLETED


async def test_start_of_a_worker_that_is_gone_after_the_hive_was_away_fails_and_starts_no_second_one(
    hive: Hive, registry: JobRegistry
) -> None:
    worker_id = new_id("worker")
    operation = WorkerSpawn(model="smollm2:135m", worker_id=worker_id)
    job_id = (await registry.create(operation, correlation_id="c")).job_id
    await registry.start(job_id, owner="an earlier boot")
    await registry.update(job_id, worker_id=worker_id)

    await hive.service.open()
    await asyncio.gather(*(job.task for job in list(hive.service.runner.running.values()) if job.task))

    failed = await registry.get(job_id)
    assert (failed.state, failed.reason) == (JobState.FAILED, Reason.WORKER_FAILED)
    assert "ended while the hive was away" in (failed.message or "")


async def test_cancelled_command_of_an_earlier_boot_ends_cancelled(hive: Hive, registry: JobRegistry) -> None:
    job_id = (await registry.create(HiveCheck(), correlation_id="c")).job_id
    await registry.start(job_id, owner="an earlier boot")
    await registry.request_cancel(job_id)

    await hive.service.open()
    await asyncio.gather(*(job.task for job in list(hive.service.runner.running.values()) if job.task))

    assert (await registry.get(job_id)).state is JobState.CANCELLED


async def test_commands_that_a_stopped_hive_leaves_end_as_hive_lost(hive: Hive, registry: JobRegistry) -> None:
    job_id = (await registry.create(HiveCheck(), correlation_id="c")).job_id

    await hive.service.close()

    assert (await registry.get(job_id)).reason is Reason.HIVE_LOST


async def test_command_ends_with_how_far_the_hives_file_tells_of_it(hive: Hive, registry: JobRegistry) -> None:
    record = await registry.create(HiveCheck(lines=2), correlation_id="c", parent_job_id="job-of-the-queen")
    job = hive.service.runner.launch(record, HiveCheck(lines=2))
    assert job.task is not None
    await job.task

    source = f"{hive.service.hive_id}/{hive.service.boot_id}"
    page = await registry.read(record.job_id, 0)
    closing = next(
        event for event in map(msgspec.json.decode, page.events) if event.get("action") == "hive_complete"
    )
    size = closing["fields"]["sources"][source]
    story = (hive.service.home.hive / hive.service.boot_id).read_bytes()[:size]
    assert story.endswith(b"\n")
    assert story.count(b'"job_id":"job-of-the-queen"') == 3
    assert story.count(b'"action":"hive_check"') == 2


async def test_command_does_not_wait_for_a_queen_that_is_away(hive: Hive) -> None:
    await hive.queen.stop()

    async with asyncio.timeout(1.5):
        assert await hive.run(HiveCheck()) is JobState.COMPLETED


async def test_heartbeats_tell_the_whole_truth_and_come_back_after_the_queen_was_away(hive: Hive) -> None:
    beating = asyncio.ensure_future(hive.service.run_heartbeats())
    await until(lambda: len(hive.queen.heartbeats) >= 2)
    await hive.queen.stop()
    before = len(hive.queen.heartbeats)
    await hive.queen.start()
    await until(lambda: len(hive.queen.heartbeats) > before)
    beating.cancel()
    await asyncio.gather(beating, return_exceptions=True)

    beat = hive.queen.heartbeats[-1]
    assert (beat.boot_id, beat.url, beat.workers) == (hive.service.boot_id, "http://hive", [])


async def pulled(hive: Hive, operation: ModelDownload | ModelDelete) -> JobState:
    """Give a command about models and wait for its end."""
    record = await hive.service.registry.create(operation, correlation_id="c")
    job = hive.service.runner.launch(record, operation)
    assert job.task is not None
    await job.task
    return (await hive.service.registry.get(record.job_id)).state


async def test_heartbeats_tell_what_headers_say_also_of_older_manifests_and_go_on_meanwhile(
    hive: Hive, tmp_path: Path
) -> None:
    """The first one does not wait for the header, and a later one tells it."""
    older_model(tmp_path / "models")
    [unread] = (await hive.service.heartbeat()).models
    assert unread.quantization is None
    beating = asyncio.ensure_future(hive.service.run_heartbeats())
    await until(lambda: any(model.quantization for beat in hive.queen.heartbeats for model in beat.models))
    beating.cancel()
    await asyncio.gather(beating, return_exceptions=True)
    [model] = hive.queen.heartbeats[-1].models
    assert (model.quantization, model.context_tokens, model.purpose) == ("Q8_0", 2048, "generate")
    assert model.memory is not None


async def test_heartbeats_tell_a_damaged_file_with_its_fault_and_not_as_a_model(
    hive: Hive, tmp_path: Path
) -> None:
    older_model(tmp_path / "models", b"GGUF" + bytes(400))
    beating = asyncio.ensure_future(hive.service.run_heartbeats())
    await until(lambda: any(beat.unusable_models for beat in hive.queen.heartbeats))
    beating.cancel()
    await asyncio.gather(beating, return_exceptions=True)
    beat = hive.queen.heartbeats[-1]
    assert (beat.models, [broken.model for broken in beat.unusable_models]) == ([], [REF])


async def test_file_in_place_is_told_of_once_it_was_asked_for(hive: Hive, tmp_path: Path) -> None:
    path = tmp_path / "mine.gguf"
    path.write_bytes(tiny_gguf())
    assert (await hive.service.heartbeat()).models == []
    assert await pulled(hive, ModelDownload(model=str(path))) is JobState.COMPLETED
    [model] = (await hive.service.heartbeat()).models
    assert (model.model, model.path, model.quantization, model.sha256) == (str(path), str(path), "Q8_0", None)


async def test_removal_tells_what_became_free(hive: Hive, tmp_path: Path) -> None:
    older_model(tmp_path / "models")
    assert await pulled(hive, ModelDelete(model=REF)) is JobState.COMPLETED
    assert (await hive.service.heartbeat()).models == []
    assert await pulled(hive, ModelDelete(model=REF)) is JobState.FAILED


async def test_resumed_removal_of_what_is_gone_completes(hive: Hive, registry: JobRegistry) -> None:
    """The earlier boot had removed it and could not say so."""
    job_id = (await registry.create(ModelDelete(model=REF), correlation_id="c")).job_id
    await registry.start(job_id, owner="an earlier boot")

    await hive.service.open()
    await asyncio.gather(*(job.task for job in list(hive.service.runner.running.values()) if job.task))

    assert (await registry.get(job_id)).state is JobState.COMPLETED


async def test_worker_on_a_device_that_the_engine_cannot_use_is_refused_with_what_to_install(
    hive: Hive, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = DeviceInfo(
        device="cuda:0", name="x", memory_bytes=1, memory_free_bytes=1, is_usable=False, note="install a build."
    )
    monkeypatch.setattr(hive.service.machine, "devices", lambda: [gpu])
    operation = WorkerSpawn(model=REF, worker_id=new_id("worker"), device="cuda:0")
    assert await hive.run(operation) is JobState.FAILED
    [failed] = await all_jobs(hive.service.registry.store, JobState.FAILED)
    assert (failed.message or "").endswith("cannot be used: install a build.")


@pytest.mark.parametrize(
    ("device", "machine_free", "gpu_free", "said"),
    [
        ("cuda:0", 0, 10**12, None),
        ("cuda:0", 10**12, 2**20, "has 1 MiB of memory free on cuda:0."),
        ("cpu", 2**20, 10**12, "has 1 MiB of memory free."),
    ],
)
async def test_memory_that_counts_is_that_of_the_device_a_worker_is_for(
    hive: Hive,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    device: str,
    machine_free: int,
    gpu_free: int,
    said: str,
) -> None:
    older_model(tmp_path / "models")
    gpu = DeviceInfo(device="cuda:0", name="x", memory_bytes=10**12, memory_free_bytes=gpu_free)
    cpu = DeviceInfo(device="cpu", name="x", memory_bytes=10**12, memory_free_bytes=machine_free)
    machine = msgspec.structs.replace(hive.service.machine.info(), memory_free_bytes=machine_free)
    monkeypatch.setattr(hive.service.machine, "devices", lambda: [cpu, gpu])
    monkeypatch.setattr(hive.service.machine, "info", lambda: machine)
    started: list[WorkerWanted] = []

    async def start(wanted: WorkerWanted, hive_id: str) -> None:
        started.append(wanted)

    monkeypatch.setattr(hive.service.workers, "start", start)
    await hive.run(WorkerSpawn(model=REF, worker_id=new_id("worker"), device=device))

    failed = await all_jobs(hive.service.registry.store, JobState.FAILED)
    assert [(one.message or "").endswith(str(said)) for one in failed] == ([True] if said else [])
    assert bool(started) is (said is None)


async def test_model_of_a_worker_that_is_about_to_start_makes_no_room_for_another_one(
    hive: Hive, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    older_model(tmp_path / "models")
    spared: list[set[str]] = []
    find = hive.service.models.find

    def watched(ref: str) -> LocalModel | None:
        spared.append(hive.service._spared_models())
        return find(ref)

    monkeypatch.setattr(hive.service.models, "find", watched)
    await hive.run(WorkerSpawn(model=REF, worker_id="none"))

    assert spared == [{REF}]
    assert hive.service._spared_models() == set()


async def test_limit_of_workers_is_told(hive: Hive) -> None:
    hive.service.settings = msgspec.structs.replace(hive.service.settings, workers_max=2)
    assert (await hive.service.heartbeat()).workers_max == 2


async def test_heartbeats_end_loudly_when_the_hive_cannot_look_at_itself(
    hive: Hive, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken() -> None:
        raise PermissionError("the models")

    monkeypatch.setattr(hive.service.models, "survey", broken)

    with pytest.raises(PermissionError):
        async with asyncio.timeout(5):
            await hive.service.run_heartbeats()


def command(body: bytes) -> Request:
    async def receive() -> dict[str, object]:
        return {"type": "http.request", "body": body, "more_body": False}

    headers = [(b"content-type", b"application/json")]
    state = {"correlation_id": "c", "principal": "local"}
    scope = {"type": "http", "method": "POST", "headers": headers, "query_string": b"", "state": state}
    return Request(scope, receive)


async def test_hive_that_stops_takes_no_command(hive: Hive) -> None:
    await hive.service.close()

    with pytest.raises(UnavailableError, match="stopping"):
        await submit(hive.service, command(b'{"operation":"hive_check"}'))


async def test_command_that_comes_while_the_hive_begins_to_stop_is_lost_and_not_begun(
    hive: Hive, registry: JobRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is written down, and by then the hive has stopped what it ran: a worker started now would stay."""
    create = registry.create

    async def slow(*values: Any, **named: Any) -> JobRecord:
        await hive.service.close()
        return await create(*values, **named)

    monkeypatch.setattr(registry, "create", slow)
    record = await submit(hive.service, command(b'{"operation":"hive_check"}'))

    assert not hive.service.runner.running
    assert (await registry.get(record.job_id)).reason is Reason.HIVE_LOST


async def test_file_of_an_earlier_boot_is_delivered_behind_the_hives_own(hive: Hive) -> None:
    before = hive.service.home.hive / "boot0"
    before.write_bytes(b"said before\n")

    await hive.service.open()
    await until(lambda: not before.exists())

    assert hive.queen.taken[f"{hive.service.hive_id}/boot0"] == b"said before\n"


def test_hive_id_is_made_once(tmp_path: Path) -> None:
    home = Home.at(tmp_path)

    assert read_hive_id(home) == read_hive_id(home)
