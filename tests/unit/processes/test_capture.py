from __future__ import annotations

import ast
import asyncio
import contextlib
import io
import json
import os
import signal
import stat
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rbee.contracts.events import MAX_LINE_BYTES
from rbee.errors import StartError
from rbee.processes import (
    CapturedEvent,
    CapturedLine,
    CapturedProcess,
    ExitStatus,
    FileFollower,
    ProcessNarrationCapture,
    adopt,
    find_marked,
)
from rbee.processes.procfs import read_process
from tests.unit.processes.process_stage import LIMIT_S

JOB = "job-01j00000000000000000000000"
EMIT = """
import json, os, signal, sys, time
out, err = 1, 2
def emit(action, message="m", stream=out, **more):
    event = {"v": 1, "kind": "narration", "ts": 1, "actor": "worker", "action": action, "message": message, **more}
    os.write(stream, json.dumps(event, separators=(",", ":")).encode() + b"\\n")
"""


def capture(**given: Any) -> ProcessNarrationCapture:
    return ProcessNarrationCapture(**{"job_id": JOB, "correlation_id": "c-1", **given})


async def run(code: str, **given: Any) -> list[CapturedEvent | CapturedLine]:
    """Run a program to its end and return all it said."""
    async with asyncio.timeout(LIMIT_S):
        async with await capture(**given).spawn([sys.executable, "-c", EMIT + code]) as process:
            return [item async for item in process.events()]


async def until(holds: Callable[[], bool]) -> None:
    """Wait for what no event tells."""
    async with asyncio.timeout(LIMIT_S):
        while not holds():  # noqa: ASYNC110
            await asyncio.sleep(0.002)


def write(data: bytes) -> str:
    return f"os.write(1, {data!r})\n"


async def lines(data: bytes) -> list[CapturedLine]:
    items = await run(write(data))
    return [item for item in items if isinstance(item, CapturedLine)]


async def texts(data: bytes) -> list[str]:
    return [line.text for line in await lines(data)]


async def events(data: bytes) -> list[tuple[str, str, str]]:
    items = await run(write(data))
    found = [item.event for item in items if isinstance(item, CapturedEvent)]
    return [(event["actor"], event["action"], event["message"]) for event in found]


async def test_event_is_delivered_as_it_was_said_with_its_place() -> None:
    items = await run(
        'emit("worker_startup", "Hello, bee", fields={"deep": [1, {"x": None}]}, level="warning", unknown=5)\n'
    )
    assert items == [
        CapturedEvent(
            "stdout",
            0,
            {
                "v": 1,
                "kind": "narration",
                "ts": 1,
                "actor": "worker",
                "action": "worker_startup",
                "message": "Hello, bee",
                "fields": {"deep": [1, {"x": None}]},
                "level": "warning",
                "unknown": 5,
                "job_id": JOB,
                "correlation_id": "c-1",
            },
            parsed=False,
        )
    ]


async def test_child_is_told_the_ids_and_says_them_itself() -> None:
    items = await run(
        'emit("a", job_id=os.environ["JOB_ID"], correlation_id=os.environ["CORRELATION_ID"])', job_id="job-7"
    )
    assert [item.event["job_id"] for item in items if isinstance(item, CapturedEvent)] == ["job-7"]


async def test_ids_of_our_own_environment_are_not_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JOB_ID", "job-of-somebody-else")
    monkeypatch.setenv("GREETING", "hello")
    items = await run("print('JOB_ID' in os.environ, os.environ['GREETING'])", job_id=None, correlation_id=None)
    assert items == [CapturedLine("stdout", 0, "False hello")]


async def test_environment_given_replaces_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "s")
    env = {"PATH": os.environ["PATH"], "OWN": "1"}
    items = await run("print(sorted(set(os.environ) - {'LC_CTYPE'}))", env=env)
    (line,) = (item for item in items if isinstance(item, CapturedLine))
    assert ast.literal_eval(line.text) == [
        "CORRELATION_ID",
        "JOB_ID",
        "OWN",
        "PATH",
        "PYTHONUNBUFFERED",
        "RBEE_CAPTURE_ID",
    ]


