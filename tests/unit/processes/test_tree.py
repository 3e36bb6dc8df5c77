from __future__ import annotations

import asyncio
import os
import signal
import sys
from pathlib import Path

import pytest
from process_stage import LIMIT_S, Stage

from rbee.errors import InternalError
from rbee.processes import ExitStatus, stop_tree
from rbee.processes.procfs import ProcessEntry, all_processes, read_process, self_and_ancestors
from rbee.processes.tree import Root, tree_members

IGNORE_TERM = "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
DOUBLE_FORK = """
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        say(os.getpid(), os.getsid(0))
        signal.pause()
    os._exit(0)
os.wait()
"""


async def test_polite_process_ends_by_sigterm(stage: Stage) -> None:
    child = stage.python("say('ready'); signal.pause()")
    await stage.said(1)
    report = await stop_tree(child, marker=None, grace_s=LIMIT_S)
    assert (report.found, report.killed, report.status) == (1, 0, ExitStatus(signal="SIGTERM"))


async def test_process_that_ignores_sigterm_is_killed_after_the_grace(stage: Stage) -> None:
    child = stage.python(IGNORE_TERM + "say('ready')\nwhile True: signal.pause()")
    await stage.said(1)
    report = await stop_tree(child, marker=None, grace_s=0.05)
    assert (report.found, report.killed, report.status) == (1, 1, ExitStatus(signal="SIGKILL"))


async def test_stopped_process_hears_sigterm(stage: Stage) -> None:
    child = stage.python(
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))\nsay('ready')\nwhile True: signal.pause()"
    )
    await stage.said(1)
    child.send_signal(signal.SIGSTOP)
    stage.await_end(child, os.WSTOPPED)
    report = await stop_tree(child, marker=None, grace_s=LIMIT_S)
    assert (report.killed, report.status) == (0, ExitStatus(exit_code=7))


async def test_group_is_asked_together_with_its_leader(stage: Stage) -> None:
    child = stage.python("os.fork(); os.fork(); say('ready'); signal.pause()")
    await stage.said(4)
    report = await stop_tree(child, marker=None, grace_s=LIMIT_S)
    assert (report.found, report.killed) == (4, 0)
    assert stage.left() == []


async def test_double_forked_process_in_another_session_is_found_by_its_marker(stage: Stage) -> None:
    child = stage.python(DOUBLE_FORK + "say('ready'); signal.pause()")
    (words,) = (line.split() for line in await stage.said(2) if line != "ready")
    assert str(child.pid) not in words
    report = await stop_tree(child, marker=stage.marker, grace_s=LIMIT_S)
    assert (report.found, report.killed) == (2, 0)
    assert stage.left() == []


async def test_double_forked_process_that_ignores_sigterm_is_killed(stage: Stage) -> None:
    child = stage.python(IGNORE_TERM + DOUBLE_FORK.replace("signal.pause()", "time.sleep(1000)") + "say('ready')")
    await stage.said(2)
    assert await child.wait() == ExitStatus(exit_code=0)
    report = await stop_tree(child, marker=stage.marker, grace_s=0.05)
    assert (report.found, report.killed, report.status) == (1, 1, ExitStatus(exit_code=0))
    assert stage.left() == []


async def test_process_that_lost_marker_and_parent_is_found_by_its_session(stage: Stage) -> None:
    child = stage.python(
        "if os.fork() == 0:\n"
        "    os.execve(sys.executable, ['python', '-c', 'import os, signal; print(os.getpid()); signal.pause()'],"
        " {'PYTHONUNBUFFERED': '1'})\n"
    )
    pid = int((await stage.said(1))[0])
    assert await child.wait() == ExitStatus(exit_code=0)
    assert read_process(pid) is not None
    report = await stop_tree(child, marker=stage.marker, grace_s=LIMIT_S)
    assert (report.found, report.killed) == (1, 0)
    assert pid not in [entry.pid for entry in all_processes().values() if not entry.is_gone]


