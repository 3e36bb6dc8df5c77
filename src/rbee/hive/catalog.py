"""The models directory on disk: one directory a model, its file and a manifest in it.

    smollm2--135m/model.gguf
    smollm2--135m/model.json          what it is; a directory without it does not count
    smollm2--135m/used                touched when a worker is started with it
    .partial/smollm2--135m/           a download under way, or what a cancelled or killed one left
    .partial/smollm2--135m/part.json  what it is a part of; a part without it is of no use
    .locks/smollm2--135m              held during a download or a removal

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

from rbee.contracts.heartbeats import ModelInfo, UnusableModel
from rbee.contracts.home import write_whole
from rbee.contracts.models import KNOWN_MODELS, ModelRef
from rbee.hive.gguf import ModelFacts
from rbee.hive.sources.part import PART_FILE, read_part

MODEL_FILE = "model.gguf"
MANIFEST_FILE = "model.json"
USED_FILE = "used"
MANIFEST_BYTES_MAX = 64 * 1024
NAME_LENGTH_MAX = 120


class Manifest(Struct, frozen=True, kw_only=True):
    """What is known of a model file, written once it is whole and checked.

    Attributes:
        facts: What its header says; None where it was written before headers were kept.
    """

    ref: str
    sha256: str
    size_bytes: int
    source: str
    origin: str
    pulled_at: datetime
    facts: ModelFacts | None = None


class LocalModel(Struct, frozen=True, kw_only=True):
    """A model file that can be loaded.

    Attributes:
        sha256: None for a file that was never downloaded.
        facts: What its header says; None where it was not read yet.
        used_at: When a worker was last started with it, or else when it came here; seconds since the epoch.
    """

    ref: str
    path: Path
    size_bytes: int
    sha256: str | None
    facts: ModelFacts | None = None
    used_at: float = 0.0

    def info(self) -> ModelInfo:
        """Return it as a heartbeat says it."""
        facts = msgspec.structs.asdict(self.facts) if self.facts is not None else {}
        return ModelInfo(
            model=self.ref, size_bytes=self.size_bytes, path=str(self.path), sha256=self.sha256, **facts
        )


class Kept(Struct, frozen=True, kw_only=True):
    """What a download left that did not end; `changed_at` in seconds since the epoch."""

    name: str
    path: Path
    ref: str | None
    size_bytes: int
    changed_at: float


class Catalog:
    """Knows where in the directory everything is; every call is one or a few short file operations."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory.absolute()

    def find(self, ref: ModelRef) -> LocalModel | None:
        """Return the model if its file is whole and is the one that is meant today; never changes anything."""
        model = self._read(self.place(ref))
        return model if isinstance(model, LocalModel) and model.ref == ref.text else None

    def models(self) -> list[LocalModel]:
        """Return every whole model, by reference."""
        return [entry for entry in self.entries() if isinstance(entry, LocalModel)]

    def entries(self) -> list[LocalModel | UnusableModel]:
        """Return every whole model, and what takes up room like a model and is none, by reference."""
        try:
            places = [entry for entry in self.directory.iterdir() if not entry.name.startswith(".")]
        except OSError:
            return []
        found = [entry for entry in map(self._read, places) if entry is not None]
        return sorted(found, key=lambda entry: entry.ref if isinstance(entry, LocalModel) else entry.model)

    def place(self, ref: ModelRef) -> Path:
        """Return the directory of a model, which need not exist."""
        return self.directory / directory_name(ref)

    def partial(self, ref: ModelRef) -> Path:
        """Return the directory a download of this model works in."""
        return self.directory / ".partial" / directory_name(ref)

    def kept(self) -> list[Kept]:
        """Return the downloads that are under way or did not end, by name."""
        try:
            names = sorted(os.listdir(self.directory / ".partial"))
        except OSError:
            return []
        return [self._kept(name) for name in names]

    def _kept(self, name: str) -> Kept:
        partial = self.directory / ".partial" / name
        part = read_part(partial / PART_FILE)
        stat = _stat(partial / MODEL_FILE) or _stat(partial)
        return Kept(
            name=name,
            path=partial,
            ref=part.ref if part else None,
            size_bytes=_size(partial / MODEL_FILE),
            changed_at=stat.st_mtime if stat else 0.0,
        )

    def partial_size_bytes(self, ref: ModelRef) -> int:
        """Return how much of a download of this model is on the disk."""
        return _size(self.partial(ref) / MODEL_FILE)

    def lock_directory(self) -> Path:
        """Return where the files are that are locked, named like the models' directories; never deleted."""
        return self.directory / ".locks"

    def prepare(self, ref: ModelRef) -> Path:
        """Make the directory for a download; what an earlier one left of the file stays. Hold the lock."""
        partial = self.partial(ref)
        if read_part(partial / PART_FILE) is None:
            self.discard(partial.name)
        shutil.rmtree(partial / "work", ignore_errors=True)
        for unfinished in partial.glob(f".{PART_FILE}.*"):  # a killed process was just writing it
            unfinished.unlink()
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
        (partial / PART_FILE).unlink(missing_ok=True)
        self._write_manifest(partial, manifest)
        _sync_directory(partial)
        if place.exists():  # not whole, or of an earlier version, or it would have been found
            shutil.rmtree(place)
        partial.rename(place)
        _sync_directory(self.directory)
        return _local(place, manifest)

    def keep_facts(self, model: LocalModel, facts: ModelFacts) -> None:
        """Write down what a model's header says, into a manifest that lacks it. Hold the lock."""
        manifest = _manifest(model.path.parent)
        if manifest is not None and manifest.sha256 == model.sha256:
            self._write_manifest(model.path.parent, msgspec.structs.replace(manifest, facts=facts))

    @staticmethod
    def _write_manifest(place: Path, manifest: Manifest) -> None:
        write_whole(place / MANIFEST_FILE, msgspec.json.format(msgspec.json.encode(manifest)) + b"\n")

    def touch(self, model: LocalModel) -> None:
        """Take note that a model is used now; a directory that cannot be written stays as it is."""
        if model.path.parent.parent == self.directory:
            try:
                (model.path.parent / USED_FILE).touch()
            except OSError:
                pass  # it only counts as used less lately

    def remove(self, ref: ModelRef) -> int:
        """Remove a model's directory, whole or not, and what a download left; return its bytes. Hold the lock."""
        place, partial = self.place(ref), self.partial(ref)
        freed = self.partial_size_bytes(ref) + _size(place / MODEL_FILE)
        self.discard(partial.name)
        if place.exists():
            partial.parent.mkdir(exist_ok=True)
            place.rename(partial)
            self.discard(partial.name)
        return freed

    def _read(self, place: Path) -> LocalModel | UnusableModel | None:
        """Return what a directory holds; None for one that has nothing to do with models."""
        path, manifest = place / MODEL_FILE, _manifest(place)
        stat = _stat(path)
        if manifest is None:
            fault = "its model.json is damaged or missing"
            return None if stat is None else unusable_model(place.name, path, stat.st_size, fault)
        size = stat.st_size if stat is not None else 0
        if size != manifest.size_bytes:
            fault = f"its file has {size:,} of {manifest.size_bytes:,} bytes"
            return unusable_model(manifest.ref, path, size, fault)
        known = KNOWN_MODELS.get(manifest.ref) if manifest.source == "known" else None
        if known is not None and known.sha256 != manifest.sha256:
            return unusable_model(manifest.ref, path, size, "it is not the version that is meant today")
        return _local(place, manifest)


