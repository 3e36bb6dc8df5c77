from __future__ import annotations

import pytest

from rbee.contracts.ids import new_id
from rbee.contracts.model_settings import ModelTable
from rbee.contracts.states import WorkerState
from rbee.queen.idle import IdleWorkers
from tests.unit.queen.queen_stage import Parts, heartbeat, worker_info

WORKER = new_id("worker")


async def _refuse(worker_id: str, idle_s: float) -> None:
    raise AssertionError(worker_id)


@pytest.fixture
def idle(queen: Parts) -> IdleWorkers:
    return IdleWorkers(queen.book, queen.workers, models=ModelTable(), keep_alive_s=10, stop=_refuse)


def _is_there(queen: Parts, state: WorkerState = WorkerState.READY) -> None:
    queen.book.beat(queen.hive_id, heartbeat(worker_info(WORKER, state=state)))


async def test_worker_is_idle_once_nobody_needed_it_for_the_time(queen: Parts, idle: IdleWorkers) -> None:
    _is_there(queen)

    assert idle.idle(0) == {}
    assert idle.idle(9.9) == {}
    assert list(idle.idle(10)) == [WORKER]
    assert idle.idle(10.1) == {}


async def test_worker_that_was_busy_is_idle_from_its_last_job_on(queen: Parts, idle: IdleWorkers) -> None:
    _is_there(queen)
    idle.idle(0)
    placement = queen.place("job-1", WORKER)
    assert idle.idle(10) == {}
    queen.workers.remove(placement)

    assert idle.idle(19.9) == {}
    assert list(idle.idle(20)) == [WORKER]


@pytest.mark.parametrize("state", [state for state in WorkerState if state is not WorkerState.READY])
async def test_worker_that_is_not_ready_is_not_idle(queen: Parts, idle: IdleWorkers, state: WorkerState) -> None:
    _is_there(queen, state)
    idle.idle(0)

    assert idle.idle(100) == {}


async def test_worker_that_is_being_stopped_is_not_stopped_again(queen: Parts, idle: IdleWorkers) -> None:
    _is_there(queen)
    idle.idle(0)
    queen.workers.drain(WORKER)

    assert idle.idle(100) == {}


async def test_negative_time_keeps_workers_for_ever(queen: Parts) -> None:
    idle = IdleWorkers(queen.book, queen.workers, models=ModelTable(), keep_alive_s=-1, stop=_refuse)
    _is_there(queen)
    assert idle.idle(0) == {}
    assert idle.idle(1e9) == {}


async def test_worker_is_kept_for_as_long_as_its_last_job_asked(queen: Parts, idle: IdleWorkers) -> None:
    _is_there(queen)
    queen.workers.ask_keep_alive(WORKER, 100)
    queen.workers.ask_keep_alive(WORKER, None)
    assert idle.idle(0) == {}
    assert idle.idle(99) == {}
    assert list(idle.idle(100)) == [WORKER]


async def test_worker_that_is_kept_for_ever_is_never_idle(queen: Parts, idle: IdleWorkers) -> None:
    _is_there(queen)
    queen.workers.ask_keep_alive(WORKER, -1)
    assert idle.idle(0) == {}
    assert idle.idle(1e9) == {}
