"""The client for programs without an event loop: threads, early leaving, the end of the process."""

from __future__ import annotations

import asyncio
import gc
import inspect
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
from aiohttp import web

from rbee.client import JobClient, SyncJobClient
from rbee.errors import ConfigurationError, InternalError, NotFoundError
from tests.unit.client.scripted_queen import (
    ScriptedQueen,
    Turn,
    answer,
    broken,
    frame,
    refusal,
    scripted_queen,
    stream,
)
from tests.unit.client.test_job_client import ACCEPTED, JOB

WAIT_S = 30.0
LOG = b"".join(frame(seq) for seq in range(1, 300)) + frame(300, "end", state="completed")


@contextmanager
def queen_in_a_thread(*turns: Turn) -> Iterator[ScriptedQueen]:
    """Run a scripted queen beside a test that has no event loop."""
    loop = asyncio.new_event_loop()
    stop = asyncio.Event()
    started = threading.Event()
    queens: list[ScriptedQueen] = []

    async def serve() -> None:
        async with scripted_queen(*turns) as queen:
            queens.append(queen)
            started.set()
            await stop.wait()

    thread = threading.Thread(target=loop.run_until_complete, args=(serve(),))
    thread.start()
    try:
        assert started.wait(WAIT_S)
        yield queens[0]
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(WAIT_S)
        loop.close()


def held(left: threading.Event) -> Turn:
    """Send two events, then wait until the reader has left, and note that."""

    async def turn(request: web.Request) -> web.StreamResponse:
        try:
            return await stream(frame(1), frame(2), hold=True)(request)
        finally:
            left.set()

    return turn


def client_threads() -> list[threading.Thread]:
    """Return the threads of clients that are open."""
    return [thread for thread in threading.enumerate() if thread.name == "rbee-client"]


def test_both_clients_have_the_same_methods() -> None:
    """With the same parameters, so that one description does for both."""

    def methods(cls: type) -> dict[str, list[tuple[str, object, object]]]:
        public = inspect.getmembers(cls, inspect.isfunction)
        return {
            name: [(one.name, one.kind, one.default) for one in inspect.signature(method).parameters.values()]
            for name, method in public
            if not name.startswith("_") and name != "close"
        }

    assert methods(SyncJobClient) == methods(JobClient)


def test_job_is_submitted_and_followed_to_its_end() -> None:
    """The first thing anybody does."""
    with (
        queen_in_a_thread(answer(202, ACCEPTED), stream(LOG)) as queen,
        SyncJobClient(queen.url, api_key="k", correlation_id="c-1") as client,
    ):
        accepted = client.submit({"operation": "queen_check"})
        seen = [event["seq"] for event in client.follow(accepted.job_id)]
    assert seen == list(range(1, 301))
    assert queen.requests[0].headers["Authorization"] == "Bearer k"
    assert {request.headers["x-correlation-id"] for request in queen.requests} == {"c-1"}
    assert client_threads() == []


def test_submit_is_repeated_with_its_key() -> None:
    """As the asynchronous client does."""
    with queen_in_a_thread(broken(), answer(202, ACCEPTED)) as queen, SyncJobClient(queen.url) as client:
        client.submit({"operation": "queen_check"})
    first, second = (request.headers["Idempotency-Key"] for request in queen.requests)
    assert first == second


def test_follow_goes_on_behind_what_was_seen() -> None:
    """Across a connection that breaks, and from a number on."""
    turns = stream(frame(3), cut=True), stream(frame(4, "end", state="completed"))
    with queen_in_a_thread(*turns) as queen, SyncJobClient(queen.url) as client:
        assert [event["seq"] for event in client.follow("job-1", after=2)] == [3, 4]
    assert queen.cursors == ["2", "3"]


def test_error_reaches_the_caller() -> None:
    """From a call and from a log, behind the events that came before it."""
    gone = refusal(404, "not_found", "No such job.")
    turns = gone, gone, stream(frame(1), frame(9))
    with queen_in_a_thread(*turns) as queen, SyncJobClient(queen.url) as client:
        with pytest.raises(NotFoundError, match="No such job"):
            client.job("job-1")
        with pytest.raises(NotFoundError, match="No such job"):
            next(client.follow("job-1"))
        events = client.follow("job-1")
        assert next(events)["seq"] == 1
        with pytest.raises(InternalError, match="has a hole"):
            next(events)


def test_address_that_is_none_starts_no_thread() -> None:
    """It is refused before."""
    with pytest.raises(ConfigurationError):
        SyncJobClient("nowhere")
    assert client_threads() == []


@pytest.mark.parametrize("leave", ["break", "close", "collect", "raise"])
def test_reader_that_leaves_early_ends_its_connection(leave: str) -> None:
    """However it leaves; the client goes on."""
    left = threading.Event()
    with queen_in_a_thread(held(left), answer(200, JOB)) as queen, SyncJobClient(queen.url) as client:
        _read_one(client, leave)
        assert left.wait(WAIT_S)
        assert client.job("job-1").job_id == "job-1"


def _read_one(client: SyncJobClient, leave: str) -> None:
    events = client.follow("job-1")
    for event in events:
        assert event["seq"] == 1
        if leave == "raise":
            with pytest.raises(ZeroDivisionError):
                events.throw(ZeroDivisionError())
        break
    if leave == "close":
        events.close()
    elif leave == "collect":
        circle: list[object] = [events]
        circle.append(circle)
        del circle, events
        gc.collect()


