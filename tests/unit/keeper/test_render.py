"""Drawing: which stream, which column, which colour; and nothing a terminal would obey."""

from __future__ import annotations

import io
import os
import pty
from typing import Any, TextIO

import pytest

from rbee.errors import StartError
from rbee.keeper.progress import tenth
from rbee.keeper.render import OutputClosed, Screen, draw, is_coloured

READY = {"kind": "narration", "actor": "worker", "action": "worker_ready", "message": "Model loaded."}


class Terminal:
    """A pseudo-terminal: what is drawn on it can be read."""

    def __init__(self) -> None:
        self._reading, writing = pty.openpty()
        self.stream = os.fdopen(writing, "w", encoding="utf-8")

    def read(self) -> str:
        """Return what was drawn."""
        self.stream.close()
        drawn = b""
        while True:
            try:
                drawn += os.read(self._reading, 65536)
            except OSError:
                os.close(self._reading)
                return drawn.decode().replace("\r\n", "\n")


@pytest.fixture(autouse=True)
def _colour_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")


def token(text: str) -> dict[str, Any]:
    return {"kind": "token", "text": text, "channel": "answer"}


def test_actor_column_alone_is_coloured() -> None:
    assert draw(READY, coloured=True) == "\x1b[32m[worker    ]\x1b[0m worker_ready: Model loaded."
    assert draw(READY, coloured=False) == "[worker    ] worker_ready: Model loaded."


