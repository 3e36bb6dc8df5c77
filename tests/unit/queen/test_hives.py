from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from rbee.contracts.ids import new_id
from rbee.contracts.states import HiveState, WorkerState
from rbee.errors import NotFoundError
from rbee.queen.hives import HiveBook, hive_view, worker_view
from tests.unit.queen.queen_stage import Parts, heartbeat, worker_info

WORKER = new_id("worker")


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def book(clock: Clock) -> HiveBook:
    return HiveBook(stale_s=3, lost_s=15, clock=clock)


@pytest.mark.parametrize(
    ("silent_s", "state"),
    [
        (0, HiveState.LIVE),
        (2.9, HiveState.LIVE),
        (3, HiveState.STALE),
        (14.9, HiveState.STALE),
        (15, HiveState.LOST),
    ],
)
async def test_hive_is_live_stale_and_lost_by_its_silence(
    book: HiveBook, clock: Clock, silent_s: float, state: HiveState
) -> None:
    book.beat("h", heartbeat(worker_info(WORKER)))
    clock.now += silent_s

    assert book.state_of(book.hive("h")) is state
    assert [worker.worker_id for worker in book.workers()] == ([] if state is HiveState.LOST else [WORKER])


async def test_news_of_one_hive_are_its_own_heartbeats_and_the_ends_of_its_workers(book: HiveBook) -> None:
    book.beat("h", heartbeat(worker_info(WORKER)))
    book.beat("other", heartbeat())
    tells: list[Callable[[], None]] = [
        lambda: book.beat("h", heartbeat(worker_info(WORKER))),
        lambda: book.worker_gone(WORKER),
    ]
    for tell in tells:
        waiting = asyncio.ensure_future(book.news_of("h", 60))
        await asyncio.sleep(0)
        book.beat("other", heartbeat())
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert not waiting.done()
        tell()
        async with asyncio.timeout(5):
            await waiting


async def test_returning_hive_is_live_again(book: HiveBook, clock: Clock) -> None:
    book.beat("h", heartbeat())
    clock.now += 20
    book.beat("h", heartbeat(boot_id="boot2"))

    assert book.state_of(book.hive("h")) is HiveState.LIVE


async def test_worker_that_is_gone_stays_gone_while_an_older_heartbeat_names_it(book: HiveBook) -> None:
    book.beat("h", heartbeat(worker_info(WORKER)))
    book.worker_gone(WORKER)
    book.beat("h", heartbeat(worker_info(WORKER)))

    assert list(book.workers()) == []
    with pytest.raises(NotFoundError):
        book.worker(WORKER)


async def test_gone_workers_are_not_remembered_for_ever(book: HiveBook, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rbee.queen.hives.GONE_MAX", 10)
    for _ in range(100):
        book.worker_gone(new_id("worker"))

    assert len(book._gone) == 10


async def test_worker_that_is_gone_is_not_brought_back_by_a_late_heartbeat(book: HiveBook) -> None:
    book.beat("h", heartbeat(worker_info(WORKER)))
    book.worker_gone(WORKER)
    book.beat("h", heartbeat())
    book.beat("h", heartbeat(worker_info(WORKER)))

    assert list(book.workers()) == []


@pytest.mark.parametrize("state", [state for state in WorkerState if state is not WorkerState.READY])
async def test_only_a_ready_worker_can_be_asked(book: HiveBook, state: WorkerState) -> None:
    book.beat("h", heartbeat(worker_info(WORKER, state=state)))
    assert not book.has_ready(WORKER, "h")
    book.beat("h", heartbeat(worker_info(WORKER)))
    assert book.has_ready(WORKER, "h")


async def test_worker_that_another_hive_claims_is_not_taken_for_the_first_ones(book: HiveBook) -> None:
    book.beat("a", heartbeat(worker_info(WORKER, url="http://stranger")))
    book.beat("b", heartbeat(worker_info(WORKER, url="http://own")))

    assert book.worker(WORKER, "b").info.url == "http://own"
    assert book.has_ready(WORKER, "b")
    assert not book.has_ready(WORKER, "c")


async def test_listeners_hear_of_heartbeats_and_ends(book: HiveBook) -> None:
    heard: list[str] = []
    book.listen(heard.append)

    book.beat("h", heartbeat(worker_info(WORKER)))
    book.worker_gone(WORKER)

    assert heard == ["h", "h"]


async def test_unknown_hive_is_not_found(book: HiveBook) -> None:
    with pytest.raises(NotFoundError):
        book.hive("h")


async def test_views_show_what_this_queen_placed(queen: Parts) -> None:
    queen.book.beat(queen.hive_id, heartbeat(worker_info(WORKER)))
    queen.place("job-1", WORKER)

    shown = hive_view(queen.book, queen.book.hive(queen.hive_id), queen.workers)

    assert [(worker.slots_used, worker.state) for worker in shown.workers] == [(1, WorkerState.READY)]
    assert not hasattr(shown.workers[0], "token")


@pytest.mark.parametrize(
    ("state", "shown"),
    [(WorkerState.READY, WorkerState.DRAINING), (WorkerState.FAILED, WorkerState.FAILED)],
)
async def test_worker_that_drains_is_shown_so(queen: Parts, state: WorkerState, shown: WorkerState) -> None:
    queen.book.beat(queen.hive_id, heartbeat(worker_info(WORKER, state=state)))
    queen.workers.drain(WORKER)

    assert worker_view(queen.book.worker(WORKER), queen.workers).state is shown
