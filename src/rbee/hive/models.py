"""The hive's models: found on disk, pulled from their sources, removed."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path

from rbee.contracts.models import ModelRef, parse_model_ref
from rbee.errors import ConflictError, DownloadFailedError, ModelInvalidError, ModelNotFoundError
from rbee.hive.catalog import MODEL_FILE, Catalog, LocalModel, Manifest, directory_name
from rbee.hive.gguf import read_header
from rbee.hive.sources import Progress, Source, ignore_progress
from rbee.hive.sources.hub import HubSource
from rbee.hive.sources.local import local_file_size, refuse_removal
from rbee.hive.sources.partial_file import PartialFile, finish_in_thread, translated_disk_errors
from rbee.hive.sources.wheel import WheelSource
from rbee.processes.locks import FileLock

OTHER_PULL_S = 24 * 3600.0
"""How long a pull waits for another one of the same model."""

_LOOK_S = 1.0


def default_sources() -> dict[str, Source]:
    """Return the sources, by the word a parsed reference has for them."""
    return {"known": WheelSource(), "hub": HubSource()}


class ModelStore:
    """The models of one directory, which several hives may share.

    Safe to call from many tasks and processes at once: of several pulls of one model one downloads, the others
    wait and find what it brought. A model is there whole and checked, or not there.
    """

    def __init__(self, directory: Path, sources: Mapping[str, Source] | None = None) -> None:
        self._catalog = Catalog(directory)
        self._sources = default_sources() if sources is None else dict(sources)

    def find(self, ref_text: str) -> LocalModel | None:
        """Return a model that is on disk, or None; a short look, nothing is downloaded.

        Raises:
            ModelNotFoundError: No source takes such a reference.
        """
        ref = parse_model_ref(ref_text)
        if ref.source != "file":
            return self._catalog.find(ref)
        try:
            return _in_place(ref)
        except (ModelNotFoundError, ModelInvalidError):
            return None

    def list(self) -> list[LocalModel]:
        """Return the models that were pulled, by reference. Files used in place are not among them."""
        return self._catalog.models()

    async def pull(self, ref_text: str, progress: Progress = ignore_progress) -> LocalModel:
        """Bring a model to this disk, if it is not there yet, and return it.

        Args:
            ref_text: `smollm2:135m`, `hf:org/repo[:QUANT]` or the path of a .gguf file.
            progress: Told the bytes that are done and, where known, of how many.

        Raises:
            ModelNotFoundError: No source knows it.
            InvalidRequestError: It fits several files, or one in parts.
            DownloadFailedError: It could not be fetched or kept, or has the wrong digest.
            ModelInvalidError: What was fetched, or the file at the path, cannot be a model.

        Cancellation: takes effect within some seconds; what was downloaded is removed.
        """
        ref = parse_model_ref(ref_text)
        if ref.source == "file":
            model = _in_place(ref)
            await finish_in_thread(read_header, model.path)
            return model
        return self._catalog.find(ref) or await self._pull_alone(ref, progress)

    async def remove(self, ref_text: str) -> None:
        """Remove a model's file. A worker that has it loaded keeps what it loaded.

        Raises:
            ModelNotFoundError: It is not here.
            ConflictError: It is being downloaded, or is a file used in place, which is never removed.
        """
        ref = parse_model_ref(ref_text)
        if ref.path is not None:
            raise refuse_removal(Path(ref.path))
        if not self._catalog.place(ref).exists():
            raise _not_here(ref)
        lock = self._lock(ref)
        if not lock.acquire():
            raise ConflictError(
                f"The model {ref.text} is being downloaded.",
                remedy="Cancel the download, or wait until it is done.",
            )
        try:
            with translated_disk_errors(self._catalog.directory):
                removed = await finish_in_thread(self._catalog.remove, ref)
        finally:
            lock.release()
        if not removed:
            raise _not_here(ref)

    async def clean(self) -> None:
        """Remove what killed downloads left; those that are under way are left alone."""
        for name in self._catalog.partial_names():
            lock = FileLock(self._catalog.lock_directory() / name)
            if lock.acquire():
                try:
                    await finish_in_thread(self._catalog.discard, name)
                finally:
                    lock.release()

    async def _pull_alone(self, ref: ModelRef, progress: Progress) -> LocalModel:
        with translated_disk_errors(self._catalog.directory):
            lock = self._lock(ref)
            await self._wait_for_turn(lock, ref, progress)
            try:
                return self._catalog.find(ref) or await self._download(ref, progress)
            finally:
                lock.release()

    async def _download(self, ref: ModelRef, progress: Progress) -> LocalModel:
        try:
            partial = await finish_in_thread(self._catalog.prepare, ref)
            return await self._fill(partial, ref, progress)
        finally:
            await finish_in_thread(self._catalog.discard, directory_name(ref))

    async def _fill(self, partial: Path, ref: ModelRef, progress: Progress) -> LocalModel:
        async with PartialFile(partial / MODEL_FILE, partial / "work", self._catalog.directory) as file:
            fetched = await self._sources[ref.source].fetch(ref, file, progress)
            digest = await file.finish()
        if fetched.sha256 is not None and digest != fetched.sha256.lower():
            raise DownloadFailedError(
                f"What was downloaded for {ref.text} is not what it should be, and was removed: its SHA-256 is "
                f"{digest} instead of {fetched.sha256.lower()}.",
                remedy="Try again; if it fails again, a proxy or mirror on the way gives out another file.",
            )
        await finish_in_thread(read_header, file.path)
        manifest = Manifest(
            ref=ref.text,
            sha256=digest,
            size_bytes=file.size_bytes,
            source=ref.source,
            origin=fetched.origin,
            pulled_at=datetime.now(UTC),
        )
        return await finish_in_thread(self._catalog.commit, ref, manifest)

    def _lock(self, ref: ModelRef) -> FileLock:
        directory = self._catalog.lock_directory()
        directory.mkdir(parents=True, exist_ok=True)
        return FileLock(directory / directory_name(ref))

    async def _wait_for_turn(self, lock: FileLock, ref: ModelRef, progress: Progress) -> None:
        """Wait until no other pull of this model is under way, and say meanwhile how far that one is."""
        deadline = asyncio.get_running_loop().time() + OTHER_PULL_S
        while not await lock.acquire_blocking(_LOOK_S):
            if asyncio.get_running_loop().time() > deadline:
                raise DownloadFailedError(f"Another download of {ref.text} has been under way for too long.")
            progress(self._catalog.partial_size_bytes(ref), None)


def _in_place(ref: ModelRef) -> LocalModel:
    path = Path(ref.path or "")
    return LocalModel(ref=ref.text, path=path, size_bytes=local_file_size(path), sha256=None)


def _not_here(ref: ModelRef) -> ModelNotFoundError:
    return ModelNotFoundError(
        f"The model {ref.text} is not on this hive.", remedy="rbee models list shows what is here.", param="model"
    )
