"""What can be typed: usage errors, global options, reading commands."""

from __future__ import annotations

import io
import json
import os
import re
from pathlib import Path

import pytest

from rbee.keeper.cli import hoisted, main
from tests.unit.keeper.small_queen import JOB_ID, small_queen


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Keep the person's own home and settings out of the tests."""
    for name in [name for name in os.environ if name.startswith("RBEE_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("RBEE_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["infer", ""], "The prompt is empty."),
        (["infer", " \n"], "The prompt is empty."),
        (["infer", "--max-tokens", "0", "hi"], "`$.max_tokens`"),
        (["infer", "--temperature", "-1", "hi"], "`$.temperature`"),
        (["infer", "-m", "", "hi"], "`$.model`"),
        (["infer", "-m", "./none.gguf", "hi"], "There is no file"),
        (["infer", "--correlation-id", "a b", "hi"], "The correlation id `a b`"),
        (["infer", "--queen", "localhost", "hi"], "`localhost` is not the address of a queen."),
        (["workers", "stop", "--drain", "4000", "worker-1"], "`$.drain_s`"),
        (["up", "--queen-port", "70000"], "--queen-port cannot be used"),
        (["logs"], "--worker ID or --hive ID"),
        (["logs", "--worker", "a", "--hive", "b"], "--worker ID or --hive ID"),
    ],
)
def test_what_cannot_be_asked_is_refused_before_anything_starts(
    arguments: list[str], message: str, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 2, the reason on stderr, nothing in the home."""
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert message in err
    assert (out, home.exists()) == ("", False)


def test_empty_stdin_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A pipe without a word is no prompt."""
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"")))
    assert main(["infer"]) == 2
    assert "The prompt is empty." in capsys.readouterr().err


def test_stdin_that_is_no_text_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It says at which byte."""
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"ab\xff")))
    assert main(["infer", "-"]) == 2
    assert "no UTF-8 text" in capsys.readouterr().err


def test_prompt_beyond_the_bound_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before it is sent."""
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"a" * (8 * 1024**2 + 1))))
    assert main(["infer"]) == 2
    assert "longer than 8 MiB" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--nope"], ["nope"], ["infer", "--nope", "hi"], ["jobs", "show"]])
def test_unknown_word_is_a_usage_error(arguments: list[str]) -> None:
    """Exit code 2."""
    assert main(arguments) == 2


