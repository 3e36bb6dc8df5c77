"""The models directory on disk: one directory a model, its file and a manifest in it.

    smollm2--135m/model.gguf
    smollm2--135m/model.json     what it is; a directory without it does not count
    .partial/smollm2--135m/      a download under way, or what a killed one left
    .locks/smollm2--135m         held during a download or a removal

Several hives may share the directory. A model appears, and disappears, with one rename.
"""

from __future__ import annotations

import os
import re
import shutil
from datetime import datetime
from hashlib import sha256
from pathlib import Path

import msgspec
from msgspec import Struct

from rbee.contracts.heartbeats import ModelInfo
from rbee.contracts.home import write_whole
from rbee.contracts.models import KNOWN_MODELS, ModelRef

MODEL_FILE = "model.gguf"
MANIFEST_FILE = "model.json"
MANIFEST_BYTES_MAX = 64 * 1024
NAME_LENGTH_MAX = 120


class Manifest(Struct, frozen=True, kw_only=True):
    """What is known of a model file, written once it is whole and checked."""

    ref: str
    sha256: str
    size_bytes: int
    source: str
    origin: str
    pulled_at: datetime


class LocalModel(Struct, frozen=True, kw_only=True):
    """A model file that can be loaded; `sha256` is None for a file that was never downloaded."""

    ref: str
    path: Path
    size_bytes: int
    sha256: str | None

    def info(self) -> ModelInfo:
        """Return it as a heartbeat says it."""
        return ModelInfo(model=self.ref, size_bytes=self.size_bytes, path=str(self.path), sha256=self.sha256)


class Catalog:
    """Knows where in the directory everything is; every call is one or a few short file operations."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def find(self, ref: ModelRef) -> LocalModel | None:
        """Return the model if its file is whole and is the one that is meant today; never changes anything."""
        model = self._read(self.place(ref))
        if model is None or model.ref != ref.text:
            return None
        known = KNOWN_MODELS.get(ref.text) if ref.source == "known" else None
        return None if known and known.sha256 != model.sha256 else model

    def models(self) -> list[LocalModel]:
        """Return every whole model, by reference."""
        try:
            places = [entry for entry in self.directory.iterdir() if not entry.name.startswith(".")]
        except OSError:
            return []
        models = [model for model in map(self._read, places) if model is not None]
        return sorted(models, key=lambda model: model.ref)

    def place(self, ref: ModelRef) -> Path:
        """Return the directory of a model, which need not exist."""
        return self.directory / directory_name(ref)

    def partial(self, ref: ModelRef) -> Path:
        """Return the directory a download of this model works in."""
        return self.directory / ".partial" / directory_name(ref)

    def partial_names(self) -> list[str]:
        """Return the names of the downloads that are under way or were left by a killed process."""
        try:
            return sorted(os.listdir(self.directory / ".partial"))
        except OSError:
            return []

    def partial_size_bytes(self, ref: ModelRef) -> int:
        """Return how much of a download of this model is on the disk."""
        try:
            return (self.partial(ref) / MODEL_FILE).stat().st_size
        except OSError:
            return 0

    def lock_directory(self) -> Path:
        """Return where the files are that are locked, named like the models' directories; never deleted."""
        return self.directory / ".locks"

    def prepare(self, ref: ModelRef) -> Path:
        """Make an empty directory for a download, throwing away what a killed one left. Hold the lock."""
        partial = self.partial(ref)
        self.discard(partial.name)
        (partial / "work").mkdir(parents=True)
        return partial

    def discard(self, name: str) -> None:
        """Remove a download's directory, if it is there. Hold the lock."""
        partial = self.directory / ".partial" / name
        if partial.exists():
            shutil.rmtree(partial)

    def commit(self, ref: ModelRef, manifest: Manifest) -> LocalModel:
        """Make a finished download the model: all of it or nothing, also when power fails. Hold the lock."""
        partial, place = self.partial(ref), self.place(ref)
        shutil.rmtree(partial / "work")
        write_whole(partial / MANIFEST_FILE, msgspec.json.format(msgspec.json.encode(manifest)) + b"\n")
        _sync_directory(partial)
        if place.exists():  # not whole, or of an earlier version, or it would have been found
            shutil.rmtree(place)
        partial.rename(place)
        _sync_directory(self.directory)
        return _local(place, manifest)

    def remove(self, ref: ModelRef) -> bool:
        """Remove a model's directory, whole or not; False when there is none. Hold the lock."""
        place, partial = self.place(ref), self.partial(ref)
        if not place.exists():
            return False
        self.discard(partial.name)
        partial.parent.mkdir(exist_ok=True)
        place.rename(partial)
        self.discard(partial.name)
        return True

    def _read(self, place: Path) -> LocalModel | None:
        try:
            with (place / MANIFEST_FILE).open("rb") as file:
                manifest = msgspec.json.decode(file.read(MANIFEST_BYTES_MAX), type=Manifest)
            size = (place / MODEL_FILE).stat().st_size
        except (OSError, msgspec.MsgspecError):
            return None
        return _local(place, manifest) if size == manifest.size_bytes else None


def directory_name(ref: ModelRef) -> str:
    """Return a name for a model's directory that people can read, safe and different for every reference."""
    readable = re.sub(r"[^A-Za-z0-9._-]+", "--", ref.text)[:NAME_LENGTH_MAX]
    if ref.source == "known":
        return readable
    return f"{readable}-{sha256(ref.text.encode()).hexdigest()[:12]}"


def _local(place: Path, manifest: Manifest) -> LocalModel:
    return LocalModel(
        ref=manifest.ref,
        path=place / MODEL_FILE,
        size_bytes=manifest.size_bytes,
        sha256=manifest.sha256,
    )


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
