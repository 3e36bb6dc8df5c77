"""The models that can be asked for, each with its state, as `/v1/models` tells them. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from rbee.contracts.heartbeats import DownloadInfo, Heartbeat, ModelInfo, WorkerInfo
from rbee.contracts.model_settings import ModelTable
from rbee.contracts.models import KNOWN_MODELS, parse_model_ref
from rbee.contracts.states import WorkerState
from rbee.contracts.views import ModelState, ModelView, Progress
from rbee.errors import ModelNotFoundError


def list_models(beats: Iterable[Heartbeat], workers: Iterable[WorkerInfo], table: ModelTable) -> list[ModelView]:
    """List what can be asked for, by name: what hives have or fetch, what is known, and every alias.

    Args:
        beats: The last heartbeats of the hives that can be reached.
        workers: Their workers.
        table: What the configuration says of models.
    """
    seen = _Seen(beats, workers, table)
    return [seen.view(name) for name in sorted(seen.names())]


def find_model(
    name: str, beats: Iterable[Heartbeat], workers: Iterable[WorkerInfo], table: ModelTable
) -> ModelView:
    """Show one model; one that no hive has yet can be asked for where a source takes its name.

    Raises:
        ModelNotFoundError: It is neither listed nor of a form that some source takes.
    """
    seen = _Seen(beats, workers, table)
    if name not in seen.names() and parse_model_ref(name).source == "file":
        raise ModelNotFoundError(f"The file {name} is not loaded anywhere.", param="model")
    return seen.view(name)


class _Seen:
    """What is seen of models anywhere, by name."""

    def __init__(self, beats: Iterable[Heartbeat], workers: Iterable[WorkerInfo], table: ModelTable) -> None:
        self._table = table
        self._loaded = {info.model for info in workers if info.state is WorkerState.READY}
        self._on_disk: dict[str, ModelInfo] = {}
        self._coming: dict[str, DownloadInfo] = {}
        for beat in beats:
            self._on_disk.update({info.model: info for info in beat.models})
            self._coming.update({download.model: download for download in beat.downloads})

    def names(self) -> set[str]:
        """Return every name that can be asked for."""
        named = {*self._table.aliases, *self._table.aliases.values(), *self._table.models}
        return {*self._loaded, *self._on_disk, *self._coming, *KNOWN_MODELS, *named}

    def view(self, name: str) -> ModelView:
        """Show a model, or what an alias stands for, under its name."""
        model = self._table.resolve(name)
        return ModelView(
            id=name,
            object="model",
            created=0,
            owned_by="rbee",
            type="model",
            display_name=name,
            created_at="1970-01-01T00:00:00Z",
            state=self._state(model),
            alias_of=model if model != name else None,
            progress=self._progress(model),
            **dict(self._details(model)),
        )

    def _state(self, model: str) -> ModelState:
        if model in self._loaded:
            return "loaded"
        if model in self._on_disk:
            return "available"
        return "downloading" if model in self._coming else "remote"

    def _progress(self, model: str) -> Progress | None:
        download = self._coming.get(model)
        if download is None or self._state(model) != "downloading":
            return None
        return Progress(done=download.done_bytes, total=download.total_bytes, unit="bytes")

    def _details(self, model: str) -> Iterator[tuple[str, Any]]:
        info = self._on_disk.get(model)
        for field in ("size_bytes", "quantization", "context_tokens", "architecture", "purpose", "memory"):
            yield field, getattr(info, field, None)
        if known := KNOWN_MODELS.get(model):
            yield "size_bytes", info.size_bytes if info else known.size_bytes
        if purpose := self._table.of(model).purpose:
            yield "purpose", purpose
