"""Which models can be asked for, and in which state each is."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from rbee.contracts.heartbeats import DownloadInfo, Heartbeat, ModelInfo, ModelMemory
from rbee.contracts.model_settings import ModelSettings, ModelTable
from rbee.contracts.states import WorkerState
from rbee.contracts.views import Progress
from rbee.errors import ModelNotFoundError
from rbee.queen.model_list import find_model, list_models
from tests.unit.queen.queen_stage import GIB, MODEL, heartbeat, worker_info

HUB = "hf:org/repo:Q4_K_M"
MEMORY = ModelMemory(weights_bytes=3, cache_bytes_per_token=2, work_bytes=1)


def beat(*models: ModelInfo, downloads: dict[str, int] | None = None) -> Heartbeat:
    """Return what a hive says of its models."""
    coming = [DownloadInfo(model=name, done_bytes=done, total_bytes=9) for name, done in (downloads or {}).items()]
    return msgspec.structs.replace(heartbeat(), models=list(models), downloads=coming)


def states(beats: list[Heartbeat], *workers: Any, table: ModelTable | None = None) -> dict[str, str]:
    """Return the states of a list."""
    return {view.id: view.state for view in list_models(beats, workers, table or ModelTable())}


def test_each_model_has_the_state_that_serves_soonest() -> None:
    """Loaded before on a disk, on a disk before under way, whichever hive has it; else to be fetched."""
    on_disk = ModelInfo(model=HUB, size_bytes=GIB, path="/a")
    assert states([]) == {MODEL: "remote"}
    assert states([beat(downloads={HUB: 4})]) == {MODEL: "remote", HUB: "downloading"}
    assert states([beat(downloads={HUB: 4}), beat(on_disk)]) == {MODEL: "remote", HUB: "available"}
    assert states([beat(on_disk)], worker_info("w", model=HUB)) == {MODEL: "remote", HUB: "loaded"}
    starting = worker_info("w", model=HUB, state=WorkerState.STARTING)
    assert states([beat(on_disk)], starting) == {MODEL: "remote", HUB: "available"}


def test_download_tells_how_far_it_is() -> None:
    """In bytes, and only while that is the model's state."""
    coming, on_disk = beat(downloads={HUB: 4}), beat(ModelInfo(model=HUB, size_bytes=GIB, path="/a"))
    assert find_model(HUB, [coming], [], ModelTable()).progress == Progress(done=4, total=9, unit="bytes")
    assert find_model(HUB, [coming, on_disk], [], ModelTable()).progress is None


def test_what_a_hive_knows_of_a_file_is_shown_and_the_rest_left_out() -> None:
    """No null where nothing is known."""
    info = ModelInfo(
        model=HUB,
        size_bytes=5,
        path="/a",
        quantization="Q4_K_M",
        context_tokens=8192,
        purpose="embed",
        memory=MEMORY,
    )
    shown = msgspec.to_builtins(find_model(HUB, [beat(info)], [], ModelTable()))
    assert shown == {
        "id": HUB,
        "object": "model",
        "created": 0,
        "owned_by": "rbee",
        "state": "available",
        "type": "model",
        "display_name": HUB,
        "created_at": "1970-01-01T00:00:00Z",
        "size_bytes": 5,
        "quantization": "Q4_K_M",
        "context_tokens": 8192,
        "purpose": "embed",
        "memory": {"weights_bytes": 3, "cache_bytes_per_token": 2, "work_bytes": 1},
    }


def test_alias_is_listed_with_what_it_stands_for_and_in_its_state() -> None:
    """Also where the model is known by nothing but its alias or its settings."""
    table = ModelTable(
        aliases={"fast": MODEL, "big": HUB}, models={"hf:org/other": ModelSettings(purpose="rerank")}
    )
    listed = {view.id: view for view in list_models([], [worker_info("w")], table)}
    assert list(listed) == sorted(listed)
    assert {name: (view.state, view.alias_of) for name, view in listed.items()} == {
        "fast": ("loaded", MODEL),
        "big": ("remote", HUB),
        MODEL: ("loaded", None),
        HUB: ("remote", None),
        "hf:org/other": ("remote", None),
    }
    assert listed["hf:org/other"].purpose == "rerank"


def test_model_that_a_source_takes_can_be_asked_for_unseen() -> None:
    """A reference of the hub is remote; a file that nobody has loaded and an unknown name are not there."""
    assert find_model(HUB, [], [], ModelTable()).state == "remote"
    assert find_model("/a.gguf", [], [worker_info("w", model="/a.gguf")], ModelTable()).state == "loaded"
    for name in ("/a.gguf", "gpt-4", ""):
        with pytest.raises(ModelNotFoundError):
            find_model(name, [], [], ModelTable())