def directory_name(ref: ModelRef) -> str:
    """Return a name for a model's directory that people can read, safe and different for every reference."""
    readable = re.sub(r"[^A-Za-z0-9._-]+", "--", ref.text)[:NAME_LENGTH_MAX]
    if ref.source == "known":
        return readable
    return f"{readable}-{sha256(ref.text.encode()).hexdigest()[:12]}"


def unusable_model(ref: str, path: Path, size_bytes: int, why: str) -> UnusableModel:
    """Tell of a file that cannot be loaded: why not, and what to do."""
    fault = f"{why.removesuffix('.')}; pull it again, or remove it"
    return UnusableModel(model=ref, size_bytes=size_bytes, path=str(path), fault=fault)


def _manifest(place: Path) -> Manifest | None:
    try:
        with (place / MANIFEST_FILE).open("rb") as file:
            return msgspec.json.decode(file.read(MANIFEST_BYTES_MAX), type=Manifest)
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError):
        return None


def _local(place: Path, manifest: Manifest) -> LocalModel:
    used = _stat(place / USED_FILE)
    return LocalModel(
        ref=manifest.ref,
        path=place / MODEL_FILE,
        size_bytes=manifest.size_bytes,
        sha256=manifest.sha256,
        facts=manifest.facts,
        used_at=used.st_mtime if used is not None else manifest.pulled_at.timestamp(),
    )


def _stat(path: Path) -> os.stat_result | None:
    try:
        return path.stat()
    except OSError:
        return None


def _size(path: Path) -> int:
    stat = _stat(path)
    return stat.st_size if stat is not None else 0


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
