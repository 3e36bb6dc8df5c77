"""Models named by a path: looked at, used in place, never removed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from rbee.errors import ConflictError, ModelInvalidError, ModelNotFoundError
from rbee.hive.models import ModelStore
from rbee.testing.tiny_gguf import tiny_gguf


async def test_pull_of_a_path_uses_the_file_where_it_is(tmp_path: Path) -> None:
    path = tmp_path / "mine.gguf"
    path.write_bytes(tiny_gguf())
    store = ModelStore(tmp_path / "models")
    model = await store.pull(str(path))
    assert (model.ref, model.path, model.size_bytes, model.sha256) == (
        str(path),
        path,
        len(tiny_gguf()),
        None,
    )
    assert store.find(str(path)) == model
    assert store.list() == [model]
    assert not (tmp_path / "models").exists()


async def test_remove_of_a_path_is_refused_and_leaves_the_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.gguf"
    path.write_bytes(tiny_gguf())
    with pytest.raises(ConflictError, match="does not belong to rbee"):
        await ModelStore(tmp_path / "models").remove(str(path))
    assert path.read_bytes() == tiny_gguf()


async def test_pull_of_a_missing_path_says_so(tmp_path: Path) -> None:
    store = ModelStore(tmp_path)
    with pytest.raises(ModelNotFoundError, match="is not there"):
        await store.pull(str(tmp_path / "none.gguf"))
    assert store.find(str(tmp_path / "none.gguf")) is None


async def test_pull_of_a_directory_says_so(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match="is a directory"):
        await ModelStore(tmp_path).pull(str(tmp_path))


async def test_pull_of_a_named_pipe_does_not_wait_for_a_writer(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.gguf")
    with pytest.raises(ModelNotFoundError, match="is no file"):
        await ModelStore(tmp_path).pull(str(tmp_path / "pipe.gguf"))


async def test_pull_of_another_kind_of_file_is_invalid(tmp_path: Path) -> None:
    path = tmp_path / "notes.gguf"
    path.write_text("to do")
    store = ModelStore(tmp_path)
    with pytest.raises(ModelInvalidError, match="does not begin with the letters GGUF"):
        await store.pull(str(path))
    assert store.find(str(path)) is None


async def test_pull_of_a_truncated_file_is_invalid(tmp_path: Path) -> None:
    path = tmp_path / "cut.gguf"
    path.write_bytes(tiny_gguf()[:-10])
    with pytest.raises(ModelInvalidError, match="is cut short"):
        await ModelStore(tmp_path).pull(str(path))


@pytest.mark.parametrize("ref", ["smollm", "", "relative/path.gguf", "hf:only-a-repo"])
async def test_reference_of_no_known_form_is_not_found(tmp_path: Path, ref: str) -> None:
    store = ModelStore(tmp_path)
    with pytest.raises(ModelNotFoundError):
        store.find(ref)
    with pytest.raises(ModelNotFoundError):
        await store.pull(ref)


async def test_remove_of_a_model_that_is_not_here_says_so(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match="is not on this hive"):
        await ModelStore(tmp_path).remove("smollm2:135m")