async def test_order_within_a_stream_is_kept_through_all_forms() -> None:
    items = await run(
        "for n in range(300):\n"
        "    emit('a', str(n))\n"
        "    print(n, flush=True)\n"
        "    print(f'[cook] b: {n}', flush=True)\n"
    )
    said = [item.event["message"] if isinstance(item, CapturedEvent) else item.text for item in items]
    assert said == [str(n) for n in range(300) for _ in range(3)]
    offsets = [item.offset for item in items]
    assert offsets == sorted(set(offsets))


async def test_stderr_is_captured_too_and_told_apart() -> None:
    items = await run("emit('a', stream=err); print('plain', file=sys.stderr); print('out')")
    assert {(item.stream, type(item).__name__) for item in items} == {
        ("stderr", "CapturedEvent"),
        ("stderr", "CapturedLine"),
        ("stdout", "CapturedLine"),
    }


async def test_events_are_delivered_while_the_program_runs(tmp_path: Path) -> None:
    fifo = tmp_path / "go"
    os.mkfifo(fifo)
    code = f"emit('first')\nopen({str(fifo)!r}).read()\nemit('second')\n"
    async with asyncio.timeout(LIMIT_S):
        async with await capture().spawn([sys.executable, "-c", EMIT + code]) as process:
            said = []
            async for item in process.events():
                assert isinstance(item, CapturedEvent)
                said.append(item.event["action"])
                if said == ["first"]:  # only now may it go on
                    with await asyncio.to_thread(fifo.open, "w"):
                        pass
    assert said == ["first", "second"]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b"[worker    ] worker_ready: Model loaded", ("worker", "worker_ready", "Model loaded")),
        (b"[w] a: m", ("w", "a", "m")),
        (b"[w]     a    : m", ("w", "a", "m")),
        (b"[my-actor] my-action_1: m: n", ("my-actor", "my-action_1", "m: n")),
        ("[bee] fly: 🐝 zoom".encode(), ("bee", "fly", "🐝 zoom")),
        (b"[w] a: " + b"x" * 500, ("w", "a", "x" * 500)),
        (b"[w] a: crlf\r", ("w", "a", "crlf")),
    ],
)
async def test_bracket_form_is_read_and_said_to_be_parsed(line: bytes, words: tuple[str, str, str]) -> None:
    assert await events(line + b"\n") == [words]
    (item,) = await run(write(line + b"\n"))
    assert isinstance(item, CapturedEvent)
    assert (item.parsed, item.event["job_id"], item.event["correlation_id"]) == (True, JOB, "c-1")
    assert (item.event["v"], item.event["kind"], item.event["level"]) == (1, "narration", "info")


@pytest.mark.parametrize(
    "line", ["random text", "[w] no colon", "w a: m", "[] a: m", "[w]: m", "{}", "[1, 2]", "null", "{", ""]
)
async def test_other_lines_are_kept_as_lines(line: str) -> None:
    assert await run(write(line.encode() + b"\n")) == [CapturedLine("stdout", 0, line)]


@pytest.mark.parametrize(
    "more",
    [
        {"seq": 5},
        {"src": {"id": "x", "offset": 0}},
        {"observed_ts": 1},
        {"kind": "end"},
        {"v": 2},
        {"level": "loud"},
        {"ts": "now"},
    ],
)
async def test_line_that_says_what_only_a_log_may_is_a_plain_line(more: dict[str, Any]) -> None:
    (item,) = await run(f"emit('a', **{more!r})\n")
    assert isinstance(item, CapturedLine)
    assert json.loads(item.text).items() >= more.items()


async def test_event_in_the_name_of_another_job_is_claimed_and_not_trusted() -> None:
    items = await run("emit('mine'); emit('forged', job_id='job-other'); emit('mine')")
    assert [type(item) for item in items] == [CapturedEvent, CapturedLine, CapturedEvent]
    forged = items[1]
    assert isinstance(forged, CapturedLine)
    assert (forged.claimed, json.loads(forged.text)["job_id"]) == (True, "job-other")


