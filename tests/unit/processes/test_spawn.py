from __future__ import annotations

import asyncio
import os
import signal
import stat
import sys
from pathlib import Path

import pytest

from rbee.errors import ConfigurationError, StartError
from rbee.processes import ExitStatus, adopt, machine_boot_id, require_linux, spawn
from rbee.processes.procfs import read_process
from tests.unit.processes.process_stage import LIMIT_S, Stage


async def test_exit_code_is_told(stage: Stage) -> None:
    child = stage.python("sys.exit(3)")
    status = await child.wait()
    assert status == ExitStatus(exit_code=3)
    assert status.describe() == "ended with exit code 3"
    assert child.status == status


async def test_end_by_a_signal_is_told_by_its_name(stage: Stage) -> None:
    status = await stage.python("os.kill(os.getpid(), signal.SIGSEGV)").wait()
    assert status == ExitStatus(signal="SIGSEGV")
    assert status.describe() == "was ended by SIGSEGV"


async def test_end_by_a_real_time_signal_without_a_name_is_told_by_number(stage: Stage) -> None:
    assert await stage.python("os.kill(os.getpid(), 40)").wait() == ExitStatus(signal="SIG40")


async def test_output_goes_to_private_files_that_are_appended_to(stage: Stage) -> None:
    for _ in range(2):
        await stage.python("print('out'); print('err', file=sys.stderr)").wait()
    assert stage.stdout.read_text() == "out\nout\n"
    assert stage.stderr.read_text() == "err\nerr\n"
    assert stat.S_IMODE(stage.stdout.stat().st_mode) == 0o600


async def test_child_has_no_stdin_its_own_session_and_no_descriptor_of_ours(stage: Stage) -> None:
    ours = os.open(os.devnull, os.O_RDONLY)
    os.set_inheritable(ours, True)
    child = stage.python(
        "print(repr(sys.stdin.read()), os.getsid(0) == os.getpgrp() == os.getpid())\n"
        "print(sorted(set(os.listdir('/proc/self/fd')) - {'0', '1', '2'}) == ['3'])"  # 3 is the listing
    )
    await child.wait()
    os.close(ours)
    assert stage.stdout.read_text() == "'' True\nTrue\n"


async def test_child_gets_exactly_the_environment_given(stage: Stage) -> None:
    child = stage.python("print(sorted(set(os.environ) - {'LC_CTYPE'}))")
    await child.wait()
    assert stage.stdout.read_text() == "['PATH', 'PYTHONUNBUFFERED', 'RBEE_TEST_STAGE']\n"


async def test_child_starts_in_the_directory_given(stage: Stage, tmp_path: Path) -> None:
    await spawn(stage.spec(sys.executable, "-c", "import os; print(os.getcwd())", cwd=tmp_path)).wait()
    assert stage.stdout.read_text() == f"{tmp_path}\n"


@pytest.mark.parametrize(
    ("command", "why"),
    [
        (("no-such-program-here", "x"), "`no-such-program-here` cannot be started: No such file or directory."),
        (("/etc/passwd",), "`/etc/passwd` cannot be started: Permission denied."),
        (("echo", "a\0b"), "`echo` cannot be started: embedded null byte."),
        ((), "There is no command to start."),
    ],
)
async def test_command_that_cannot_run_is_a_start_error_that_names_it(
    stage: Stage, command: tuple[str, ...], why: str
) -> None:
    with pytest.raises(StartError) as caught:
        spawn(stage.spec(*command))
    assert caught.value.message == why


async def test_file_that_is_no_program_is_a_start_error(stage: Stage, tmp_path: Path) -> None:
    program = tmp_path / "program"
    program.write_bytes(b"\x7fELF nonsense")
    program.chmod(0o700)
    with pytest.raises(StartError, match="Exec format error"):
        spawn(stage.spec(str(program)))


async def test_missing_directory_is_a_start_error_that_names_it(stage: Stage, tmp_path: Path) -> None:
    with pytest.raises(StartError, match=f"in the directory {tmp_path}/nowhere: No such file"):
        spawn(stage.spec("echo", cwd=tmp_path / "nowhere"))


async def test_output_file_that_cannot_be_made_is_a_start_error_that_names_it(
    stage: Stage, tmp_path: Path
) -> None:
    stage.stdout = tmp_path / "nowhere" / "stdout"
    with pytest.raises(StartError, match="nowhere/stdout cannot be opened: No such file"):
        spawn(stage.spec("echo"))