@pytest.mark.parametrize("arguments", [["--help"], ["infer", "-h"], ["jobs", "list", "--help"], ["--version"]])
def test_help_and_version_exit_0(arguments: list[str], home: Path) -> None:
    """And touch nothing."""
    assert main(arguments) == 0
    assert not home.exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ["status"],
        ["jobs", "list"],
        ["jobs", "show", JOB_ID],
        ["jobs", "follow", JOB_ID],
        ["jobs", "cancel", JOB_ID],
        ["workers", "list"],
        ["workers", "stop", "worker-1"],
        ["hives", "list"],
        ["hives", "show", "hive-1"],
        ["models", "list"],
        ["models", "show", "smollm2:135m"],
        ["models", "recommend"],
        ["models", "rm", "smollm2:135m"],
        ["logs", "--worker", "worker-1"],
    ],
)
def test_reading_command_without_a_queen_starts_none(
    arguments: list[str], home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It says how to start one, and exits 1."""
    assert main(arguments) == 1
    err = capsys.readouterr().err
    assert err == f"rbee: No queen runs in {home}.\n" + (
        "Start one with `rbee up`, or name one with --queen or RBEE_QUEEN_URL.\n"
    )
    assert not home.exists()


def test_up_off_loopback_without_a_key_is_refused(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Before anything else, exit code 3, naming the key."""
    assert main(["up", "--host", "0.0.0.0"]) == 3
    assert "RBEE_API_KEY" in capsys.readouterr().err
    assert not home.exists()


def test_down_where_nothing_runs_says_so(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 0: what was wanted is so."""
    assert main(["down"]) == 0
    assert capsys.readouterr().err == f"[keeper    ] keeper_down: Nothing runs in {home}.\n"


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["infer", "hi", "--queen", "U"], ["--queen", "U", "infer", "hi"]),
        (["jobs", "list", "--home=H", "--json"], ["--home=H", "jobs", "list", "--json"]),
        (["infer", "--", "--queen", "U"], ["infer", "--", "--queen", "U"]),
        (["infer", "--queen"], ["infer", "--queen"]),
        (["--queen", "U", "status", "--correlation-id", "c"], ["--queen", "U", "--correlation-id", "c", "status"]),
    ],
)
def test_global_options_may_stand_anywhere(given: list[str], expected: list[str]) -> None:
    """But not behind `--`, where everything is a plain word."""
    assert hoisted(given) == expected


def test_jobs_are_listed_in_plain_columns_off_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    """A header, a line a job."""
    with small_queen() as queen:
        assert main(["jobs", "list", "--queen", queen.url]) == 0
    header, row = capsys.readouterr().out.splitlines()
    assert header.split() == ["job", "operation", "state", "reason", "model", "created"]
    assert row.split()[:5] == [JOB_ID, "infer", "running", "-", "-"]


def test_job_is_shown_with_where_it_was_placed_last(capsys: pytest.CaptureFixture[str]) -> None:
    """Among its fields, as the log told it."""
    with small_queen() as queen:
        assert main(["jobs", "show", JOB_ID, "--queen", queen.url]) == 0
    rows = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()]
    assert ["placement", "Placed on another worker."] in rows


@pytest.mark.parametrize(
    "arguments",
    [
        ["jobs", "list"],
        ["jobs", "show", JOB_ID],
        ["hives", "list"],
        ["hives", "show", "hive-1"],
        ["models", "list"],
        ["models", "show", "small"],
        ["models", "recommend"],
    ],
)
def test_reading_command_writes_json_when_asked(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """One document on one line."""
    with small_queen() as queen:
        assert main([*arguments, "--json", "--queen", queen.url]) == 0
    out, err = capsys.readouterr()
    json.loads(out)
    assert (len(out.splitlines()), err) == (1, "")


def test_models_of_each_hive_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    """With what their headers say, a dash where that is not known yet."""
    with small_queen() as queen:
        assert main(["models", "list", "--queen", queen.url]) == 0
    model, *rest = capsys.readouterr().out.splitlines()[1].split("  ")
    told = [cell.strip() for cell in rest if cell]
    assert (model, told) == ("smollm2:135m", ["on disk", "98.4 MB", *"-----"])


def test_model_is_shown_with_what_is_known_of_it_and_its_settings(capsys: pytest.CaptureFixture[str]) -> None:
    with small_queen() as queen:
        assert main(["models", "show", "small", "--queen", queen.url]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"^model +smollm2:135m$", shown, re.MULTILINE)
    assert re.search(r"^aliases +small$", shown, re.MULTILINE)
    assert re.search(r"^setting slots +2$", shown, re.MULTILINE)
    assert re.search(r"^setting context_tokens +4096$", shown, re.MULTILINE)
    assert re.search(r"^  path +/m/x.gguf$", shown, re.MULTILINE)


def test_model_nobody_knows_is_not_found_and_the_nearest_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    with small_queen() as queen:
        assert main(["models", "show", "smal", "--queen", queen.url]) == 2
    assert "did you mean `small`?" in capsys.readouterr().err


def test_recommendation_ends_with_one_command(capsys: pytest.CaptureFixture[str]) -> None:
    """The one device of that hive has a byte of memory, so nothing fits it."""
    with small_queen() as queen:
        assert main(["models", "recommend", "--queen", queen.url]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == (
        "No model fits a device as it is now: stop a worker, or use fewer slots or a shorter context."
    )


def test_hive_is_shown_with_its_devices(capsys: pytest.CaptureFixture[str]) -> None:
    with small_queen() as queen:
        assert main(["hives", "show", "hive-1", "--queen", queen.url]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"^memory +4\.0 GB free of 8\.0 GB$", shown, re.MULTILINE)
    assert re.search(r"^cpu +CPU +1 B +1 B +yes$", shown, re.MULTILINE)
    assert re.search(r"^cuda:0 +A card +2 B +2 B +no: install a build for it$", shown, re.MULTILINE)


def test_hive_nobody_knows_is_not_found(capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 2, its id in the message."""
    with small_queen() as queen:
        assert main(["hives", "show", "hive-2", "--queen", queen.url]) == 2
    assert "knows no hive hive-2" in capsys.readouterr().err


def test_worker_log_is_written_page_by_page(capsys: pytest.CaptureFixture[str]) -> None:
    """The engine's own lines as they were, events in the bracket form."""
    with small_queen() as queen:
        assert main(["logs", "--worker", "worker-1", "--queen", queen.url]) == 0
    assert capsys.readouterr().out == "chatter\n[worker    ] worker_ready: Here.\n"