async def test_any_job_is_claimed_when_the_capture_has_none() -> None:
    items = await run("emit('a'); emit('b', job_id='job-other')", job_id=None)
    assert [isinstance(item, CapturedLine) and item.claimed for item in items] == [False, True]
    assert isinstance(items[0], CapturedEvent)
    assert "job_id" not in items[0].event


async def test_last_of_two_job_ids_in_one_line_decides() -> None:
    twice = (
        f'{{"v":1,"kind":"narration","ts":1,"actor":"a","action":"a","message":"m","job_id":"{JOB}","job_id":"x"}}'
    )
    (item,) = await run(write(twice.encode() + b"\n"))
    assert isinstance(item, CapturedLine)
    assert item.claimed


async def test_everything_written_before_sigkill_is_delivered() -> None:
    items = await run("for n in range(1000): emit('a', str(n))\nos.kill(os.getpid(), signal.SIGKILL)")
    said = [item.event["message"] for item in items if isinstance(item, CapturedEvent)]
    assert said == [str(n) for n in range(1000)]


@pytest.mark.parametrize(
    ("code", "status"),
    [
        ("sys.exit(0)", ExitStatus(exit_code=0)),
        ("sys.exit(3)", ExitStatus(exit_code=3)),
        ("os._exit(4)", ExitStatus(exit_code=4)),
        ("raise RuntimeError('broken')", ExitStatus(exit_code=1)),
        ("os.abort()", ExitStatus(signal="SIGABRT")),
        ("os.kill(os.getpid(), signal.SIGSEGV)", ExitStatus(signal="SIGSEGV")),
    ],
)
async def test_last_words_and_end_are_both_told(code: str, status: ExitStatus) -> None:
    async with await capture().spawn([sys.executable, "-c", EMIT + "emit('last')\n" + code]) as process:
        said = [item.event["action"] async for item in process.events() if isinstance(item, CapturedEvent)]
        assert (said, await process.wait()) == (["last"], status)


async def test_raw_line_of_a_mebibyte_comes_in_parts_of_sixteen_kibibytes() -> None:
    items = await run("os.write(1, b'before\\n' + b'x' * 2**20 + b'\\nafter\\n')")
    found = [item for item in items if isinstance(item, CapturedLine)]
    assert [line.part for line in found] == [None, *range(1, 65), None]
    assert {len(line.text) for line in found[1:-1]} == {MAX_LINE_BYTES}
    assert (found[0].text, found[-1].text) == ("before", "after")


async def test_token_line_of_a_mebibyte_comes_whole() -> None:
    items = await run(
        'head = b\'{"v":1,"kind":"token","ts":1,"text":"\'\n'
        "line = head + b'x' * (2**20 - len(head) - 2) + b'\"}'\n"
        "for part in (line[:300_000], line[300_000:], b'\\n'): os.write(1, part)\n"
    )
    (item,) = items
    assert isinstance(item, CapturedEvent)
    assert len(item.event["text"]) == 2**20 - len('{"v":1,"kind":"token","ts":1,"text":""}')


async def test_narration_over_the_limit_is_raw() -> None:
    items = await run(f"emit('a', 'x' * {MAX_LINE_BYTES})")
    assert [item.part for item in items if isinstance(item, CapturedLine)] == [1, 2]


async def test_invalid_utf8_is_replaced_and_costs_no_other_line() -> None:
    assert await texts(b"good\n\xff\xfe bad\xc3\nlast\n") == ["good", "\ufffd\ufffd bad\ufffd", "last"]


async def test_nul_and_escape_sequences_travel_as_they_are() -> None:
    assert await texts(b"a\0b\n\x1b[31mred\x1b[0m\n") == ["a\0b", "\x1b[31mred\x1b[0m"]