async def test_spawn_from_another_thread_is_refused(stage: Stage) -> None:
    with pytest.raises(RuntimeError, match="main thread"):
        await asyncio.to_thread(spawn, stage.spec("echo"))


async def test_spawn_elsewhere_than_on_linux_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(ConfigurationError, match="on Linux only, and this is darwin"):
        require_linux()


async def test_all_waiters_are_told_and_a_cancelled_one_disturbs_nobody(stage: Stage) -> None:
    child = stage.python("signal.pause()")
    waiters = [asyncio.create_task(child.wait()) for _ in range(3)]
    await asyncio.sleep(0)
    waiters[0].cancel()
    await asyncio.wait([waiters[0]])
    assert child.send_signal(signal.SIGKILL)
    assert await asyncio.gather(*waiters[1:]) == [ExitStatus(signal="SIGKILL")] * 2
    assert await child.wait() == ExitStatus(signal="SIGKILL")


async def test_wait_after_every_waiter_was_cancelled_is_told(stage: Stage) -> None:
    child = stage.python("signal.pause()")
    first = asyncio.create_task(child.wait())
    await asyncio.sleep(0)
    first.cancel()
    await asyncio.wait([first])
    child.send_signal(signal.SIGKILL)
    assert await child.wait() == ExitStatus(signal="SIGKILL")


async def test_poll_of_a_live_child_is_none(stage: Stage) -> None:
    child = stage.python("signal.pause()")
    assert child.poll() is None
    child.send_signal(signal.SIGKILL)
    await child.wait()
    assert child.poll() == ExitStatus(signal="SIGKILL")


async def test_signal_to_a_child_that_ended_reaches_nobody(stage: Stage) -> None:
    child = stage.python("pass")
    await child.wait()
    assert not child.send_signal(signal.SIGKILL)


async def test_closed_child_goes_on_and_can_be_adopted(stage: Stage) -> None:
    child = stage.python("print('ready'); signal.pause()")
    await stage.said(1)
    future = child.exit_future()
    child.close()
    child.close()
    assert future.cancelled()
    with pytest.raises(RuntimeError, match="was closed"):
        await child.wait()
    again = adopt(child.pid, child.start_time)
    assert again is not None
    again.send_signal(signal.SIGKILL)
    assert await again.wait() == ExitStatus(signal="SIGKILL")


async def test_status_taken_by_somebody_else_is_unknown(stage: Stage) -> None:
    child = stage.python("sys.exit(3)")
    stage.take_status(child)
    status = await child.wait()
    assert status == ExitStatus(unknown=True)
    assert status.describe().startswith("ended in an unknown way")


async def test_adopted_stranger_is_waited_for_without_its_exit_code(stage: Stage) -> None:
    # The first process starts the second and stays its parent, so it is no child of ours.
    parent = stage.python(
        "import subprocess\n"
        "inner = subprocess.Popen([sys.executable, '-c', 'import signal; signal.pause()'])\n"
        "print(inner.pid)\nprint(inner.wait())"
    )
    pid = int((await stage.said(1))[0])
    entry = read_process(pid)
    assert entry is not None
    inner = adopt(pid, entry.start_time, boot_id=machine_boot_id())
    assert inner is not None
    waiting = asyncio.create_task(inner.wait())
    assert inner.send_signal(signal.SIGTERM)
    async with asyncio.timeout(LIMIT_S):
        assert await waiting == ExitStatus(unknown=True)
    assert await parent.wait() == ExitStatus(exit_code=0)


async def test_adopt_with_another_start_time_finds_nobody(stage: Stage) -> None:
    child = stage.python("signal.pause()")
    assert adopt(child.pid, child.start_time + 1) is None
    assert adopt(child.pid, child.start_time, boot_id="another") is None
    assert child.poll() is None


async def test_adopt_of_a_process_that_ended_finds_nobody(stage: Stage) -> None:
    child = stage.python("pass")
    stage.await_end(child)
    assert adopt(child.pid, child.start_time) is None
    await child.wait()
    assert adopt(child.pid, child.start_time) is None


async def test_no_descriptor_is_left_open(stage: Stage) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        await stage.python("pass").wait()
        with pytest.raises(StartError):
            spawn(stage.spec("no-such-program-here"))
    assert len(os.listdir("/proc/self/fd")) == before
