from __future__ import annotations

import asyncio
import os
import signal
import sys
from pathlib import Path

import pytest

from rbee.errors import InternalError
from rbee.processes import ExitStatus, stop_tree, tree
from rbee.processes.procfs import all_processes, read_process, self_and_ancestors
from tests.unit.processes.process_stage import LIMIT_S, Stage

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


@pytest.mark.skipif(
    tuple(map(int, os.uname().release.split(".")[:2])) < (6, 9), reason="group signals by pidfd are of Linux 6.9"
)
async def test_member_of_the_group_that_no_look_finds_is_killed_with_the_group(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one would be that forks faster than anybody can look."""
    child = stage.python("if os.fork() == 0: say(os.getpid())\nsignal.pause()")
    hidden = int((await stage.said(1))[0])
    with monkeypatch.context() as patch:
        patch.setattr(
            tree, "all_processes", lambda: {pid: e for pid, e in all_processes().items() if pid != hidden}
        )
        report = await stop_tree(child, marker=stage.marker, grace_s=LIMIT_S)
    assert (report.found, report.killed) == (1, 0)
    async with asyncio.timeout(LIMIT_S):
        while stage.left():  # noqa: ASYNC110
            await asyncio.sleep(0)  # it is no child of ours, and has no pidfd here


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


def test_self_and_ancestors_reach_the_first_process() -> None:
    spared = self_and_ancestors(all_processes())
    assert {os.getpid(), os.getppid(), 1} <= spared
    assert sys.maxsize not in spared
