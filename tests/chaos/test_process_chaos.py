"""Jobs that are being answered outlive whatever is killed or stopped under them, and their readers see it all."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from rbee.testing import LocalStack
from rbee.testing.counting import Behaviour, behave
from rbee.testing.oracles import Told, assert_all, assert_port_is_free, assert_private
from tests.chaos.conftest import Size
from tests.chaos.counting_stack import counting_stack, home_texts, model
from tests.chaos.crowd import Crowd
from tests.chaos.faults import Fault, Faults

Figure = Callable[[str, object], None]
END_WITHIN_S = 120.0


def schedule(size: Size, choose: random.Random) -> list[Fault]:
    """Return what is done, in a random order."""
    times: dict[Fault, int] = {
        "kill queen": size.of(3, 50),
        "kill hive": size.of(3, 50),
        "kill worker": size.of(5, 100),
        "stop queen": size.of(1, 17),
        "stop hive": size.of(1, 17),
        "stop worker": size.of(1, 16),
    }
    faults = [fault for fault, count in times.items() for _ in range(count)]
    choose.shuffle(faults)
    return faults


@pytest.mark.timeout(3600)
async def test_every_job_is_answered_rightly_whatever_is_killed(
    tmp_path: Path, size: Size, seed: int, figure: Figure
) -> None:
    """Queen, hive and workers are killed and stopped under answers that are being read: none loses."""
    choose = random.Random(seed)
    models = [model(tmp_path, name) for name in ("one", "two")]
    for path in models:
        behave(path, Behaviour(rate=size.of(20, 12)))
    async with counting_stack(tmp_path, slots=12) as stack:
        crowd = Crowd(
            stack.url, models, choose, jobs=size.of(60, 1000), width=size.of(12, 20), tokens=range(40, 90)
        )
        faults = Faults(stack, crowd, choose, (1.0, size.of(2, 10)))
        async with asyncio.TaskGroup() as group:
            crowding = group.create_task(crowd.run())
            await faults.all(schedule(size, choose))
            crowd.leave()
            async with asyncio.timeout(END_WITHIN_S * size.of(1, 10)):
                await crowding
        url, told = stack.url, await crowd.told()
        _report(figure, crowd, faults, told)
        assert_all(told, crowd.readers)
        assert_private(home_texts(stack.home), [one.canary for one in told])
    assert [one.view for one in told if one.view.state != "completed"] == []
    _assert_gone(stack, url)
    figure("orphans", 0)


def _report(figure: Figure, crowd: Crowd, faults: Faults, told: Sequence[Told]) -> None:
    figure("jobs", dict(Counter(str(one.view.state) for one in told)))
    figure("faults under an answer with a reader", dict(faults.done))
    figure("attempts of a job, most", max(one.view.attempt for one in told))
    figure("readers", len(crowd.readers))
    figure("connections tried", sum(reader.connections for reader in crowd.readers))
    figure("events delivered", sum(len(reader.order) for reader in crowd.readers))
    figure("events repeated", sum(reader.repeats for reader in crowd.readers))
    figure("events lost", sum(reader.last_seq - reader.after - len(reader.events) for reader in crowd.readers))
    for what, times_s in sorted(faults.times_s.items()):
        times_s.sort()
        figure(f"{what}, p50 / max", f"{times_s[len(times_s) // 2]:.2f} / {times_s[-1]:.2f} s")


def _assert_gone(stack: LocalStack, url: str) -> None:
    assert stack.processes() == []
    assert_port_is_free(url)