def test_colour_needs_a_terminal_that_wants_it(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    assert is_coloured(terminal.stream)
    assert not is_coloured(io.StringIO())
    monkeypatch.setenv("NO_COLOR", "1")
    assert not is_coloured(terminal.stream)
    monkeypatch.delenv("NO_COLOR")
    monkeypatch.setenv("TERM", "dumb")
    assert not is_coloured(terminal.stream)
    terminal.read()


def test_narration_within_an_answer_begins_a_line_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """On one terminal for both; the answer goes on below, and ends with one newline."""
    monkeypatch.setenv("NO_COLOR", "1")
    terminal = Terminal()
    screen = Screen(terminal.stream, terminal.stream)
    for event in (token("Hel"), READY, token("lo"), READY):
        screen.show(event)
    screen.finish_answer()
    line = "[worker    ] worker_ready: Model loaded.\n"
    assert terminal.read() == f"Hel\n{line}lo\n{line}"


def test_answer_off_the_terminal_is_not_broken_by_narration() -> None:
    """Stdout has the bytes of the answer, whatever is drawn meanwhile."""
    out, err = io.StringIO(), io.StringIO()
    screen = Screen(out, err)
    for event in (token("Hel"), READY, token("lo"), READY):
        screen.show(event)
    screen.finish_answer()
    assert out.getvalue() == "Hello\n"
    assert err.getvalue() == "[worker    ] worker_ready: Model loaded.\n" * 2


def test_narration_into_the_same_pipe_begins_a_line_of_its_own() -> None:
    """As with `2>&1`."""
    reading, writing = os.pipe()
    with open(writing, "w") as out, open(os.dup(writing), "w") as err:
        screen = Screen(out, err)
        for event in (token("Hel"), READY):
            screen.show(event)
        screen.finish_answer()
    assert os.read(reading, 1000).decode() == "Hel\n[worker    ] worker_ready: Model loaded.\n"
    os.close(reading)


def test_control_characters_reach_no_terminal() -> None:
    """Neither of an answer nor of a narration; off a terminal the answer stays as it is."""
    evil = "a\x1b]0;title\x07b\rc"
    terminal = Terminal()
    Screen(terminal.stream, io.StringIO()).show(token(evil))
    assert terminal.read() == "abc"
    out, err = io.StringIO(), io.StringIO()
    screen = Screen(out, err)
    screen.show(token(evil))
    screen.show(READY | {"message": evil, "actor": "\x1b[31m"})
    screen.problem(evil)
    assert out.getvalue() == evil
    assert "\x1b" not in err.getvalue()


def test_gap_is_told() -> None:
    out, err = io.StringIO(), io.StringIO()
    Screen(out, err).show({"kind": "gap", "reason": "capture_limit", "lost_lines": 3, "lost_bytes": 99})
    assert err.getvalue() == (
        "[queen     ] queen_gap: Something is missing here (capture_limit): 3 lines and 99 bytes.\n"
    )


def test_error_is_told_with_last_lines_and_remedy() -> None:
    err = io.StringIO()
    lines = [str(number) for number in range(30)]
    Screen(io.StringIO(), err, quiet=True).error(
        StartError("It failed.", remedy="Do this.", details={"last_lines": lines})
    )
    shown = err.getvalue().splitlines()
    assert (shown[0], shown[1], shown[-2], shown[-1]) == ("rbee: It failed.", "    | 10", "    | 29", "Do this.")


def test_stderr_that_is_gone_does_not_stop_the_answer() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    out = io.StringIO()
    err = os.fdopen(writing, "w")
    screen = Screen(out, err)
    for event in (READY, token("Hello"), READY):
        screen.show(event)
    assert out.getvalue() == "Hello"
    _close_broken(err)


def test_stdout_that_is_gone_is_an_error_of_its_own() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    out = os.fdopen(writing, "w")
    with pytest.raises(OutputClosed):
        Screen(out, io.StringIO()).show(token("Hello"))
    _close_broken(out)


def _close_broken(stream: TextIO) -> None:
    with pytest.raises(BrokenPipeError):
        stream.close()


def download(
    done: int, total: int | None = 1000, message: str = "", model: str = "m", *, is_done: bool = False
) -> dict[str, Any]:
    fields = {"done_bytes": done, "total_bytes": total} | ({"is_done": True} if is_done else {})
    return {
        "kind": "narration",
        "actor": "hive",
        "action": "model_download",
        "message": message or f"{done}",
        "model": model,
        "job_id": f"job-{model}",
        "fields": fields,
    }


def test_download_off_a_terminal_is_a_line_at_each_tenth() -> None:
    err = io.StringIO()
    screen = Screen(io.StringIO(), err)
    for done in range(0, 1001, 20):
        screen.show(download(done))
    told = [line.rpartition(" ")[2] for line in err.getvalue().splitlines()]
    assert told == [str(done) for done in range(0, 1001, 100)]


def test_download_of_unknown_size_is_told_once() -> None:
    err = io.StringIO()
    screen = Screen(io.StringIO(), err)
    for done in range(0, 1001, 20):
        screen.show(download(done, None))
    assert err.getvalue() == "[hive      ] model_download: 0\n"


def test_download_on_a_terminal_is_a_bar_that_gives_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only its end is a line; what is said meanwhile stands on lines of its own."""
    monkeypatch.setenv("NO_COLOR", "1")
    terminal = Terminal()
    screen = Screen(io.StringIO(), terminal.stream)
    for event in (
        download(100),
        READY,
        download(500),
        download(1000),
        download(1000, message="Here.", is_done=True),
    ):
        screen.show(event)
    drawn = terminal.read()
    assert "10 %" in drawn
    assert "50 %" in drawn
    assert "model_download: 100" not in drawn
    assert "model_download: 1000" not in drawn
    assert drawn.endswith("[hive      ] model_download: Here.\n")


def test_end_of_a_download_is_told_whatever_was_told_before() -> None:
    err = io.StringIO()
    screen = Screen(io.StringIO(), err)
    for event in (download(1000), download(1000, message="Here.", is_done=True)):
        screen.show(event)
    assert err.getvalue().splitlines()[1] == "[hive      ] model_download: Here."


def test_several_downloads_on_a_terminal_have_a_bar_each_until_they_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is said between, all that have not ended are drawn again; one that failed is not."""
    monkeypatch.setenv("NO_COLOR", "1")
    terminal = Terminal()
    screen = Screen(io.StringIO(), terminal.stream)
    for event in (download(110, model="one"), download(220, model="two"), download(330, model="three")):
        screen.show(event)
    screen.show(download(1000, message="One is here.", model="one", is_done=True))
    screen.show({"kind": "end", "state": "failed", "job_id": "job-two"})
    terminal.stream.write("MARK")
    screen.show(download(440, model="three"))
    screen.finish_answer()
    before, after = terminal.read().split("MARK")
    assert [name in before for name in ("one", "two", "three")] == [True, True, True]
    assert [name in after for name in ("one", "two", "three", "44 %")] == [False, False, True, True]


@pytest.mark.parametrize(
    ("done", "total", "expected"),
    [(0, 10, 0), (9, 100, 0), (10, 100, 1), (100, 100, 10), (200, 100, 10), (5, 0, None), (5, None, None)],
)
def test_tenths_are_counted_within_their_bounds(done: int, total: int | None, expected: int | None) -> None:
    assert tenth(download(done, total)) == expected
