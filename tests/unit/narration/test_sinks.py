"""One write a line, and what a full pipe, a full disk and a closed file do to it: never more than a lost line."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from rbee.narration import FileSink, ListSink, TeeSink
from rbee.narration.sinks import TerminalSink, server_sink, unblocked


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    reading, writing = os.pipe()
    yield reading, writing
    os.close(reading)
    os.close(writing)


def test_file_sink_many_threads_write_whole_lines(tmp_path: Path) -> None:
    fd = os.open(tmp_path / "out", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    sink = FileSink(fd)

    def speak(number: int) -> None:
        for index in range(200):
            sink.write(b"%d:%d:%b" % (number, index, b"x" * 5000))

    threads = [threading.Thread(target=speak, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    os.close(fd)
    lines = (tmp_path / "out").read_bytes().splitlines()
    assert sorted(lines) == sorted(b"%d:%d:%b" % (n, i, b"x" * 5000) for n in range(4) for i in range(200))
    assert sink.lost_lines == 0


def test_file_sink_line_is_one_write(pipe: tuple[int, int]) -> None:
    os.set_blocking(pipe[1], False)
    FileSink(pipe[1]).write(b"x" * 100)
    assert os.read(pipe[0], 65536) == b"x" * 100 + b"\n"


def test_file_sink_full_pipe_loses_lines_without_waiting_and_tears_no_other(pipe: tuple[int, int]) -> None:
    sink = FileSink(unblocked(pipe[1]))
    while sink.lost_lines < 3:
        sink.write(b'{"x":"' + b"a" * 5000 + b'"}')  # more than PIPE_BUF, so one is cut off
    assert os.get_blocking(pipe[1])  # the shared descriptor is left as it was
    drained = os.read(pipe[0], 1 << 20)
    sink.write(b'{"after":1}')
    after = os.read(pipe[0], 1 << 20)
    assert after.endswith(b'{"after":1}\n')
    torn = [line for line in (drained + after).splitlines() if not line.endswith(b"}")]
    assert len(torn) == 1
    os.close(sink.fd)


def test_file_sink_short_write_at_a_size_limit_is_followed_by_a_newline(tmp_path: Path) -> None:
    program = f"""
import os, resource, signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
from rbee.narration import FileSink
fd = os.open({str(tmp_path / "out")!r}, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
sink = FileSink(fd)
resource.setrlimit(resource.RLIMIT_FSIZE, (25, resource.RLIM_INFINITY))
for _ in range(4):
    sink.write(b"0123456789")
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
sink.write(b"after")
sink.write(b"and on")
print(sink.lost_lines)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=30)
    assert done.stdout == "2\n"
    assert (tmp_path / "out").read_bytes() == b"0123456789\n0123456789\n012\nafter\nand on\n"


def test_file_sink_closed_descriptor_counts_and_never_raises() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    sink = FileSink(writing)
    sink.write(b"nobody reads")  # EPIPE
    os.close(writing)
    sink.write(b"nobody is there")  # EBADF
    assert sink.lost_lines == 2


def test_file_sink_speaking_again_in_the_middle_of_a_write_does_not_deadlock(pipe: tuple[int, int]) -> None:
    sink = FileSink(pipe[1])

    class Interrupting(bytes):
        def __add__(self, other: object) -> bytes:
            sink.write(b"inner")  # as a signal handler would
            return bytes(self) + b"\n"

    sink.write(Interrupting(b"outer"))
    assert os.read(pipe[0], 100) == b"inner\nouter\n"


def test_unblocked_file_is_returned_as_it_is(tmp_path: Path) -> None:
    with (tmp_path / "out").open("wb") as file:
        assert unblocked(file.fileno()) == file.fileno()


def test_server_sink_on_a_terminal_draws_and_never_waits() -> None:
    ours, theirs = pty.openpty()
    sink = server_sink(theirs)
    assert isinstance(sink, TerminalSink)
    sink.write(json.dumps({"actor": "queen", "action": "queen_ready", "message": "Hi"}).encode())
    assert os.read(ours, 1000) == b"[queen     ] queen_ready: Hi\r\n"
    for _ in range(2000):  # nobody reads: far more than a terminal holds
        sink.write(json.dumps({"actor": "queen", "action": "a", "message": "x" * 1000}).encode())
    os.close(ours)
    os.close(theirs)


def test_tee_sink_hands_each_line_to_all_in_order() -> None:
    first, second = ListSink(), ListSink()
    TeeSink(first, second).write(b'{"action":"a"}')
    assert (first.actions, second.actions) == (["a"], ["a"])
