"""Models as a person has them: pulled, followed, cancelled, gone on with, shown, removed, by real programs."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

from rbee.contracts.views import Progress
from rbee.testing.stack import LocalStack
from rbee.testing.tiny_gguf import tiny_gguf
from tests.integration.local_hub import LocalHub, serving

MIB = 2**20
REF = "hf:org/repo:Q4_K_M"
MODELS = {
    f"tiny-{name}.gguf": tiny_gguf(elements=MIB // 2, salt=name.encode()) for name in ("Q4_K_M", "Q8_0", "Q2_K")
}
SIZE = len(MODELS["tiny-Q4_K_M.gguf"])
CONFIG = f'[aliases]\nmine = "{REF}"\n[models."{REF}"]\nslots = 3\npinned = true\n'


@asynccontextmanager
async def stack_with_hub(**env: str) -> AsyncIterator[tuple[LocalStack, LocalHub]]:
    """Run a stack whose models come from a hub on loopback."""
    async with AsyncExitStack() as inner:
        hub = await inner.enter_async_context(serving(LocalHub(files=dict(MODELS))))
        given = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", **env}
        yield await inner.enter_async_context(LocalStack(config=CONFIG, env=given)), hub


async def listed(stack: LocalStack) -> dict[str, Any]:
    """Return what the one hive has, as `rbee models list --json` tells it."""
    finished = await stack.keeper("models", "list", "--json")
    assert finished.exit_code == 0, finished.stderr
    [hive] = json.loads(finished.stdout)
    return dict(hive)


async def until_listed(stack: LocalStack, part: str, names: list[str]) -> list[dict[str, Any]]:
    """Wait until the hive's heartbeats tell of these models."""
    async with asyncio.timeout(30):
        while True:
            found = (await listed(stack))[part]
            if [model["model"] for model in found] == names:
                return list(found)


async def held_download(stack: LocalStack, hub: LocalHub) -> str:
    """Begin a download that stands still in the middle; returns the job, which shows how far it is."""
    hub.hold = MIB
    async with stack.client() as client:
        job_id = (await client.submit({"operation": "model_download", "model": "mine"})).job_id
        async with asyncio.timeout(30):
            half = Progress(done=MIB, total=SIZE, unit="bytes")
            while (await client.job(job_id)).progress != half:  # noqa: ASYNC110  # nobody announces it
                await asyncio.sleep(0.02)
    return job_id


async def test_models_are_pulled_together_listed_shown_and_removed() -> None:
    """By reference and by alias."""
    async with stack_with_hub() as (stack, _):
        pulled = await stack.keeper("models", "pull", "mine", "hf:org/repo:Q8_0", "hf:org/repo:Q2_K")
        assert (pulled.exit_code, pulled.stdout) == (0, "")
        assert len(re.findall(r"is here \(2 MB\), its digest checked", pulled.stderr)) == 3
        found = await until_listed(stack, "models", ["hf:org/repo:Q2_K", REF, "hf:org/repo:Q8_0"])
        told = found[1]
        assert (told["quantization"], told["context_tokens"], told["purpose"]) == ("Q8_0", 2048, "generate")
        assert (told["architecture"], told["has_chat_template"]) == ("llama", True)
        assert told["memory"]["weights_bytes"] == SIZE

        shown = json.loads((await stack.keeper("models", "show", "mine", "--json")).stdout)
        assert (shown["model"], shown["aliases"], shown["settings"]["slots"]) == (REF, ["mine"], 3)
        assert shown["copies"][0]["needed_bytes"] == (
            SIZE + told["memory"]["work_bytes"] + told["memory"]["cache_bytes_per_token"] * 3 * 4096
        )
        assert "memory in all, 3 slots of 4096 tokens" in (await stack.keeper("models", "show", REF)).stdout

        recommended = json.loads((await stack.keeper("models", "recommend", "--json")).stdout)
        fits = {fit["model"]: fit["fits"] for fit in recommended["devices"][0]["models"]}
        assert fits[REF] is True

        assert (await stack.keeper("models", "rm", "mine")).exit_code == 0
        await until_listed(stack, "models", ["hf:org/repo:Q2_K", "hf:org/repo:Q8_0"])


async def test_one_of_several_that_cannot_be_had_does_not_hold_up_the_others() -> None:
    async with stack_with_hub() as (stack, _):
        pulled = await stack.keeper("models", "pull", "hf:org/none", "smolm2:135m", "hf:org/repo:Q8_0")
        assert pulled.exit_code == 2
        assert "did you mean `smollm2:135m`" in pulled.stderr
        assert "no repository or file org/none" in pulled.stderr
        await until_listed(stack, "models", ["hf:org/repo:Q8_0"])


async def test_download_cancelled_from_elsewhere_is_told_kept_and_gone_on_with() -> None:
    async with stack_with_hub() as (stack, hub):
        job_id = await held_download(stack, hub)
        fetching = {"done_bytes": 0, "total_bytes": None}
        async with asyncio.timeout(30):
            while fetching["done_bytes"] != MIB:  # heartbeats tell of it a little later
                [fetching] = await until_listed(stack, "downloads", [REF])
        assert fetching["total_bytes"] == SIZE
        assert (await stack.keeper("jobs", "cancel", job_id)).exit_code == 0
        assert (await stack.log(job_id))[-1]["state"] == "cancelled"
        [part] = await until_listed(stack, "unusable_models", [REF])
        assert (part["size_bytes"], (await listed(stack))["downloads"]) == (MIB, [])

        hub.hold = None
        again = await stack.keeper("models", "pull", "mine")
        assert again.exit_code == 0
        assert "Going on with hf:org/repo:Q4_K_M: 1 of 2 MB are here" in again.stderr
        assert hub.downloads() == [None, f"bytes={MIB}-"]
        assert (await listed(stack))["unusable_models"] == []


async def test_download_of_a_killed_hive_goes_on_where_it_was_in_the_same_job() -> None:
    async with stack_with_hub() as (stack, hub):
        job_id = await held_download(stack, hub)
        assert stack.hive is not None
        await stack.hive.kill()
        hub.hold = None
        await stack.start_hive()
        log = await stack.log(job_id)
        assert log[-1]["state"] == "completed"
        assert log[-1]["result"]["bytes"] == SIZE
        assert hub.downloads() == [None, f"bytes={MIB}-"]
        async with stack.client() as client:
            assert (await client.job(job_id)).progress == Progress(done=SIZE, total=SIZE, unit="bytes")


async def test_model_used_least_lately_that_is_not_pinned_makes_room_and_the_log_tells_it() -> None:
    async with stack_with_hub(RBEE_MODELS_MAX_BYTES=str(int(2.5 * SIZE))) as (stack, _):
        for name in ("Q4_K_M", "Q8_0"):
            assert (await stack.keeper("models", "pull", f"hf:org/repo:{name}")).exit_code == 0
        third = await stack.keeper("models", "pull", "hf:org/repo:Q2_K")
        assert third.exit_code == 0
        assert re.search(
            r"hive_evict_model: Removing hf:org/repo:Q8_0 \(2 MB\).* for hf:org/repo:Q2_K", third.stderr
        )
        await until_listed(stack, "models", ["hf:org/repo:Q2_K", REF])
