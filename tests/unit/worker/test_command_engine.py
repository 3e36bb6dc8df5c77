"""A server of its own as a worker's engine: started, waited for, stopped, whatever it does."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from rbee.contracts.engine_settings import EngineSettings
from rbee.errors import ModelInvalidError, StartError
from rbee.narration.testing import captured_narration
from rbee.processes import find_marked, stop_tree
from rbee.worker.engines import EngineAddress
from rbee.worker.engines.command import Command, CommandOptions, CommandProcess

SERVER = str(Path(__file__).with_name("small_server.py"))
MARKER = ("RBEE_WORKER_ID", "worker-of-a-test")
Make = Callable[..., Command]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    """Make engines of the small server; nothing of them is left."""
    marker = (MARKER[0], f"{MARKER[1]}-{tmp_path.name}-{os.getpid()}")

    def make_one(behaviour: str, *, place: str = "{port}", words: tuple[str, ...] = (), **values: Any) -> Command:
        values.setdefault("command", (sys.executable, SERVER, place, behaviour, *words))
        values.setdefault("ready_timeout_s", 20.0)
        values.setdefault("needs_file", False)
        return Command(
            CommandOptions(
                name="cook",
                settings=EngineSettings(**values),
                model="/models/m.gguf",
                alias="smollm2:135m",
                directory=tmp_path / "worker",
                environment={"RBEE_HOME": str(tmp_path)},
                marker=marker,
                slots=3,
                context_tokens=512,
                device="cuda:1",
            )
        )

    with captured_narration():
        yield make_one
    left = find_marked(*marker)
    asyncio.run(stop_tree(None, marker=marker, grace_s=0))
    assert left == []


def stop(address: EngineAddress, grace_s: float = 10.0) -> None:
    """Stop what was loaded."""
    assert address.process is not None
    asyncio.run(address.process.stop(grace_s))


async def said(address: EngineAddress) -> dict[str, Any]:
    """Ask the server how it was started."""
    connector = aiohttp.UnixConnector(address.socket_path) if address.socket_path else None
    headers = {"authorization": f"Bearer {address.key}"}
    async with (
        aiohttp.ClientSession(connector=connector) as session,
        session.get(f"{address.url}/said", headers=headers) as response,
    ):
        answer: dict[str, Any] = json.loads(await response.read())
        return answer


def test_server_gets_what_its_command_asks_for(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every placeholder, the variables it was given, the key in one of them, and no secret of ours."""
    monkeypatch.setenv("RBEE_WORKER_TOKEN", "ours")
    monkeypatch.setenv("HF_TOKEN", "ours")
    words = ("{model}", "{model_name}", "{host}", "{slots}", "{context_tokens}", "{device}", '{"a": 1}')
    address = make("good", words=words, env={"COOKS_WORD": "salt"}, api_key_env="COOKS_KEY").load()
    answer = asyncio.run(said(address))
    stop(address)
    assert answer["argv"][2:] == ["/models/m.gguf", "smollm2:135m", "127.0.0.1", "3", "512", "cuda", '{"a": 1}']
    assert answer["env"]["COOKS_WORD"] == "salt"
    assert answer["env"]["COOKS_KEY"] == address.key
    assert answer["key"] == f"Bearer {address.key}"
    assert "ours" not in answer["env"].values()
    assert address.url == f"http://127.0.0.1:{answer['argv'][0]}"
    assert (address.traits.name, address.traits.is_built_in) == ("cook", False)
    assert address.traits.model_name == "smollm2:135m"


def test_server_listens_on_a_socket(make: Make) -> None:
    """In the worker's own directory, whatever the length of its path."""
    address = make("good", place="{socket}", model_name="{model}").load()
    assert asyncio.run(said(address))["argv"][0] == address.socket_path
    stop(address)
    assert address.traits.model_name == "/models/m.gguf"


@pytest.mark.parametrize("behaviour", ["good", "stubborn", "family"])
def test_stop_leaves_nothing(make: Make, behaviour: str) -> None:
    """Not of one that does not hear TERM, nor a child that left its group; the fixture looks."""
    stop(make(behaviour).load(), grace_s=0.5)


