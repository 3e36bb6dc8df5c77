"""A model whose workers die while loading is given up for a while, and disturbs nobody."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

from rbee.testing.counting import Behaviour, Count, behave, loads_of
from rbee.testing.oracles import assert_all
from tests.chaos.counting_stack import counting_stack, infer, model, told

STARTS_MAX = 5
END_WITHIN_S = 60.0


async def test_crash_loop_is_refused_after_five_starts_and_its_queue_ends(
    tmp_path: Path, figure: Callable[[str, object], None]
) -> None:
    """All its jobs end, with the crash's own words; another model is served beside it."""
    sick, sound = model(tmp_path, "sick"), model(tmp_path, "sound")
    behave(sick, Behaviour(load="crash"))
    async with counting_stack(tmp_path, slots=2) as stack, stack.client() as client, asyncio.timeout(END_WITHIN_S):
        counts = [Count(first=100 * number) for number in range(1, 13)]
        asked = [
            await client.submit(infer(sick if number % 2 else sound, count, max_tokens=5, attempts=20))
            for number, count in enumerate(counts)
        ]
        ended = await asyncio.gather(
            *(told(client, job.job_id, count, max_tokens=5) for job, count in zip(asked, counts, strict=True))
        )
        last = await client.submit(infer(sick, Count(first=1), max_tokens=5))
        refused = await told(client, last.job_id, Count(first=1), max_tokens=5)
    assert_all([*ended, refused], [])
    views = [one.view for one in ended]
    assert [view.state for view in views[::2]] == ["completed"] * 6
    assert [(view.state, view.reason) for view in views[1::2]] == [("failed", "crash_loop")] * 6
    figure("starts of a model that crashes", loads_of(sick))
    end = refused.events()[-1]
    assert loads_of(sick) == STARTS_MAX
    assert (end["state"], end["reason"], end["error"]["retryable"]) == ("failed", "crash_loop", True)
    assert not any(event.get("action") == "hive_receive" for event in refused.events())
