from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest

from rbee.contracts.engine_settings import EngineSettings, EngineTable
from rbee.contracts.home import Home
from rbee.contracts.ids import new_id
from rbee.contracts.states import WorkerState
from rbee.errors import (
    ConflictError,
    DeadlineExceededError,
    InvalidRequestError,
    ModelInvalidError,
    NotFoundError,
    StartError,
    StorageFullError,
    WorkerError,
)
from rbee.hive.catalog import LocalModel
from rbee.hive.deliveries import Deliveries
from rbee.hive.outbox import Outbox
from rbee.hive.returning import Returning
from rbee.hive.settings import HiveSettings
from rbee.hive.worker_file import new_worker_file
from rbee.hive.worker_wanted import WorkerWanted
from rbee.hive.workers import Workers
from rbee.narration import FileSink
from rbee.narration.emit import captured_narration
from rbee.narration.sinks import ListSink
from rbee.processes import find_marked
from tests.unit.hive.fake_worker import is_alive, make_program
from tests.unit.hive.small_queen import SmallQueen, small_queen, until

HIVE = new_id("hive")
READY = "ready()\nwait()"


class Hive:
    """The workers of a hive whose outbox runs, and the queen it brings all to."""

    def __init__(
        self, directory: Path, queen: SmallQueen, outbox: Outbox, sink: ListSink, **settings: Any
    ) -> None:
        self.directory = directory
        self.home = Home.at(directory / "home")
        self.queen = queen
        self.outbox = outbox
        self.sink = sink
        self.changes = 0
        values = {"stop_grace_s": 5.0, "load_timeout_s": 20.0, **settings}
        self.settings = HiveSettings(home=self.home.root, **values)
        self.engines = EngineTable()
        self.workers = self.another()

    def another(self, program: Path | None = None) -> Workers:
        """Return the workers of another start of the hive."""
        program = program or make_program(self.directory)
        self.deliveries = Deliveries(self.outbox)
        carriers = (self.outbox, self.deliveries, self._change)
        return Workers(self.home, self.settings, *carriers, engines=self.engines, program=program)

    async def find_again(self) -> None:
        """Do what a hive does when it comes back."""
        Returning(self.home, self.workers, self.deliveries, stop_grace_s=5.0).find_again()
        clearing = [task for task in self.deliveries._tasks if "_clear_stray" in repr(task)]
        await asyncio.gather(*clearing)

    def _change(self) -> None:
        self.changes += 1

    def wanted(self, behaviour: str, **values: Any) -> WorkerWanted:
        """Want a worker that behaves so."""
        path = self.directory / f"model-{len(list(self.directory.iterdir()))}"
        path.write_text(behaviour)
        model = LocalModel(ref="smollm2:135m", path=path, size_bytes=1, sha256=None)
        return WorkerWanted(
            **{
                "worker_id": new_id("worker"),
                "model": model,
                "slots": 2,
                "context_tokens": 64,
                "job_id": "job-1",
                "correlation_id": "c",
                **values,
            }
        )

    def exits(self) -> list[dict[str, Any]]:
        """Return the ends that were told."""
        return [event for event in self.sink.events if event["action"] == "worker_exit"]


@asynccontextmanager
async def hive_of(directory: Path, **settings: Any) -> AsyncIterator[Hive]:
    with captured_narration("hive") as sink:
        async with small_queen() as (queen, link):
            outbox = Outbox(link)
            running = asyncio.ensure_future(outbox.run())
            hive = Hive(directory, queen, outbox, sink, **settings)
            try:
                yield hive
            finally:
                await hive.workers.stop_all()
                await hive.deliveries.close()
                for pid, _ in find_marked("RBEE_HOME", str(hive.home.root)):
                    os.kill(pid, signal.SIGKILL)
                running.cancel()
                await asyncio.gather(running, return_exceptions=True)
                outbox.close()


@pytest.fixture
async def hive(tmp_path: Path) -> AsyncIterator[Hive]:
    async with hive_of(tmp_path) as made:
        yield made


# Starting


async def test_worker_is_ready_when_it_says_so_and_is_shown_with_its_address(hive: Hive) -> None:
    worker = await hive.workers.start(hive.wanted("print('noise')\n" + READY), HIVE)

    [info] = hive.workers.infos()
    assert (info.worker_id, info.state, info.url) == (worker.worker_id, WorkerState.READY, "http://127.0.0.1:9")
    assert (info.slots, info.model, info.pid) == (2, "smollm2:135m", worker.process.child.pid)
    assert len(info.token) >= 32
    assert hive.changes == 2