async def test_crlf_ends_a_line_and_a_lone_cr_does_not() -> None:
    assert await texts(b"one\r\n10%\r20%\r\n\r\n") == ["one", "10%\r20%", ""]


async def test_json_line_with_crlf_is_an_event() -> None:
    line = b'{"v":1,"kind":"narration","ts":1,"actor":"w","action":"a","message":"m"}\r\n'
    assert await events(line) == [("w", "a", "m")]


async def test_last_line_without_a_newline_is_delivered() -> None:
    assert await texts(b"one\ntwo") == ["one", "two"]


async def test_event_cut_off_by_death_is_a_line() -> None:
    assert await texts(b'{"v":1,"kind":"narration","ts":1,"act') == ['{"v":1,"kind":"narration","ts":1,"act']


async def test_event_without_a_newline_is_an_event() -> None:
    assert await events(b'{"v":1,"kind":"narration","ts":1,"actor":"w","action":"a","message":"m"}') == [
        ("w", "a", "m")
    ]


async def test_several_writes_make_one_line() -> None:
    assert await run("for piece in (b'on', b'e li', b'ne\\ntwo\\n'): os.write(1, piece)") == [
        CapturedLine("stdout", 0, "one line"),
        CapturedLine("stdout", 9, "two"),
    ]


async def test_empty_output_yields_nothing() -> None:
    assert await run("") == []


async def test_fake_frames_of_a_stream_are_lines() -> None:
    data = [b"data: [DONE]", b"event: end", b"id: 7", b": comment"]
    assert await texts(b"\n".join(data) + b"\n") == [line.decode() for line in data]


async def test_concurrent_writers_never_mix_within_a_line() -> None:
    items = await run(
        "import threading\n"
        "for _ in range(2): os.fork()\n"
        "def speak(name):\n"
        "    for n in range(50): emit(f'a{os.getpid()}_{name}', str(n) + 'x' * 5000, fields={'n': n})\n"
        "threads = [threading.Thread(target=speak, args=(name,)) for name in range(2)]\n"
        "for thread in threads: thread.start()\n"
        "for thread in threads: thread.join()\n"
        "while True:\n"
        "    try: os.wait()\n"
        "    except ChildProcessError: break\n"
    )
    by_writer: dict[str, list[int]] = {}
    for item in items:
        assert isinstance(item, CapturedEvent)
        by_writer.setdefault(item.event["action"], []).append(item.event["fields"]["n"])
    assert list(by_writer.values()) == [list(range(50))] * 8


async def test_startup_with_an_error_and_a_recovery_keeps_its_order() -> None:
    items = await run(
        "emit('worker_startup')\nprint('loading...', flush=True)\nemit('worker_load_model', level='error')\n"
        "time.sleep(0.01)\nemit('worker_load_model')\nemit('worker_ready')\n"
    )
    assert [item.event["action"] if isinstance(item, CapturedEvent) else item.text for item in items] == [
        "worker_startup",
        "loading...",
        "worker_load_model",
        "worker_load_model",
        "worker_ready",
    ]


async def test_grandchild_that_keeps_the_files_open_delays_nobody() -> None:
    code = "if os.fork() == 0:\n    signal.pause()\nemit('last')\n"
    async with await capture().spawn([sys.executable, "-c", EMIT + code]) as process:
        async with asyncio.timeout(LIMIT_S):
            items = [item async for item in process.events()]
        assert [item.event["action"] for item in items if isinstance(item, CapturedEvent)] == ["last"]
        assert process.marker is not None
        assert len(find_marked(*process.marker)) == 1
    assert find_marked(*process.marker) == []


async def test_reader_that_takes_its_time_holds_up_nobody() -> None:
    """More than any pipe holds is written and the program ends, although nobody has read a byte."""
    async with await capture().spawn(
        [sys.executable, "-c", EMIT + "for n in range(4000): print('x' * 1000)"]
    ) as process:
        assert await process.wait() == ExitStatus(exit_code=0)
        assert process.stdout.position == 0
        assert len([item async for item in process.events()]) == 4000


