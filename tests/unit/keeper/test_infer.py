"""`rbee infer` against a queen that plays a script: streams, exit codes, signals."""

from __future__ import annotations

import io
import json
import os
import signal
from pathlib import Path

import pytest

from rbee.keeper.cli import main
from tests.unit.keeper.small_queen import JOB_ID, SmallQueen, end, narration, small_queen, token

STORY = (
    {"kind": "state", "state": "queued"},
    narration("queen_receive", "Accepted."),
    token("Hel"),
    token("lo"),
    narration("queen_complete", "Done."),
    end(result={"text": "Hello"}),
)


@pytest.fixture(autouse=True)
def _own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the person's own home and settings out of the tests."""
    for name in [name for name in os.environ if name.startswith("RBEE_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("RBEE_HOME", str(tmp_path / "home"))


def infer(queen: SmallQueen, *arguments: str) -> int:
    """Run the command against a queen."""
    return main(["infer", "--queen", queen.url, *arguments])


def test_answer_goes_to_stdout_and_narration_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing but the answer, with a newline it lacked, on stdout."""
    with small_queen(*STORY) as queen:
        assert infer(queen, "hi") == 0
    out, err = capsys.readouterr()
    assert out == "Hello\n"
    assert err == "[queen     ] queen_receive: Accepted.\n[queen     ] queen_complete: Done.\n"


def test_answer_that_ends_its_line_gets_no_second_newline(capsys: pytest.CaptureFixture[str]) -> None:
    """The answer stays as it is."""
    with small_queen(token("a\n"), end()) as queen:
        infer(queen, "hi")
    assert capsys.readouterr().out == "a\n"


def test_reasoning_is_no_part_of_the_answer(capsys: pytest.CaptureFixture[str]) -> None:
    """Only the answer's channel is on stdout."""
    with small_queen(token("hm", "reasoning"), token("yes"), end()) as queen:
        infer(queen, "hi")
    assert capsys.readouterr().out == "yes\n"


def test_options_become_fields_of_the_operation() -> None:
    """What is not given is not sent, and the submit can be repeated safely."""
    with small_queen(*STORY) as queen:
        code = infer(
            queen,
            "-m",
            "smollm2:135m",
            "--max-tokens",
            "5",
            "--temperature",
            "0",
            "--seed",
            "7",
            "--timeout",
            "9",
            "--queue-timeout",
            "3.5",
            "hi",
        )
    assert code == 0
    assert queen.submitted == [
        {
            "operation": "infer",
            "prompt": "hi",
            "model": "smollm2:135m",
            "max_tokens": 5,
            "temperature": 0,
            "seed": 7,
            "timeout_s": 9,
            "queue_timeout_s": 3.5,
        }
    ]
    assert [len(key or "") for key in queen.keys] == [36]


def test_key_and_correlation_id_are_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    """The key from the environment alone, the id from the option."""
    monkeypatch.setenv("RBEE_API_KEY", "k")
    with small_queen(*STORY) as queen:
        infer(queen, "--correlation-id", "mine-1", "hi")
    assert queen.headers[0]["Authorization"] == "Bearer k"
    assert queen.headers[0]["x-correlation-id"] == "mine-1"


@pytest.mark.parametrize("arguments", [[], ["-"]])
def test_prompt_comes_from_stdin_when_it_is_absent(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Every byte of it."""
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO("Grüße\n".encode())))
    with small_queen(*STORY) as queen:
        assert infer(queen, *arguments) == 0
    assert queen.submitted[0]["prompt"] == "Grüße\n"


def test_relative_model_path_is_made_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hive works in another directory."""
    (tmp_path / "x.gguf").touch()
    monkeypatch.chdir(tmp_path)
    with small_queen(*STORY) as queen:
        infer(queen, "-m", "x.gguf", "hi")
    assert queen.submitted[0]["model"] == str(tmp_path / "x.gguf")


def test_json_writes_every_event_and_nothing_else(capsys: pytest.CaptureFixture[str]) -> None:
    """One JSON object a line, numbered, in order."""
    with small_queen(*STORY) as queen:
        assert infer(queen, "--json", "hi") == 0
    out, err = capsys.readouterr()
    events = [json.loads(line) for line in out.splitlines()]
    assert [event["seq"] for event in events] == [1, 2, 3, 4, 5, 6]
    assert [event["kind"] for event in events] == ["state", "narration", "token", "token", "narration", "end"]
    assert err == ""


def test_quiet_draws_no_narration(capsys: pytest.CaptureFixture[str]) -> None:
    """The answer alone."""
    with small_queen(*STORY) as queen:
        infer(queen, "-q", "hi")
    assert capsys.readouterr() == ("Hello\n", "")


def test_failed_job_tells_why_and_exits_1(capsys: pytest.CaptureFixture[str]) -> None:
    """Message, last lines, remedy; quiet or not."""
    error = {"message": "The worker ended with exit code 7.", "last_lines": ["a", "b"], "remedy": "Do this."}
    with small_queen(token("Hel"), end("failed", reason="worker_lost", error=error)) as queen:
        assert infer(queen, "-q", "hi") == 1
    out, err = capsys.readouterr()
    assert out == "Hel\n"
    assert err == "rbee: The worker ended with exit code 7.\n    | a\n    | b\nDo this.\n"


def test_job_cancelled_by_somebody_else_exits_1(capsys: pytest.CaptureFixture[str]) -> None:
    """It did not do what was asked."""
    with small_queen(end("cancelled", reason="user")) as queen:
        assert infer(queen, "hi") == 1
    assert capsys.readouterr().err == "rbee: The job was cancelled.\n"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_cancels_the_job_and_exits_130(number: signal.Signals, capsys: pytest.CaptureFixture[str]) -> None:
    """The queen is asked to cancel, and the end is waited for."""
    interrupt = lambda: os.kill(os.getpid(), number)  # noqa: E731
    last = narration("queen_cancelled", "Cancelled.")
    with small_queen(token("Hel"), interrupt, "wait", last, end("cancelled", reason="user")) as queen:
        assert infer(queen, "hi") == 130
    out, err = capsys.readouterr()
    assert queen.cancelled == [JOB_ID]
    assert out == "Hel\n"
    assert err == f"[keeper    ] keeper_cancel: Cancelling {JOB_ID}.\n[queen     ] queen_cancelled: Cancelled.\n"


def test_cut_stream_is_followed_on_without_a_word(capsys: pytest.CaptureFixture[str]) -> None:
    """A connection that breaks once is nobody's business."""
    with small_queen(token("Hel"), "cut", token("lo"), end()) as queen:
        assert infer(queen, "hi") == 0
    assert capsys.readouterr() == ("Hello\n", "")


def test_closed_stdout_cancels_the_job_and_exits_141(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in `rbee infer … | head -1`."""
    reading, writing = os.pipe()
    os.close(reading)
    with small_queen(token("Hel"), "wait", end("cancelled")) as queen, open(writing, "w") as closed:
        monkeypatch.setattr("sys.stdout", closed)
        assert infer(queen, "hi") == 141
    assert queen.cancelled == [JOB_ID]


def test_queen_that_cannot_be_reached_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    """A queen that was named is never replaced by one started here."""
    assert main(["--queen", "http://127.0.0.1:1", "infer", "hi"]) == 1
    assert "The queen at http://127.0.0.1:1 cannot be reached: Connection refused." in capsys.readouterr().err
