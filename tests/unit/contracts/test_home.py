"""Files of a home: private, written whole, and believed only while their process lives."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import threading
from pathlib import Path

import msgspec
import pytest

from rbee.contracts.home import Home, default_home, read_ready_file, write_ready_file, write_whole
from rbee.contracts.views import ReadyFile
from rbee.errors import ConfigurationError, StartError


def test_home_makes_its_directories_for_its_owner_alone(tmp_path: Path) -> None:
    home = Home.at(tmp_path / "a" / "home")
    for directory in (home.root, home.run, home.logs, home.workers, home.hive):
        assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    assert Home.at(home.root) == home


def test_home_where_a_file_stands_is_refused(tmp_path: Path) -> None:
    (tmp_path / "home").write_text("")
    with pytest.raises(ConfigurationError, match=r"RBEE_HOME .*/home cannot be used: "):
        Home.at(tmp_path / "home")


def test_default_home_is_the_named_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RBEE_HOME", str(tmp_path))
    assert default_home() == tmp_path
    monkeypatch.delenv("RBEE_HOME")
    assert default_home().name == "rbee"


def test_ready_file_round_trips_and_is_private(tmp_path: Path) -> None:
    ready = ReadyFile(url="http://127.0.0.1:1", pid=os.getpid(), boot_id="b")
    path = tmp_path / "queen.json"
    write_ready_file(path, ready)
    assert read_ready_file(path) == ready
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert list(tmp_path.iterdir()) == [path]


def test_ready_file_of_a_dead_process_is_not_believed(tmp_path: Path) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    path = tmp_path / "queen.json"
    write_ready_file(path, ReadyFile(url="http://127.0.0.1:1", pid=gone.pid))
    os.waitid(os.P_PID, gone.pid, os.WEXITED | os.WNOWAIT)
    assert read_ready_file(path) is None  # a zombie
    gone.wait()
    assert read_ready_file(path) is None  # nobody


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b'{"url":"u"}', b'{"url":"u","pid":"x"}', b"\xff", b'{"url":"\xff","pid":1}']
    # Signals to these go to a whole group, to everybody, or nowhere.
    + [b'{"url":"u","pid":%d}' % pid for pid in (0, -1, -7, 2**31, 2**70)],
)
def test_ready_file_of_another_content_is_not_believed(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "queen.json"
    path.write_bytes(content)
    assert read_ready_file(path) is None


def test_ready_file_that_is_missing_or_a_directory_is_not_believed(tmp_path: Path) -> None:
    assert read_ready_file(tmp_path / "none.json") is None
    assert read_ready_file(tmp_path) is None


def test_file_written_whole_is_never_seen_in_part(tmp_path: Path) -> None:
    path = tmp_path / "ready.json"
    contents = [msgspec.json.encode({"n": number, "fill": str(number) * 20_000}) for number in range(2)]
    write_whole(path, contents[0])
    is_done = threading.Event()

    def write() -> None:
        for round_number in range(60):
            write_whole(path, contents[round_number % 2])
        is_done.set()

    writer = threading.Thread(target=write)
    writer.start()
    seen = {path.read_bytes()}
    while not is_done.is_set():
        seen.add(path.read_bytes())
    writer.join()
    assert seen <= set(contents)


def test_file_that_cannot_be_written_whole_leaves_the_old_one_and_no_other(tmp_path: Path) -> None:
    (tmp_path / "ready.json").mkdir()
    with pytest.raises(IsADirectoryError):
        write_whole(tmp_path / "ready.json", b"x")
    assert [entry.name for entry in tmp_path.iterdir()] == ["ready.json"]


def test_ready_file_that_cannot_be_written_is_a_start_error_that_names_it(tmp_path: Path) -> None:
    path = tmp_path / "nowhere" / "ready.json"
    with pytest.raises(StartError, match=f"The ready file {path} cannot be written: No such file"):
        write_ready_file(path, ReadyFile(url="http://127.0.0.1:1", pid=1, boot_id="b"))