async def test_worker_gets_its_ids_and_a_token_and_no_secret_of_the_hives(
    hive: Hive, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RBEE_API_KEY", "the hive's own")
    wanted = hive.wanted("say('worker_env', **os.environ)\n" + READY)
    worker = await hive.workers.start(wanted, HIVE)
    await hive.outbox.flush(5)

    line = hive.queen.taken[f"{worker.worker_id}/stdout"].splitlines()[0]
    env = msgspec.json.decode(line)["fields"]
    assert env["RBEE_WORKER_TOKEN"] == worker.file.token
    assert (env["RBEE_WORKER_ID"], env["RBEE_HIVE_ID"], env["JOB_ID"]) == (worker.worker_id, HIVE, "job-1")
    assert env["RBEE_HOME"] == str(hive.home.root)
    assert "RBEE_API_KEY" not in env


@pytest.mark.parametrize(
    ("behaviour", "kind", "message"),
    [
        ("print('boom', file=sys.stderr)\nsys.exit(7)", WorkerError, "The worker ended with exit code 7"),
        ("os.kill(os.getpid(), signal.SIGSEGV)", WorkerError, "The worker was ended by SIGSEGV"),
        ("say('worker_failed', 'It is no GGUF.')\nsys.exit(4)", ModelInvalidError, "It is no GGUF."),
        ("say('worker_failed', 'The port is taken.')\nsys.exit(3)", WorkerError, "The port is taken."),
    ],
    ids=["an exit code", "a signal", "a bad model", "its own reason"],
)
async def test_worker_that_ends_before_it_is_ready_fails_with_how(
    hive: Hive, behaviour: str, kind: type[WorkerError], message: str
) -> None:
    wanted = hive.wanted(behaviour)

    with pytest.raises(kind) as raised:
        await hive.workers.start(wanted, HIVE)

    assert message in raised.value.message
    assert raised.value.details["worker_id"] == wanted.worker_id
    assert hive.workers.infos() == []


async def test_end_is_told_with_sizes_and_last_lines_and_the_files_go_when_the_queen_has_them(hive: Hive) -> None:
    wanted = hive.wanted("say('worker_startup')\nprint('boom', file=sys.stderr)\nsys.exit(7)")
    with pytest.raises(WorkerError):
        await hive.workers.start(wanted, HIVE)
    worker_id = wanted.worker_id

    await until(lambda: not (hive.home.workers / worker_id).exists())

    [told] = hive.exits()
    assert told["worker_id"] == worker_id
    assert told["fields"]["exit_code"] == 7
    assert told["fields"]["last_lines"] == ["worker_startup: Something.", "boom"]
    sizes = {source: len(data) for source, data in hive.queen.taken.items()}
    assert told["fields"]["sources"] == sizes
    assert "job_id" not in told


async def test_last_lines_leave_out_what_is_about_one_request(hive: Hive) -> None:
    """They are told to every job on the worker."""
    about = (
        '{"v":1,"kind":"narration","ts":5,"actor":"worker","action":"worker_inference","message":"m","attempt":1}'
    )
    with pytest.raises(WorkerError):
        await hive.workers.start(hive.wanted(f"print({about!r})\nprint('boom')\nsys.exit(7)"), HIVE)

    [told] = hive.exits()
    assert told["fields"]["last_lines"] == ["boom"]


async def test_end_keeps_its_sizes_however_long_the_last_lines_are(hive: Hive) -> None:
    wanted = hive.wanted("print('\\x1b€' * 5000 + '\\n' + ('\\x1b€' * 300 + '\\n') * 30)\nsys.exit(1)")
    with pytest.raises(WorkerError):
        await hive.workers.start(wanted, HIVE)

    [told] = hive.exits()
    assert set(told["fields"]["sources"]) == {f"{wanted.worker_id}/stdout", f"{wanted.worker_id}/stderr"}
    assert len(told["fields"]["last_lines"]) > 2


async def test_last_lines_hold_what_the_worker_failed_with_however_much_its_engine_said(hive: Hive) -> None:
    """The engine's words are many, and stand in the other file."""
    chatter = "print('chatter\\n' * 50 + 'chatter', end='', file=sys.stderr)"
    with pytest.raises(WorkerError, match="The oven is cold"):
        await hive.workers.start(
            hive.wanted(f"say('worker_failed', 'The oven is cold.')\n{chatter}\nsys.exit(3)"), HIVE
        )

    [told] = hive.exits()
    assert told["fields"]["last_lines"][-2:] == ["chatter", "worker_failed: The oven is cold."]
    assert len(told["fields"]["last_lines"]) == 20
    assert told["message"] == "The worker ended with exit code 3. The oven is cold."


FORGED = (
    '{"v":1,"kind":"narration","ts":5,"actor":"worker","action":"worker_failed","message":"Forged."}',
    "worker_failed: Forged.",
    "[worker    ] worker_failed: Forged.",
)


@pytest.mark.parametrize("forged", FORGED)
@pytest.mark.parametrize("own", ["say('worker_failed', 'The oven is cold.')", "pass"])
async def test_engine_that_speaks_like_its_worker_is_not_believed(hive: Hive, forged: str, own: str) -> None:
    """What stands on stderr is chatter, whatever it looks like."""
    behaviour = f"{own}\nprint({forged!r}, file=sys.stderr)\nsys.exit(3)"
    with pytest.raises(WorkerError) as caught:
        await hive.workers.start(hive.wanted(behaviour), HIVE)

    [told] = hive.exits()
    said = "" if own == "pass" else " The oven is cold."
    assert told["message"] == f"The worker ended with exit code 3.{said}"
    assert caught.value.message == f"The worker ended with exit code 3 before it was ready.{said}"


async def test_last_lines_have_no_value_that_an_engine_was_given(hive: Hive) -> None:
    """Of its `env` in the configuration: the lines go to every job that the worker has."""
    cook = EngineSettings(command=("cook", "{port}"), env={"COOKS_WORD": "hunter2-hunter2", "SALT": "on"})
    hive.engines = EngineTable(engines={"cook": cook})
    hive.workers = hive.another()
    behaviour = "print('on hunter2-hunter2', file=sys.stderr)\nsys.exit(3)"
    with pytest.raises(WorkerError) as caught:
        await hive.workers.start(hive.wanted(behaviour, engine="cook"), HIVE)

    [told] = hive.exits()
    assert told["fields"]["last_lines"] == caught.value.details["last_lines"] == ["on ***"]


async def test_event_on_stderr_is_no_last_line(hive: Hive) -> None:
    """It would look like one of the worker's own."""
    behaviour = f"print({FORGED[0]!r}, file=sys.stderr)\nprint('boom', file=sys.stderr)\nsys.exit(3)"
    with pytest.raises(WorkerError):
        await hive.workers.start(hive.wanted(behaviour), HIVE)

    [told] = hive.exits()
    assert told["fields"]["last_lines"] == ["boom"]


async def test_worker_that_is_not_ready_in_time_is_stopped(tmp_path: Path) -> None:
    async with hive_of(tmp_path, load_timeout_s=1.0) as hive:
        wanted = hive.wanted("say('worker_load_model')\nwait()")

        with pytest.raises(DeadlineExceededError) as raised:
            await hive.workers.start(wanted, HIVE)

        assert raised.value.reason == "worker_failed"
        assert raised.value.details["worker_id"] == wanted.worker_id
        assert hive.workers.infos() == []
        assert find_marked("RBEE_WORKER_ID", wanted.worker_id) == []


async def test_engine_that_may_take_longer_is_waited_for(tmp_path: Path) -> None:
    """As long as the configuration gives it, whatever the hive gives others."""
    async with hive_of(tmp_path, load_timeout_s=0.1) as hive:
        wanted = hive.wanted("time.sleep(1)\n" + READY, ready_timeout_s=60.0)
        worker = await hive.workers.start(wanted, HIVE)
        assert worker.state is WorkerState.READY


@pytest.mark.parametrize("url", ["None", "['http://127.0.0.1:9']"])
async def test_worker_that_is_ready_without_an_address_is_not_ready(tmp_path: Path, url: str) -> None:
    async with hive_of(tmp_path, load_timeout_s=0.5) as hive:
        with pytest.raises(DeadlineExceededError):
            await hive.workers.start(hive.wanted(f"ready({url})\nwait()"), HIVE)


async def test_cancelled_start_leaves_no_process(hive: Hive) -> None:
    wanted = hive.wanted("say('worker_load_model')\nwait()")
    starting = asyncio.ensure_future(hive.workers.start(wanted, HIVE))
    await until(lambda: len(hive.workers.infos()) == 1)

    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting

    assert hive.workers.infos() == []
    assert find_marked("RBEE_WORKER_ID", wanted.worker_id) == []


@pytest.mark.parametrize("worker_id", ["../../outside", "worker-x", "job-01m85rp7qx1q9md04phsgdjbtc", ""])
async def test_id_that_is_no_workers_id_is_refused_before_anything_is_made(hive: Hive, worker_id: str) -> None:
    before = sorted(hive.directory.rglob("*"))
    wanted = hive.wanted(READY, worker_id=worker_id)

    with pytest.raises(InvalidRequestError):
        await hive.workers.start(wanted, HIVE)

    assert sorted(hive.directory.rglob("*")) == sorted([*before, wanted.model.path])


async def test_id_that_was_used_before_is_refused(hive: Hive) -> None:
    worker = await hive.workers.start(hive.wanted(READY), HIVE)

    with pytest.raises(ConflictError):
        await hive.workers.start(hive.wanted(READY, worker_id=worker.worker_id), HIVE)

    assert len(hive.workers.infos()) == 1


async def test_program_that_cannot_be_started_leaves_nothing(hive: Hive) -> None:
    workers = hive.another(program=hive.directory / "missing")

    with pytest.raises(StartError):
        await workers.start(hive.wanted(READY), HIVE)

    assert list(hive.home.workers.iterdir()) == []
    await hive.deliveries.close()


# Stopping


async def test_stopped_worker_is_gone_with_what_it_started(hive: Hive) -> None:
    behaviour = "child = subprocess.Popen(['sleep', '600'], start_new_session=True)\n" + READY
    worker = await hive.workers.start(hive.wanted(behaviour), HIVE)
    pids = [pid for pid, _ in find_marked("RBEE_WORKER_ID", worker.worker_id)]
    assert len(pids) == 2

    await hive.workers.stop(worker.worker_id)

    assert [pid for pid in pids if is_alive(pid)] == []
    assert hive.workers.infos() == []
    assert [told["fields"]["exit_code"] for told in hive.exits()] == [0]


async def test_worker_that_does_not_hear_is_killed_after_the_grace(tmp_path: Path) -> None:
    async with hive_of(tmp_path, stop_grace_s=0.1) as hive:
        deaf = "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + READY
        worker = await hive.workers.start(hive.wanted(deaf), HIVE)

        await hive.workers.stop(worker.worker_id)

        assert [told["fields"]["signal"] for told in hive.exits()] == ["SIGKILL"]


async def test_stop_of_an_unknown_worker_is_not_found(hive: Hive) -> None:
    with pytest.raises(NotFoundError):
        await hive.workers.stop(new_id("worker"))


async def test_all_workers_are_stopped_at_once_also_one_that_has_just_ended(hive: Hive) -> None:
    workers = [await hive.workers.start(hive.wanted(READY), HIVE) for _ in range(3)]
    os.kill(workers[0].process.child.pid, signal.SIGKILL)

    await hive.workers.stop_all()

    assert hive.workers.infos() == []
    assert len(hive.exits()) == 3


async def test_worker_that_dies_is_told_and_what_it_left_behind_is_killed(hive: Hive) -> None:
    behaviour = "child = subprocess.Popen(['sleep', '600'], start_new_session=True)\n" + READY
    worker = await hive.workers.start(hive.wanted(behaviour), HIVE)
    pids = [pid for pid, _ in find_marked("RBEE_WORKER_ID", worker.worker_id)]

    os.kill(worker.process.child.pid, signal.SIGKILL)
    await until(lambda: len(hive.exits()) == 1)

    assert [pid for pid in pids if is_alive(pid)] == []
    assert hive.exits()[0]["fields"]["signal"] == "SIGKILL"
    assert worker.state is WorkerState.FAILED


async def test_fault_while_watching_a_worker_is_not_swallowed(hive: Hive, monkeypatch: pytest.MonkeyPatch) -> None:
    worker = await hive.workers.start(hive.wanted(READY), HIVE)

    def broken(*values: object) -> None:
        raise KeyError("a fault")

    monkeypatch.setattr("rbee.hive.workers.say_exit_surely", broken)
    os.kill(worker.process.child.pid, signal.SIGKILL)

    with pytest.raises(KeyError, match="a fault"):
        async with asyncio.timeout(5):
            await asyncio.shield(hive.deliveries.failure)


# After a hive that died


async def leave(hive: Hive) -> None:
    """Let a hive go as its death does: its workers stay, what the queen has taken is given back."""
    assert await hive.outbox.flush(10)
    for source in list(hive.outbox._sources.values()):
        hive.outbox.remove(source)
    await hive.deliveries.close()


COUNTING = """
ready()
number = 0
while True:
    number += 1
    print(f"line {number}", flush=True)
    time.sleep(0.002)
"""


async def test_worker_of_a_dead_hive_is_adopted_and_nothing_it_says_is_lost_or_repeated(hive: Hive) -> None:
    wanted = hive.wanted(COUNTING)
    before = await hive.workers.start(wanted, HIVE)
    source = f"{wanted.worker_id}/stdout"
    await until(lambda: b"line 50\n" in hive.queen.taken.get(source, b""))
    await leave(hive)

    hive.workers = hive.another()
    await hive.find_again()
    [info] = hive.workers.infos()
    await until(lambda: b"line 300\n" in hive.queen.taken[source])

    assert (info.state, info.pid, info.token) == (
        WorkerState.READY,
        before.process.child.pid,
        before.file.token,
    )
    assert info.url == "http://127.0.0.1:9"
    assert "hive_adopt" in hive.sink.actions
    lines = hive.queen.taken[source].splitlines()[1:]
    assert lines == [f"line {number}".encode() for number in range(1, len(lines) + 1)]
    await hive.workers.stop(wanted.worker_id)
    assert [end["worker_id"] for end in hive.exits()] == [wanted.worker_id]
    assert not is_alive(before.process.child.pid)


async def test_worker_that_was_loading_when_its_hive_died_is_adopted_and_waited_for(hive: Hive) -> None:
    gate = hive.directory / "gate"
    wanted = hive.wanted(f"while not os.path.exists({str(gate)!r}): time.sleep(0.01)\n" + READY)
    starting = asyncio.ensure_future(hive.workers.start(wanted, HIVE))
    await until(lambda: bool(hive.workers.infos()))
    await leave(hive)

    hive.workers = hive.another()
    await hive.find_again()
    waiting = asyncio.ensure_future(hive.workers.until_ready(wanted.worker_id))
    gate.touch()

    assert (await waiting).file.url == "http://127.0.0.1:9"
    starting.cancel()


async def test_worker_whose_number_was_not_written_down_yet_is_found_by_its_id(hive: Hive) -> None:
    wanted = hive.wanted(READY)
    worker = await hive.workers.start(wanted, HIVE)
    new_worker_file(wanted, worker.file.token).write(hive.home.workers / wanted.worker_id)
    await leave(hive)

    hive.workers = hive.another()
    await hive.find_again()

    assert [info.pid for info in hive.workers.infos()] == [worker.process.child.pid]


async def test_engine_is_not_taken_for_its_worker(hive: Hive) -> None:
    """It leads a session of its own and carries the worker's id, but not the worker's token."""
    engine = (
        "env = {name: value for name, value in os.environ.items() if name != 'RBEE_WORKER_TOKEN'}\n"
        "subprocess.Popen(['sleep', '600'], env=env, start_new_session=True)\n"
    )
    wanted = hive.wanted(engine + READY)
    worker = await hive.workers.start(wanted, HIVE)
    new_worker_file(wanted, worker.file.token).write(hive.home.workers / wanted.worker_id)
    await leave(hive)
    os.kill(worker.process.child.pid, signal.SIGKILL)
    await worker.process.wait()

    hive.workers = hive.another()
    await hive.find_again()

    assert hive.workers.infos() == []
    assert find_marked("RBEE_WORKER_ID", wanted.worker_id) == []


async def test_worker_that_was_never_started_leaves_nothing(hive: Hive) -> None:
    wanted = hive.wanted(READY)
    directory = hive.home.workers / wanted.worker_id
    directory.mkdir()
    new_worker_file(wanted, "token").write(directory)

    await hive.find_again()

    assert not directory.exists()
    assert hive.exits() == []


@pytest.mark.parametrize("spoilt", [b"", b"no json", b'{"wanted":1}', None])
async def test_worker_without_a_usable_file_is_stopped_its_words_delivered_and_its_end_told_as_unknown(
    hive: Hive, spoilt: bytes | None
) -> None:
    wanted = hive.wanted("print('spoken')\n" + READY)
    await hive.workers.start(wanted, HIVE)
    await leave(hive)
    path = hive.home.workers / wanted.worker_id / "worker.json"
    path.unlink()
    if spoilt is not None:
        path.write_bytes(spoilt)
    hive.queen.taken.clear()
    hive.queen.cursors.clear()

    hive.workers = hive.another()
    await hive.find_again()
    await until(lambda: list(hive.home.workers.iterdir()) == [])

    assert find_marked("RBEE_WORKER_ID", wanted.worker_id) == []
    [end] = hive.exits()
    assert end["fields"]["unknown"] is True
    assert end["fields"]["sources"] == {
        f"{wanted.worker_id}/{stream}": len(hive.queen.taken.get(f"{wanted.worker_id}/{stream}", b""))
        for stream in ("stdout", "stderr")
    }
    assert hive.queen.taken[f"{wanted.worker_id}/stdout"].startswith(b"spoken\n")


async def test_worker_that_ended_while_its_hive_was_away_is_not_started_again_and_told(hive: Hive) -> None:
    wanted = hive.wanted(READY)
    worker = await hive.workers.start(wanted, HIVE)
    await leave(hive)
    worker.process.child.send_signal(signal.SIGKILL)
    await until(lambda: not is_alive(worker.process.child.pid))

    hive.workers = hive.another()
    await hive.find_again()

    assert hive.workers.infos() == []
    assert [end["worker_id"] for end in hive.exits()] == [wanted.worker_id]


async def test_end_that_an_earlier_boot_knew_is_told_as_it_was(hive: Hive) -> None:
    await hive.queen.stop()
    wanted = hive.wanted("print('spoken')\nsys.exit(7)")
    with pytest.raises(WorkerError):
        await hive.workers.start(wanted, HIVE)
    await hive.deliveries.close()
    for source in list(hive.outbox._sources.values()):
        hive.outbox.remove(source)

    await hive.queen.start()
    hive.workers = hive.another()
    await hive.find_again()

    assert [end["fields"].get("exit_code") for end in hive.exits()] == [7, 7]


async def test_files_of_others_among_the_workers_are_left_alone(hive: Hive) -> None:
    (hive.home.workers / "notes.txt").write_text("mine")
    (hive.home.workers / "old").mkdir()

    await hive.find_again()

    assert sorted(path.name for path in hive.home.workers.iterdir()) == ["notes.txt", "old"]
    assert hive.exits() == []


async def test_words_that_could_not_be_delivered_wait_for_the_next_start(hive: Hive) -> None:
    await hive.queen.stop()
    wanted = hive.wanted("print('spoken')\nsys.exit(1)")
    with pytest.raises(WorkerError):
        await hive.workers.start(wanted, HIVE)
    await hive.deliveries.close()
    for source in list(hive.outbox._sources.values()):
        hive.outbox.remove(source)

    await hive.queen.start()
    hive.workers = hive.another()
    await hive.find_again()
    await until(lambda: list(hive.home.workers.iterdir()) == [])

    assert hive.queen.taken[f"{wanted.worker_id}/stdout"] == b"spoken\n"


async def test_file_of_an_earlier_boot_is_delivered_and_removed(hive: Hive) -> None:
    path = hive.home.hive / "boot0"
    sink = FileSink(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND))
    sink.write(b"said before")
    os.close(sink.fd)

    hive.deliveries.deliver_rest(path, [(f"{HIVE}/boot0", path)])
    await until(lambda: not path.exists())

    assert hive.queen.taken[f"{HIVE}/boot0"] == b"said before\n"


async def test_worker_whose_files_cannot_be_carried_is_stopped_and_leaves_nothing(
    hive: Hive, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = hive.wanted(READY)
    add = hive.outbox.add

    def used_up(name: str, path: Path) -> Any:
        if name.endswith("/stderr"):
            raise OSError(24, "Too many open files")
        return add(name, path)

    monkeypatch.setattr(hive.outbox, "add", used_up)
    with pytest.raises(StorageFullError, match="Too many open files"):
        await hive.workers.start(wanted, HIVE)

    assert find_marked("RBEE_WORKER_ID", wanted.worker_id) == []
    assert list(hive.home.workers.iterdir()) == []
    assert hive.workers.infos() == []
