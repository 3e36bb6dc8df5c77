"""What a worker can be told."""

from __future__ import annotations

from pathlib import Path

import pytest

from rbee.contracts.ids import is_id
from rbee.contracts.settings import load_settings
from rbee.errors import ConfigurationError
from rbee.worker.settings import WorkerSettings

HIVE_ENVIRONMENT = {
    "RBEE_HIVE_ID": "hive-00000000000000000000000000",
    "RBEE_WORKER_ID": "worker-00000000000000000000000000",
    "RBEE_WORKER_TOKEN": "word",
    "JOB_ID": "job-00000000000000000000000000",
    "CORRELATION_ID": "abc",
}


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RBEE_HOME", str(tmp_path))


def test_hive_tells_by_flags_and_environment() -> None:
    """The command line of the wire, and the identity beside it."""
    argv = ["--model", "/m/a.gguf", "--port", "0", "--slots", "2", "--context-tokens", "512", "--alias", "a:1"]
    settings = load_settings(WorkerSettings, argv, HIVE_ENVIRONMENT)
    settings.check()
    assert (settings.model, settings.slots, settings.context_tokens) == (Path("/m/a.gguf"), 2, 512)
    assert (settings.hive_id, settings.worker_id, settings.job_id, settings.correlation_id) == (
        HIVE_ENVIRONMENT["RBEE_HIVE_ID"],
        HIVE_ENVIRONMENT["RBEE_WORKER_ID"],
        HIVE_ENVIRONMENT["JOB_ID"],
        "abc",
    )
    assert settings.shown_model == "a:1"


def test_worker_started_by_hand_names_itself() -> None:
    """Without a hive the worker makes its id, and shows the file's name."""
    settings = load_settings(WorkerSettings, ["--model", "/m/a.gguf"], {"RBEE_WORKER_TOKEN": "word"})
    settings.check()
    assert is_id("worker", settings.worker_id)
    assert (settings.hive_id, settings.shown_model) == (None, "a")


def test_token_is_never_shown() -> None:
    """Secrets print as stars."""
    settings = load_settings(WorkerSettings, ["--model", "/m/a.gguf"], {"RBEE_WORKER_TOKEN": "word"})
    assert settings.shown()["worker_token"] == "***"


@pytest.mark.parametrize(
    ("argv", "environ", "complaint"),
    [
        (["--model", "/m/a.gguf"], {}, "RBEE_WORKER_TOKEN is not set"),
        ([], {"RBEE_WORKER_TOKEN": "word"}, "No model is named"),
        (
            ["--model", "/m/a", "--embedding", "--reranking"],
            {"RBEE_WORKER_TOKEN": "word"},
            "embeddings or for reranking",
        ),
    ],
)
def test_what_is_missing_is_named(argv: list[str], environ: dict[str, str], complaint: str) -> None:
    """Exit code 2, with the sentence that helps."""
    settings = load_settings(WorkerSettings, argv, environ)
    with pytest.raises(ConfigurationError, match=complaint):
        settings.check()


@pytest.mark.parametrize("worker_id", ["../../etc", "worker-1", "hive-00000000000000000000000000"])
def test_worker_id_of_another_form_is_refused(worker_id: str) -> None:
    """The id names a directory, so it must not lead elsewhere."""
    with pytest.raises(ConfigurationError, match="RBEE_WORKER_ID"):
        load_settings(WorkerSettings, ["--model", "/m"], {"RBEE_WORKER_ID": worker_id})


def test_slots_out_of_range_are_refused() -> None:
    """At least one."""
    with pytest.raises(ConfigurationError, match="--slots"):
        load_settings(WorkerSettings, ["--slots", "0"], {})


@pytest.mark.parametrize(
    ("model", "shown"), [("/models/Qwen2.5-0.5B.gguf", "Qwen2.5-0.5B"), ("Qwen/Qwen2.5-0.5B", "Qwen2.5-0.5B")]
)
def test_name_without_an_alias_is_whole(model: str, shown: str) -> None:
    """A number's point does not end it."""
    assert WorkerSettings(home=Path(), model=Path(model)).shown_model == shown