def test_client_closed_under_a_reader_ends_it() -> None:
    """It hears why; nothing waits for ever."""
    left = threading.Event()
    with queen_in_a_thread(held(left)) as queen, ThreadPoolExecutor(1) as pool:
        client = SyncJobClient(queen.url)
        events = client.follow("job-1")
        assert [next(events)["seq"], next(events)["seq"]] == [1, 2]
        waiting = pool.submit(next, events)
        client.close()
        with pytest.raises(InternalError, match="closed"):
            waiting.result(WAIT_S)
        assert left.wait(WAIT_S)
    with pytest.raises(InternalError, match="closed"):
        client.status()
    client.close()
    events.close()
    assert client_threads() == []


def test_threads_share_a_client() -> None:
    """Each reads its own log, whole."""
    with (
        queen_in_a_thread(stream(LOG)) as queen,
        SyncJobClient(queen.url) as client,
        ThreadPoolExecutor(8) as pool,
    ):
        logs = list(pool.map(lambda n: [event["seq"] for event in client.follow(f"job-{n}")], range(24)))
    assert logs == [list(range(1, 301))] * 24
    assert client_threads() == []


def test_forgotten_client_is_closed() -> None:
    """Its thread ends with it."""
    client = SyncJobClient("http://127.0.0.1:1")
    (thread,) = client_threads()
    del client
    gc.collect()
    thread.join(WAIT_S)
    assert not thread.is_alive()


def test_callback_that_waits_for_its_own_client_is_told_so() -> None:
    """Instead of waiting for ever."""
    asked: list[Callable[[], object]] = []
    with (
        queen_in_a_thread(broken()) as queen,
        SyncJobClient(queen.url, on_contact=lambda is_there, why: asked[0]()) as client,  # type: ignore[arg-type]
    ):
        asked.append(client.status)
        with pytest.raises(InternalError, match="cannot wait for itself"):
            client.submit({"operation": "queen_check"})


FOLLOW = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in what a shell starts in the background
from rbee.client import SyncJobClient
from rbee.errors import InternalError
client = SyncJobClient(sys.argv[1])
events = client.follow("job-1")
print(next(events)["seq"], flush=True)
"""
FORK = """
pid = os.fork()
if pid == 0:
    try:
        client.job("job-1")
    except InternalError as error:
        print(error.message, flush=True)
    client.close()
    os._exit(7)
print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), next(events)["seq"])
"""


def start(script: str, url: str) -> subprocess.Popen[str]:
    """Run a program that complains of everything it can complain of."""
    command = [sys.executable, "-X", "dev", "-W", "error", "-c", script, url]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_process_that_ends_half_way_ends_cleanly(host: str) -> None:
    """Nothing closed, nothing waited for, no word of complaint; also when a thread has resolved a name."""
    left = threading.Event()
    with queen_in_a_thread(held(left)) as queen:
        process = start(FOLLOW, queen.url.replace("127.0.0.1", host))
        assert process.communicate(timeout=WAIT_S) == ("1\n", "")
        assert process.returncode == 0
        assert left.wait(WAIT_S)


def test_interrupted_reader_ends() -> None:
    """Ctrl-C while nothing comes."""
    left = threading.Event()
    with queen_in_a_thread(held(left)) as queen:
        process = start(FOLLOW + "print(next(events)['seq'], flush=True)\nnext(events)\n", queen.url)
        assert process.stdout is not None
        assert [process.stdout.readline(), process.stdout.readline()] == ["1\n", "2\n"]
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=WAIT_S)
        assert err.splitlines()[-1] == "KeyboardInterrupt"
        assert process.returncode == -signal.SIGINT
        assert left.wait(WAIT_S)


def test_forked_process_is_refused_and_its_parent_goes_on() -> None:
    """Closing there closes nothing of the parent's."""
    with queen_in_a_thread(held(threading.Event())) as queen:
        process = start(FOLLOW + FORK, queen.url)
        out, err = process.communicate(timeout=WAIT_S)
    assert err == ""
    assert out == "1\nA client is of no use in a forked process: its connections are the parent's.\n7 2\n"


STORM = """
import signal, sys
from rbee.client import SyncJobClient
is_armed = False

def interrupt(number, stack):
    global is_armed
    if is_armed:
        is_armed = False
        raise KeyboardInterrupt

signal.signal(signal.SIGINT, interrupt)
client = SyncJobClient(sys.argv[1])
interrupts = 0
print("ready", flush=True)
while interrupts < 150:
    try:
        is_armed = True
        while True:
            client.job("job-1")
    except KeyboardInterrupt:
        interrupts += 1
signal.signal(signal.SIGINT, signal.SIG_IGN)
print(client.job("job-1").job_id)
"""


def test_client_goes_on_after_interrupts_at_any_moment() -> None:
    """None leaves a coroutine that nobody awaits, or a thread that waits for ever."""
    with queen_in_a_thread(answer(200, JOB)) as queen:
        process = start(STORM, queen.url)
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        dice = random.Random(1)
        while process.poll() is None:
            process.send_signal(signal.SIGINT)
            time.sleep(dice.uniform(0.0, 0.01))  # any moment
        out, err = process.communicate(timeout=WAIT_S)
    assert (out, process.returncode) == ("job-1\n", 0)
    assert "never awaited" not in err


def test_threads_share_a_client_whose_connections_break() -> None:
    """Each goes on where its own log was cut."""
    frames = [frame(seq) for seq in range(1, 40)] + [frame(40, "end", state="completed")]

    async def part(request: web.Request) -> web.StreamResponse:
        after = int(request.headers.get("Last-Event-ID", 0))
        return await stream(b"retry: 1\n\n", *frames[after : after + 13], cut=after + 13 < 40)(request)

    with queen_in_a_thread(part) as queen, SyncJobClient(queen.url) as client, ThreadPoolExecutor(16) as pool:
        logs = list(pool.map(lambda n: [event["seq"] for event in client.follow(f"job-{n}")], range(32)))
    assert logs == [list(range(1, 41))] * 32
    assert len(queen.requests) >= 32 * 4
