"""What is said of a model that cannot be loaded."""

from __future__ import annotations

from pathlib import Path

import pytest

from rbee.errors import ModelInvalidError
from rbee.worker.engines.llama_cpp import check_model_file, names_pooling, why_not_loaded


def test_missing_file_is_named(tmp_path: Path) -> None:
    """The sentence names the path."""
    with pytest.raises(ModelInvalidError, match=r"There is no model file at .*nowhere\.gguf"):
        check_model_file(tmp_path / "nowhere.gguf")


def test_directory_is_no_model(tmp_path: Path) -> None:
    """A path that is there need not be a file."""
    with pytest.raises(ModelInvalidError, match="cannot be read: Is a directory"):
        check_model_file(tmp_path)


@pytest.mark.parametrize("content", [b"", b"GGU", b"junk and more"])
def test_file_of_another_kind_is_refused(tmp_path: Path, content: bytes) -> None:
    """The first four bytes tell."""
    path = tmp_path / "m.gguf"
    path.write_bytes(content)
    with pytest.raises(ModelInvalidError, match="is not a GGUF model file"):
        check_model_file(path)


def test_file_with_the_magic_passes(tmp_path: Path) -> None:
    """The rest is the engine's to judge."""
    path = tmp_path / "m.gguf"
    path.write_bytes(b"GGUF and more")
    check_model_file(path)


def test_pooling_is_found_in_the_header(tmp_path: Path) -> None:
    """An embedding model names its own pooling."""
    path = tmp_path / "m.gguf"
    path.write_bytes(b"GGUF....bert.pooling_type....")
    assert names_pooling(path)
    path.write_bytes(b"GGUF....llama.block_count....")
    assert not names_pooling(path)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (
            "1.02.7 E llama_init_from_model: failed to initialize the context: std::bad_alloc\n",
            "The model cannot be loaded: the memory does not suffice for it and its context.",
        ),
        (
            "0.00.1 E gguf_init_from_reader: failed to read key-value pairs\n0.00.2 E later\n",
            "The model cannot be loaded: the file is damaged or not one for this engine "
            "(gguf_init_from_reader: failed to read key-value pairs).",
        ),
        (
            "0.1 E llama_model_load: error loading model: mmap failed: Cannot allocate memory\n",
            "The model cannot be loaded: the memory does not suffice for it and its context.",
        ),
        (
            "0.1 E common_chat_templates_init: error: parser: Parser Error: Expected }} (Got )\n0.2 E later\n",
            "The model cannot be loaded: the chat template in its file cannot be used "
            "(parser: Parser Error: Expected }} (Got )).",
        ),
        (
            "0.1 E srv  init: chat template parsing error: Unable to generate parser for this template. \n---\n"
            "While executing CallExpression\nError: Jinja Exception: no tea here\n0.2 E srv  init: advice\n",
            "The model cannot be loaded: the chat template in its file cannot be used "
            "(Jinja Exception: no tea here).",
        ),
        ("", "The model cannot be loaded; the engine's own words stand on the worker's stderr."),
    ],
)
def test_engine_words_become_one_sentence(words: str, expected: str) -> None:
    """The first complaint is the cause; what follows are its consequences."""
    assert why_not_loaded(words) == expected