async def test_process_that_forks_on_sigterm_leaves_nobody(stage: Stage) -> None:
    child = stage.python(
        "def fork(*_):\n"
        "    signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "    for _ in range(4): os.fork()\n"
        "signal.signal(signal.SIGTERM, fork)\n"
        "say('ready')\nwhile True: signal.pause()"
    )
    await stage.said(1)
    report = await stop_tree(child, marker=stage.marker, grace_s=0.2)
    assert (report.found, report.killed) == (16, 16)
    assert stage.left() == []


async def test_process_that_moves_on_by_forking_leaves_nobody(stage: Stage) -> None:
    """Each process of the chain lives too briefly to be found, so the group is killed in one stroke."""
    child = stage.python(
        IGNORE_TERM + "say('ready')\nwhile True:\n    if os.fork(): os._exit(0)\n    time.sleep(0.001)\n"
    )
    await stage.said(1)
    await stop_tree(child, marker=stage.marker, grace_s=0.1)
    assert [entry for entry in all_processes().values() if entry.group == child.pid and not entry.is_gone] == []


async def test_process_whose_first_thread_ended_is_not_taken_for_gone(stage: Stage) -> None:
    exit_thread = {"x86_64": 60, "aarch64": 93}[os.uname().machine]
    child = stage.python(
        "import ctypes, threading\n"
        + IGNORE_TERM
        + "threading.Thread(target=time.sleep, args=(1000,)).start()\n"
        + f"ctypes.CDLL(None).syscall({exit_thread}, 0)\n"
    )
    async with asyncio.timeout(LIMIT_S):
        while (entry := read_process(child.pid)) and entry.state != "Z":  # noqa: ASYNC110
            await asyncio.sleep(0)  # /proc cannot be waited for
    assert entry is not None
    assert (entry.is_gone, child.poll()) == (False, None)
    report = await stop_tree(child, marker=None, grace_s=0.05)
    assert (report.killed, report.status) == (1, ExitStatus(signal="SIGKILL"))


async def test_tree_that_is_gone_already_takes_nothing(stage: Stage) -> None:
    child = stage.python("pass")
    await child.wait()
    report = await stop_tree(child, marker=stage.marker, grace_s=LIMIT_S)
    assert (report.found, report.killed, report.status) == (0, 0, ExitStatus(exit_code=0))


async def test_zombie_counts_as_gone_and_is_reaped(stage: Stage) -> None:
    child = stage.python("pass")
    stage.await_end(child)
    report = await stop_tree(child, marker=stage.marker, grace_s=LIMIT_S)
    assert (report.found, report.status) == (0, ExitStatus(exit_code=0))
    assert read_process(child.pid) is None


async def test_stop_by_number_stops_the_tree_without_telling_how(stage: Stage) -> None:
    child = stage.python("os.fork(); say('ready'); signal.pause()")
    await stage.said(2)
    report = await stop_tree(child.pid, marker=None, grace_s=LIMIT_S)
    assert (report.found, report.killed, report.status) == (2, 0, None)
    await child.wait()


async def test_stop_without_a_root_stops_what_carries_the_marker(stage: Stage) -> None:
    child = stage.python(DOUBLE_FORK)
    await stage.said(1)
    await child.wait()
    report = await stop_tree(None, marker=stage.marker, grace_s=LIMIT_S)
    assert (report.found, report.killed) == (1, 0)


async def test_unrelated_process_of_the_same_program_lives_on(stage: Stage, tmp_path: Path) -> None:
    other = Stage(tmp_path)
    bystander = other.python("signal.pause()")
    child = stage.python("say('ready'); signal.pause()")
    await stage.said(1)
    await stop_tree(child, marker=stage.marker, grace_s=LIMIT_S)
    assert bystander.poll() is None
    await stop_tree(bystander, marker=other.marker, grace_s=LIMIT_S)


async def test_cancelled_stop_kills_at_once(stage: Stage) -> None:
    child = stage.python(IGNORE_TERM + "os.fork(); say('ready')\nwhile True: signal.pause()")
    await stage.said(2)
    stopping = asyncio.create_task(stop_tree(child, marker=stage.marker, grace_s=LIMIT_S))
    await asyncio.sleep(0)
    stopping.cancel()
    await asyncio.wait([stopping])
    assert stopping.cancelled()
    assert await child.wait() == ExitStatus(signal="SIGKILL")


