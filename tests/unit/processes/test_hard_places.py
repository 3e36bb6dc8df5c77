"""File systems, limits and machines that make it hard: the parts say so, or go on with less."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from rbee.processes import ExitStatus, FileFollower, spawn, stop_tree
from rbee.processes.procfs import carries
from tests.unit.processes.process_stage import LIMIT_S, Stage

SOURCE = str(Path(__file__).parents[3] / "src")


def space(*command: str) -> list[str]:
    """Return a command line for a namespace of mounts and process numbers of its own, or skip."""
    unshared = ["unshare", "--mount", "--pid", "--fork", "--mount-proc"]
    if os.geteuid() != 0 or shutil.which("unshare") is None:
        pytest.skip("only root can make such a namespace")
    if subprocess.run([*unshared, "true"], capture_output=True, check=False).returncode != 0:
        pytest.skip("no such namespace can be made here")
    return [*unshared, *command]


@pytest.fixture(params=["tmpfs", "ramfs", "overlay"])
def disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    place = tmp_path / "disk"
    layers = [tmp_path / name for name in ("lower", "upper", "work")]
    for directory in (place, *layers):
        directory.mkdir()
    option = "size=8m"
    if request.param == "overlay":
        option = "lowerdir={},upperdir={},workdir={}".format(*layers)
    mount = ["mount", "-t", request.param, "-o", option, request.param, str(place)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip(f"a {request.param} cannot be mounted here")
    try:
        yield place
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


def test_file_is_followed_wherever_it_lies_and_its_room_is_told_truly(disk: Path) -> None:
    path = disk / "file"
    data = b"".join(b"%015d\n" % number for number in range(20_000))
    path.write_bytes(data)
    reader = FileFollower(path)
    read = b""
    while stretch := reader.read(64 * 1024).data:
        read += stretch
        reader.acknowledge(reader.position)
    assert read == data
    is_given_back = path.stat().st_blocks * 512 < len(data) // 2 and reader._can_punch
    assert (reader.allocated_bytes < len(data) // 2) == is_given_back
    reader.rewind(16)
    lost = reader.skip_hole()
    assert (lost > 0) == is_given_back
    rest = b""
    while stretch := reader.read(64 * 1024).data:
        rest += stretch
    assert rest == data[16 + lost :]
    reader.close()


def test_two_followers_of_one_file_each_read_what_the_other_has_not_given_back(tmp_path: Path) -> None:
    path = tmp_path / "file"
    data = b"".join(b"%015d\n" % number for number in range(20_000))
    path.write_bytes(data)
    first, second = FileFollower(path), FileFollower(path)
    assert first.read(100_000).data == data[:100_000]
    assert second.read(100_000).data == data[:100_000]
    first.acknowledge(96_000)
    second.rewind(0)
    lost = second.skip_hole()
    assert lost == 96_000 // 4096 * 4096
    read = b""
    while stretch := second.read(64 * 1024).data:
        read += stretch
    assert read == data[lost:]
    first.close()
    second.close()


_USED_UP = """
import asyncio, sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from rbee.errors import ConfigurationError
from rbee.processes import FileWatch

def refused(function, *arguments):
    try:
        function(*arguments)
    except ConfigurationError as error:
        return error.remedy
first, second = Path(sys.argv[2], "first"), Path(sys.argv[2], "second")
first.touch()
second.touch()
with FileWatch() as watch:
    watch.add(first)
    print(refused(FileWatch))
    print(refused(watch.add, second))
    first.write_text("x")
    print([path.name for path in asyncio.run(watch.wait(20))])
"""


def test_what_is_used_up_to_watch_files_with_is_named_and_the_other_files_go_on(tmp_path: Path) -> None:
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed")
    faults = ["inotify_init1:error=EMFILE:when=2", "inotify_add_watch:error=ENOSPC:when=2"]
    inject = [word for fault in faults for word in ("-e", f"inject={fault}")]
    command = ["strace", "-f", "-qq", "-o", str(tmp_path / "log"), *inject, sys.executable, "-c", _USED_UP]
    done = subprocess.run(
        [*command, SOURCE, str(tmp_path)], capture_output=True, text=True, timeout=LIMIT_S, check=False
    )
    if "ptrace" in done.stderr:
        pytest.skip("strace may not trace here")
    instances, watches, changed = done.stdout.splitlines()
    assert "fs.inotify.max_user_instances" in instances
    assert "fs.inotify.max_user_watches" in watches
    assert changed == "['first']"


_HIDDEN = """
import os, sys
sys.path.insert(0, sys.argv[1])
from rbee.processes.procfs import all_processes, read_process
os.setgroups([])
os.setresgid(65534, 65534, 65534)
os.setresuid(65534, 65534, 65534)
print(sorted(all_processes()) == [os.getpid()], read_process(1))
"""


def test_machine_that_hides_the_processes_of_others_shows_our_own() -> None:
    inner = 'mount -o remount,hidepid=1 /proc && "$@" && true'
    command = space("sh", "-c", inner, "sh", sys.executable, "-c", _HIDDEN, SOURCE)
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, check=False)
    assert done.stdout == "True None\n", done.stderr


async def test_program_is_started_and_found_without_a_path_in_its_environment(stage: Stage) -> None:
    spec = stage.spec("sh", "-c", "echo here")
    bare = {name: value for name, value in spec.env.items() if name != "PATH"}
    child = spawn(type(spec)(command=spec.command, env=bare, stdout=spec.stdout, stderr=spec.stderr))
    assert await child.wait() == ExitStatus(exit_code=0)
    assert stage.stdout.read_text() == "here\n"


async def test_traced_child_is_waited_for_until_its_tracer_lets_go(stage: Stage, tmp_path: Path) -> None:
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed")
    child = stage.python("say('ready'); signal.sigwait([signal.SIGTERM]); sys.exit(5)")
    await stage.said(1)
    tracer = await asyncio.create_subprocess_exec(
        *["strace", "-qq", "-o", str(tmp_path / "log"), "-p", str(child.pid)],
        stderr=asyncio.subprocess.PIPE,
        env=os.environ,
    )
    status = Path(f"/proc/{child.pid}/status")
    async with asyncio.timeout(LIMIT_S):
        while "TracerPid:\t0" in status.read_text():  # /proc tells nobody
            if tracer.returncode is not None:
                pytest.skip("strace may not attach here")
            await asyncio.sleep(0.01)
        report = await stop_tree(child, marker=stage.marker, grace_s=LIMIT_S)
        await tracer.wait()
    assert (report.status, report.killed) == (ExitStatus(exit_code=5), 0)


async def test_hundreds_of_quick_children_leave_neither_zombie_nor_descriptor(stage: Stage) -> None:
    before = sorted(os.listdir("/proc/self/fd"))
    others = _children()
    spec = stage.spec("/bin/true")
    for _ in range(15):
        children = [spawn(spec) for _ in range(20)]
        assert {status.exit_code for status in await asyncio.gather(*(child.wait() for child in children))} == {0}
        for child in children:
            child.close()
    assert sorted(os.listdir("/proc/self/fd")) == before
    assert _children() <= others


def _children() -> set[str]:
    return set(Path(f"/proc/self/task/{os.getpid()}/children").read_text().split())


async def test_process_that_has_only_just_started_is_found_by_its_marker(stage: Stage) -> None:
    """Its starter goes on while the kernel still lays out its memory: for that moment it shows no environment."""
    spec = stage.spec("/bin/sleep", "1000")
    for _ in range(100):
        child = spawn(spec)
        assert carries(child.pid, stage.marker)
        child.send_signal(signal.SIGKILL)
        await child.wait()
        child.close()
