"""What a store tells of its models: facts read once, also of older manifests, and faults shown."""

from __future__ import annotations

import os
from datetime import UTC, datetime
from pathlib import Path

import pytest

from rbee.contracts.models import parse_model_ref
from rbee.errors import ModelInvalidError
from rbee.hive.catalog import Catalog, Manifest
from rbee.hive.models import ModelStore
from rbee.testing.tiny_gguf import tiny_gguf

REF = "hf:org/repo:Q8_0"


def older_model(directory: Path, data: bytes | None = None) -> Path:
    """Put a model there whose manifest says nothing of its header."""
    data = tiny_gguf() if data is None else data
    catalog, ref = Catalog(directory), parse_model_ref(REF)
    (catalog.prepare(ref) / "model.gguf").write_bytes(data)
    manifest = Manifest(
        ref=REF, sha256="00", size_bytes=len(data), source="hub", origin="x", pulled_at=datetime.now(UTC)
    )
    return catalog.commit(ref, manifest).path


async def test_facts_of_an_older_manifest_are_read_once_and_written_down(tmp_path: Path) -> None:
    older_model(tmp_path)
    store = ModelStore(tmp_path, {})
    [model] = store.unread()
    read = await store.facts(model)
    assert read.facts is not None
    assert read.facts.quantization == "Q8_0"
    assert store.unread() == []
    assert [found.facts for found in ModelStore(tmp_path, {}).list()] == [read.facts]


async def test_facts_are_known_where_they_cannot_be_written_down(tmp_path: Path) -> None:
    path = older_model(tmp_path)
    (path.with_name("model.json")).chmod(0o400)
    store = ModelStore(tmp_path, {})
    (tmp_path / ".locks").write_text("no directory")  # so that no lock can be had
    await store.facts(store.unread()[0])
    assert store.unread() == []
    assert [info.quantization for info in (model.info() for model in store.list())] == ["Q8_0"]


async def test_file_with_a_bad_header_is_told_with_its_fault_and_is_no_model(tmp_path: Path) -> None:
    path = older_model(tmp_path, b"GGUF" + bytes(400))
    store = ModelStore(tmp_path, {})
    with pytest.raises(ModelInvalidError):
        await store.facts(store.unread()[0])
    assert (store.list(), store.unread(), store.find(REF)) == ([], [], None)
    [fault] = store.unusable()
    assert (fault.model, fault.path) == (REF, str(path))
    assert "has GGUF version 0" in fault.fault


async def test_file_that_was_mended_is_a_model_again(tmp_path: Path) -> None:
    data = tiny_gguf()
    path = older_model(tmp_path, b"GGUF" + bytes(len(data) - 4))
    store = ModelStore(tmp_path, {})
    with pytest.raises(ModelInvalidError):
        await store.facts(store.unread()[0])
    path.write_bytes(data)
    os.utime(path, (1.0, 1.0))
    assert store.unusable() == []
    assert [model.ref for model in store.unread()] == [REF]


async def test_file_in_place_is_listed_once_it_is_used_and_as_long_as_it_is_there(tmp_path: Path) -> None:
    path = tmp_path / "mine.gguf"
    path.write_bytes(tiny_gguf())
    store = ModelStore(tmp_path / "models", {})
    model = store.find(str(path))
    assert model is not None
    assert store.list() == []
    store.note_use(model)
    assert [found.ref for found in store.list()] == [str(path)]
    path.unlink()
    assert store.list() == []


async def test_directory_that_cannot_be_written_is_cleaned_another_time(tmp_path: Path) -> None:
    """A hive starts all the same."""
    (tmp_path / ".partial" / "old").mkdir(parents=True)
    (tmp_path / ".locks").write_text("no directory")

    await ModelStore(tmp_path, {}).clean()

    assert (tmp_path / ".partial" / "old").exists()