async def test_survivor_of_sigkill_is_an_error_that_names_it(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    child = stage.python("say('ready'); signal.pause()")
    await stage.said(1)
    with monkeypatch.context() as patch:  # as if it hung in the kernel
        patch.setattr(signal, "pidfd_send_signal", lambda *_: None)
        with pytest.raises(InternalError, match=f"Processes {child.pid} are still there"):
            await stop_tree(child, marker=None, grace_s=0.01, kill_s=0.01)
    child.send_signal(signal.SIGKILL)
    await child.wait()


async def test_itself_and_its_ancestors_are_refused() -> None:
    for pid in (os.getpid(), os.getppid()):
        with pytest.raises(ValueError, match=f"Process {pid} is this process"):
            await stop_tree(pid, marker=None, grace_s=0)


async def test_program_that_carries_the_marker_itself_survives_its_own_stop(stage: Stage) -> None:
    source = str(Path(__file__).parents[3] / "src")
    child = stage.python(
        f"import asyncio, subprocess\nsys.path.insert(0, {source!r})\n"
        "from rbee.processes import find_marked, stop_tree\n"
        f"marker = {stage.marker!r}\n"
        "inner = subprocess.Popen([sys.executable, '-c', 'import signal; signal.pause()'])\n"
        "found = find_marked(*marker)\n"
        "report = asyncio.run(stop_tree(None, marker=marker, grace_s=30))\n"
        "print([pid for pid, _ in found] == [inner.pid], report.found, inner.wait())"
    )
    assert await child.wait() == ExitStatus(exit_code=0)
    assert stage.stdout.read_text() == "True 1 -15\n"


async def test_find_marked_wants_the_whole_value(stage: Stage) -> None:
    child = stage.python("say('ready'); signal.pause()")
    await stage.said(1)
    name, value = stage.marker
    assert stage.left() == [(child.pid, child.start_time)]
    assert Stage.left(_with_marker(stage, (name, value[:-1]))) == []
    child.send_signal(signal.SIGKILL)
    await child.wait()


def _with_marker(stage: Stage, marker: tuple[str, str]) -> Stage:
    other = Stage(stage.stdout.parent)
    other.marker = marker
    return other


def entry(pid: int, parent: int = 1, *, group: int = 0, session: int = 0, start: int = 100) -> ProcessEntry:
    return ProcessEntry(pid, parent, group or pid, session or pid, "S", 1, start)


def members(root: Root | None, *entries: ProcessEntry, marked: frozenset[int] = frozenset()) -> set[int]:
    table = {each.pid: each for each in entries}
    return tree_members(table, root, marked=marked, known=(), spared={1, 2})


def test_members_are_descendants_session_group_and_marked() -> None:
    found = members(
        Root(10, 100),
        entry(10),
        entry(11, 10),  # a child that left the session
        entry(12, 11),
        entry(13, 1, session=10),
        entry(14, 1, group=10),
        entry(15, 1),
        entry(16, 15),  # a child of a marked one
        entry(20, 1),
        marked=frozenset({15}),
    )
    assert found == {10, 11, 12, 13, 14, 15, 16}


def test_number_that_a_stranger_has_now_leads_to_nobody() -> None:
    stranger = entry(10, start=500)
    assert members(Root(10, 100, ended_ticks=300), stranger, entry(11, 10, session=10, start=510)) == set()


def test_session_of_a_dead_root_counts_for_those_from_before_its_end() -> None:
    root = Root(10, 100, ended_ticks=300)
    assert members(root, entry(11, session=10, start=200), entry(12, session=10, start=400)) == {11}
    assert members(Root(10, 100), entry(11, session=10, start=200)) == set()


def test_session_of_a_root_that_does_not_lead_it_is_left_alone() -> None:
    root = entry(10, session=5, group=5)
    assert members(Root(10, 100), root, entry(5), entry(11, session=5, group=5)) == {10}


def test_spared_process_is_no_way_to_its_children() -> None:
    assert members(None, entry(2), entry(3, 2), entry(4, 3), marked=frozenset({2})) == set()


def test_self_and_ancestors_reach_the_first_process() -> None:
    spared = self_and_ancestors(all_processes())
    assert {os.getpid(), os.getppid(), 1} <= spared
    assert sys.maxsize not in spared
