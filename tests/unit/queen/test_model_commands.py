"""What a queen does about models: names and aliases, and how far a download is."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from rbee.client import JobClient
from rbee.contracts.heartbeats import DownloadInfo, UnusableModel
from rbee.contracts.model_settings import ModelSettings, ModelTable
from rbee.contracts.operations import HiveCheck, ModelDelete, ModelDownload, WorkerSpawn
from rbee.contracts.views import Progress
from rbee.errors import ModelNotFoundError
from tests.unit.queen.queen_stage import MODEL, heartbeat, narration
from tests.unit.queen.scripted_hive import Queen, ScriptedHive, until


def downloaded(job_id: str, **fields: Any) -> bytes:
    return narration("model_download", "Some bytes.", actor="hive", job_id=job_id, fields=fields)


async def begun(queen: Queen, hive: ScriptedHive, operation: ModelDownload | HiveCheck) -> str:
    """Give the hive a command that stays under way."""
    hive.may_go_on.clear()
    job_id = await queen.submit(operation)
    await until(lambda: len(hive.commands) == 1)
    return job_id


async def test_alias_reaches_the_hive_as_the_model_it_stands_for(whole_queen: Queen) -> None:
    hive = await whole_queen.live_hive()
    whole_queen.service.models = ModelTable(aliases={"small": MODEL})
    job_id = await whole_queen.submit(ModelDownload(model="small"))
    assert (await whole_queen.end(job_id))["state"] == "completed"
    [command] = hive.commands
    assert isinstance(command, ModelDownload)
    assert (command.model, (await whole_queen.registry.get(job_id)).model) == (MODEL, MODEL)


async def test_worker_asked_for_by_an_alias_gets_the_model_it_stands_for(whole_queen: Queen) -> None:
    hive = await whole_queen.live_hive()
    whole_queen.service.models = ModelTable(aliases={"small": MODEL})
    assert (await whole_queen.end(await whole_queen.submit(WorkerSpawn(model="small"))))["state"] == "completed"
    assert [info.model for info in hive.workers] == [MODEL]


@pytest.mark.parametrize(("given", "meant"), [("smal", "small"), ("smollm2:135", MODEL), ("qwem:7b", "qwen:7b")])
async def test_misspelt_name_is_refused_with_the_nearest_of_all_that_are_known(
    whole_queen: Queen, given: str, meant: str
) -> None:
    """Aliases, models with a short name of their own, and whatever hives have."""
    await whole_queen.live_hive(models={"qwen:7b": 1})
    whole_queen.service.models = ModelTable(aliases={"small": MODEL})
    with pytest.raises(ModelNotFoundError, match=f"did you mean `{meant}`"):
        await whole_queen.submit(ModelDownload(model=given))


async def test_job_of_a_download_shows_how_far_it_is(whole_queen: Queen) -> None:
    hive = await whole_queen.live_hive()
    job_id = await begun(whole_queen, hive, ModelDownload(model=MODEL))
    source = f"{hive.hive_id}/boot"
    await hive.say(source, downloaded(job_id, done_bytes=10, total_bytes=None))
    assert (await whole_queen.registry.view(job_id)).progress == Progress(done=10, total=None, unit="bytes")
    lines = [downloaded(job_id, done_bytes=done, total_bytes=100) for done in (20, 30)]
    await hive.say(source, *lines, narration("model_download", "No number.", actor="hive", job_id=job_id))
    assert (await whole_queen.registry.view(job_id)).progress == Progress(done=30, total=100, unit="bytes")


async def test_progress_of_a_job_of_another_kind_is_left_alone(whole_queen: Queen) -> None:
    hive = await whole_queen.live_hive()
    job_id = await begun(whole_queen, hive, HiveCheck())
    await hive.say(f"{hive.hive_id}/boot", downloaded(job_id, done_bytes=10, total_bytes=100))
    assert (await whole_queen.registry.view(job_id)).progress is None


async def test_removal_goes_to_the_hive_that_has_the_model_whole_or_not(whole_queen: Queen) -> None:
    """Though another one has more memory free."""
    holder = await whole_queen.live_hive(free=1, models={"qwen:7b": 1})
    await whole_queen.live_hive(models={})
    job_id = await whole_queen.submit(ModelDelete(model="qwen:7b"))
    assert (await whole_queen.end(job_id))["state"] == "completed"
    assert [type(command) for command in holder.commands] == [ModelDelete]


async def test_removal_of_what_several_hives_have_asks_which(whole_queen: Queen) -> None:
    hives = [await whole_queen.live_hive(models={"qwen:7b": 1}) for _ in range(2)]
    end = await whole_queen.end(await whole_queen.submit(ModelDelete(model="qwen:7b")))
    assert (end["state"], end["error"]["code"], end["error"]["param"]) == ("failed", "invalid", "hive_id")
    assert all(hive.hive_id in end["error"]["message"] for hive in hives)


async def test_settings_in_force_and_what_a_hive_fetches_can_be_read(whole_queen: Queen) -> None:
    hive = await whole_queen.live_hive()
    whole_queen.service.models = ModelTable(aliases={"small": MODEL}, models={MODEL: ModelSettings(slots=2)})
    download = DownloadInfo(model=MODEL, done_bytes=1, total_bytes=2)
    broken = UnusableModel(model="x", size_bytes=1, path="/x", fault="it is cut short")
    told = heartbeat(url=hive.url)
    told = msgspec.structs.replace(told, downloads=[download], unusable_models=[broken], workers_max=3)
    whole_queen.service.book.beat(hive.hive_id, told)
    async with JobClient(await whole_queen.url()) as client:
        settings = await client.model_settings()
        [seen] = await client.hives()
    own = settings.of("small")
    assert (own.slots, own.context_tokens, own.keep_alive_s) == (2, 4096, 300.0)
    assert (seen.downloads, seen.unusable_models, seen.workers_max) == ([download], [broken], 3)