async def test_reader_that_left_goes_on_where_it_stopped() -> None:
    async with await capture().spawn([sys.executable, "-c", "print(*range(100), sep='\\n')"]) as process:
        said: list[str] = []
        for stop_at in (1, 10, 1000):
            async for item in process.events():
                assert isinstance(item, CapturedLine)
                said.append(item.text)
                if len(said) == stop_at:
                    break
    assert said == [str(n) for n in range(100)]


async def test_cancelled_reader_loses_nothing() -> None:
    code = EMIT + "emit('first')\nsignal.pause()\n"
    async with await capture().spawn([sys.executable, "-c", code]) as process:
        said: list[str] = []
        first = asyncio.Event()

        async def read() -> None:
            async for item in process.events():
                assert isinstance(item, CapturedEvent)
                said.append(item.event["action"])
                first.set()

        reading = asyncio.create_task(read())
        async with asyncio.timeout(LIMIT_S):
            await first.wait()
        reading.cancel()
        await asyncio.wait([reading])
        await process.stop(LIMIT_S)
        await read()
    assert said == ["first"]


async def test_what_was_read_of_a_temporary_file_is_given_back() -> None:
    code = "for n in range(2000): print('x' * 1000)"
    async with await capture().spawn([sys.executable, "-c", code]) as process:
        assert len([item async for item in process.events()]) == 2000
        assert process.stdout.size == 2000 * 1001
        assert process.stdout.allocated_bytes <= 64 * 1024


async def test_temporary_directory_is_private_and_goes_with_the_process() -> None:
    async with await capture().spawn([sys.executable, "-c", "print(1)"]) as process:
        directory = process.stdout.path.parent
        assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    assert not directory.exists()
    await process.aclose()


async def test_directory_given_is_kept_whole_and_appended_to(tmp_path: Path) -> None:
    directory = tmp_path / "made" / "here"
    for text in ("one", "two"):
        assert await run(f"print({text!r})", directory=directory) == [
            CapturedLine("stdout", 4 * (text == "two"), text)
        ]
    assert (directory / "stdout").read_text() == "one\ntwo\n"
    assert (directory / "stderr").read_text() == ""


async def test_second_process_in_a_directory_waits_for_the_end_of_the_first(tmp_path: Path) -> None:
    captured = capture(directory=tmp_path)
    async with await captured.spawn([sys.executable, "-c", "import signal; signal.pause()"]) as process:
        with pytest.raises(RuntimeError, match=f"Process {process.child.pid} still writes"):
            await captured.spawn(["echo"])
    async with await captured.spawn(["echo", "again"]) as second:
        assert [item async for item in second.events()] == [CapturedLine("stdout", 0, "again")]


async def test_command_that_does_not_exist_is_a_start_error_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.raises(StartError, match="`no-such-program-here` cannot be started"):
        await capture().spawn(["no-such-program-here"])
    assert os.listdir(tmp_path) == []


async def test_leaving_the_context_stops_the_whole_tree() -> None:
    code = EMIT + "os.fork()\nif os.fork() == 0: os.setsid()\nemit('ready')\nsignal.pause()\n"
    async with await capture().spawn([sys.executable, "-c", code]) as process:
        ready = 0
        async for _ in process.events():
            ready += 1
            if ready == 4:
                break
    assert process.marker is not None
    assert find_marked(*process.marker) == []
    assert process.child.status == ExitStatus(signal="SIGTERM")


async def test_error_inside_the_context_stops_the_process_too() -> None:
    with pytest.raises(KeyError):
        async with await capture().spawn([sys.executable, "-c", "import signal; signal.pause()"]) as process:
            raise KeyError
    assert read_process(process.child.pid) is None


async def test_stop_says_what_it_took() -> None:
    code = EMIT + "signal.signal(signal.SIGTERM, signal.SIG_IGN)\nemit('ready')\nwhile True: signal.pause()"
    async with await capture().spawn([sys.executable, "-c", code]) as process:
        async for _ in process.events():
            break
        report = await process.stop(0.05)
        assert (report.found, report.killed, report.status) == (1, 1, ExitStatus(signal="SIGKILL"))