def test_stopped_server_hears_its_end(make: Make) -> None:
    """One that was halted goes on, to end."""
    address = make("good").load()
    (pid,) = [pid for pid, _ in find_marked(*_marker_of(address))]
    os.kill(pid, signal.SIGSTOP)
    stop(address)


def _marker_of(address: EngineAddress) -> tuple[str, str]:
    answer = asyncio.run(said(address))
    return MARKER[0], answer["env"][MARKER[0]]


def test_server_that_ends_is_told_with_its_last_words(make: Make) -> None:
    """And with no secret it was given."""
    env = {"COOKS_SECRET": "hunter2-hunter2"}
    with pytest.raises(StartError) as caught:
        make("dies", env=env).load()
    assert caught.value.message == (
        "The engine cook ended with exit code 7 before it was ready. "
        "Its last words: cook: no such model, my key is ***"
    )
    assert "[engines.cook]" in caught.value.remedy


def test_key_is_not_in_the_last_words(make: Make) -> None:
    """A server that shows its arguments shows the key."""
    with pytest.raises(StartError) as caught:
        make("tells", words=("{api_key}",)).load()
    assert caught.value.message.endswith("Its last words: cook: started with ***")


def test_server_that_is_killed_is_told_by_the_signal(make: Make) -> None:
    """As of the kernel, when memory is short."""
    with pytest.raises(StartError, match="The engine cook was ended by SIGKILL before it was ready"):
        make("killed").load()


@pytest.mark.parametrize(
    ("behaviour", "how"),
    [
        ("loading", "/health is answered with status 503, not 200"),
        ("lacks_health", "/health is answered with status 404, not 200"),
        ("silent", "/health was not answered"),
    ],
)
def test_server_that_is_not_ready_in_time_is_stopped(make: Make, behaviour: str, how: str) -> None:
    """Loading for ever, without such a route, silent: bounded, and said."""
    with pytest.raises(StartError, match=f"The engine cook was not ready after 3 s: {how}"):
        make(behaviour, ready_timeout_s=3.0).load()


def test_what_a_server_answers_meanwhile_is_told_once_each(make: Make) -> None:
    """However often it changes its mind."""
    with captured_narration() as said, pytest.raises(StartError):
        make("flaps", ready_timeout_s=3.0).load()
    told = [event["message"] for event in said.events]
    assert sorted(told) == [
        f"The engine cook is up, but /health is answered with status {status}, not 200." for status in (404, 500)
    ]


def test_stranger_on_the_port_is_not_asked(make: Make) -> None:
    """Prompts go only to the process that was started, and those it started."""
    with pytest.raises(StartError, match="The engine cook is not who answers on the port it was given"):
        make("stranger").load()


def test_program_that_is_not_there_is_named(make: Make) -> None:
    """With what to look at."""
    with pytest.raises(StartError, match="`no-such-cook` cannot be started: No such file or directory"):
        make("good", command=("no-such-cook", "{port}")).load()


def test_missing_file_is_named(make: Make) -> None:
    """Where one is needed, before anything is started."""
    with pytest.raises(ModelInvalidError, match=r"There is no model file at /models/m\.gguf"):
        make("good", needs_file=True).load()


def test_kill_leaves_nothing(make: Make) -> None:
    """Not a child that left its group, also when the server itself has ended before."""
    for is_gone_before in (False, True):
        engine = make("family")
        address = engine.load()
        if is_gone_before:
            os.kill(process_of(address).child.pid, signal.SIGKILL)
            asyncio.run(process_of(address).ended())
        engine.kill()
        assert find_marked(*engine._options.marker) == []


def process_of(address: EngineAddress) -> CommandProcess:
    """Return what was started."""
    assert isinstance(address.process, CommandProcess)
    return address.process


def test_kill_ends_the_server_at_once(make: Make) -> None:
    """From any thread, when the worker has no time left."""
    engine = make("stubborn")
    address = engine.load()
    engine.kill()
    assert address.process is not None
    assert asyncio.run(address.process.ended()) == "The engine cook was ended by SIGKILL."
    engine.kill()  # harmless