async def test_no_descriptor_is_left_open() -> None:
    await run("print(1)")
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        await run("print(1)")
    assert len(os.listdir("/proc/self/fd")) == before


async def test_nothing_is_read_unless_it_is_asked_for() -> None:
    """The hive reads the followers itself; a second reader would take its bytes."""
    async with await capture().spawn([sys.executable, "-c", "print('hello')"]) as process:
        await process.wait()
        assert process.stdout.read(1000).data == b"hello\n"


async def test_adopted_process_is_captured_from_its_files(tmp_path: Path) -> None:
    code = (
        "signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])\n"
        "emit('first')\nsignal.sigwait([signal.SIGUSR1])\nemit('second')\n"
    )
    first = await capture(directory=tmp_path).spawn([sys.executable, "-c", EMIT + code])
    async for _ in first.events():
        break
    child = adopt(first.child.pid, first.child.start_time)
    assert child is not None
    offset = first.stdout.position
    again = CapturedProcess(
        child,
        FileFollower(tmp_path / "stdout", offset=offset),
        FileFollower(tmp_path / "stderr"),
        job_id=JOB,
        marker=first.marker,
    )
    child.send_signal(signal.SIGUSR1)
    async with again:
        items = [item async for item in again.events()]
    assert [item.event["action"] for item in items if isinstance(item, CapturedEvent)] == ["second"]
    await first.aclose()


def test_example_of_the_docstring_runs() -> None:
    doc = ProcessNarrationCapture.__doc__ or ""
    code = textwrap.dedent(doc.split("```python\n")[1].split("```")[0])
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(code, {"__name__": "example"})
    assert printed.getvalue() == "job-1 Needs salt\nended with exit code 0\n"


async def test_hole_that_a_program_leaves_is_counted_and_what_follows_is_delivered() -> None:
    code = "os.write(1, b'before\\n'); os.ftruncate(1, 100_000); os.write(1, b'after\\n')"
    async with await capture().spawn([sys.executable, "-c", EMIT + code]) as process:
        said = [item.text.strip("\0") async for item in process.events() if isinstance(item, CapturedLine)]
        assert (said[0], said[-1]) == ("before", "after")
        assert process.lost_bytes > 0
        assert process.stdout.exhausted


async def test_program_that_cuts_its_output_is_read_on_and_what_it_cost_is_counted() -> None:
    code = (
        "signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])\nos.write(1, b'before\\n')\n"
        "signal.sigwait([signal.SIGUSR1])\nos.ftruncate(1, 0)\nos.write(1, b'over\\n')\n"
        "signal.sigwait([signal.SIGUSR1])\nos.write(1, b'after\\n')\n"
    )
    async with await capture().spawn([sys.executable, "-c", EMIT + code]) as process:
        async for item in process.events():
            assert item == CapturedLine("stdout", 0, "before")
            break
        process.child.send_signal(signal.SIGUSR1)
        await until(lambda: process.stdout.size == len("over\n"))

        async def go_on() -> None:
            await until(lambda: process.lost_bytes > 0)
            process.child.send_signal(signal.SIGUSR1)

        going_on = asyncio.create_task(go_on())
        async with asyncio.timeout(LIMIT_S):
            said = [item.text async for item in process.events() if isinstance(item, CapturedLine)]
        await going_on
        assert (said, process.lost_bytes) == (["after"], len("over\n"))


async def test_program_that_removes_its_files_is_captured_to_its_end() -> None:
    remove = "import shutil\nshutil.rmtree(os.path.dirname(os.readlink('/proc/self/fd/1')))\n"
    code = "os.write(1, b'before\\n')\n" + remove
    async with await capture().spawn([sys.executable, "-c", EMIT + code + "os.write(1, b'after\\n')"]) as process:
        await process.wait()
        said = [item.text async for item in process.events() if isinstance(item, CapturedLine)]
    assert said == ["before", "after"]
