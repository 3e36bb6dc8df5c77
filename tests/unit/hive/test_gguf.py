"""Model files' headers: read where they are whole, refused with a true sentence where they are not."""

from __future__ import annotations

import struct
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rbee.errors import ModelInvalidError
from rbee.hive.gguf import GgufHeader, ModelFacts, facts_of, memory_of, purpose_of, read_header
from rbee.testing.tiny_gguf import LLAMA, tiny_gguf

WHOLE = tiny_gguf()
HEADER_BYTES = len(WHOLE) - 4 * 256


def read(directory: Path, data: bytes) -> GgufHeader:
    path = directory / "some.gguf"
    path.write_bytes(data)
    return read_header(path)


def refusal(directory: Path, data: bytes) -> str:
    with pytest.raises(ModelInvalidError) as refused:
        read(directory, data)
    return refused.value.message


def test_header_of_whole_file_says_what_the_model_is(tmp_path: Path) -> None:
    header = read(tmp_path, WHOLE)
    assert header == GgufHeader(
        version=3,
        architecture="llama",
        name="Tiny",
        file_type="Q8_0",
        context_length=2048,
        block_count=2,
        embedding_length=64,
        head_count=4,
        kv_heads=(2, 2),
        key_length=16,
        value_length=16,
        vocabulary_size=3,
        has_chat_template=True,
        pooling_type=None,
        tensor_count=1,
        file_size_bytes=len(WHOLE),
    )


def test_header_with_heads_by_layer_keeps_each(tmp_path: Path) -> None:
    by_layer = {"llama.attention.head_count": [4, 8], "llama.attention.head_count_kv": [0, 8]}
    header = read(tmp_path, tiny_gguf(LLAMA | by_layer))
    assert (header.kv_heads, header.head_count, header.key_length) == ((0, 8), 8, 8)


def test_header_with_own_head_lengths_uses_them(tmp_path: Path) -> None:
    lengths = {"llama.attention.key_length": 128, "llama.attention.value_length": 96}
    header = read(tmp_path, tiny_gguf(LLAMA | lengths))
    assert (header.key_length, header.value_length) == (128, 96)


def test_header_without_kv_heads_takes_all_heads(tmp_path: Path) -> None:
    values = {key: value for key, value in LLAMA.items() if not key.endswith("head_count_kv")}
    assert read(tmp_path, tiny_gguf(values)).kv_heads == (4, 4)


def test_header_of_unknown_file_type_names_its_number(tmp_path: Path) -> None:
    assert read(tmp_path, tiny_gguf(LLAMA | {"general.file_type": 999})).file_type == "type 999"


def test_template_that_is_long_is_seen_and_not_kept(tmp_path: Path) -> None:
    header = read(tmp_path, tiny_gguf(LLAMA | {"tokenizer.chat_template": "x" * 100_000}))
    assert header.has_chat_template is True


def test_memory_estimate_is_the_documented_sum(tmp_path: Path) -> None:
    header = read(tmp_path, WHOLE)
    cache = 2 * 1000 * 3 * (2 + 2) * (16 + 16)
    work = 4 * 512 * (3 + 16 * 64)
    assert memory_of(header).needed_bytes(context_tokens=1000, slots=3) == (
        len(WHOLE) + cache + work + 128 * 1024 * 1024
    )


def test_embedding_takes_a_batch_as_long_as_the_context(tmp_path: Path) -> None:
    memory = memory_of(read(tmp_path, WHOLE))
    work = 4 * 512 * (3 + 16 * 64)

    more = memory.needed_bytes(2048, 1, "embed") - memory.needed_bytes(2048, 1)

    assert more == 2 * (2048 // 512) * work - work
    assert memory.needed_bytes(2048, 1, "rerank") == memory.needed_bytes(2048, 1, "embed")


def test_model_that_only_embeds_makes_no_numbers_for_the_tokens_it_knows(tmp_path: Path) -> None:
    values = {key.replace("llama.", "bert."): value for key, value in LLAMA.items()}
    header = read(tmp_path, tiny_gguf(values | {"general.architecture": "bert"}))
    assert memory_of(header).work_bytes == 4 * 512 * 16 * 64 + 128 * 1024 * 1024


def test_empty_file_is_no_gguf(tmp_path: Path) -> None:
    assert "does not begin with the letters GGUF" in refusal(tmp_path, b"")


def test_web_page_is_no_gguf(tmp_path: Path) -> None:
    assert "does not begin with the letters GGUF" in refusal(tmp_path, b"<!doctype html><html></html>")


def test_missing_file_is_refused_by_its_path(tmp_path: Path) -> None:
    with pytest.raises(ModelInvalidError, match="No such file"):
        read_header(tmp_path / "none.gguf")


@pytest.mark.parametrize("version", [0, 1, 4, 2**32 - 1])
def test_other_versions_are_refused_by_number(tmp_path: Path, version: int) -> None:
    data = WHOLE[:4] + struct.pack("<I", version) + WHOLE[8:]
    assert f"GGUF version {version};" in refusal(tmp_path, data)


def test_big_endian_file_is_refused_as_such(tmp_path: Path) -> None:
    assert "big-endian" in refusal(tmp_path, WHOLE[:4] + struct.pack(">I", 3) + WHOLE[8:])


def test_truncated_data_is_recognised_with_both_numbers(tmp_path: Path) -> None:
    message = refusal(tmp_path, WHOLE[:-1])
    assert f"is cut short: it has {len(WHOLE) - 1:,} of {len(WHOLE):,} bytes" in message


def test_header_truncated_anywhere_is_refused(tmp_path: Path) -> None:
    for length in range(HEADER_BYTES):
        with pytest.raises(ModelInvalidError):
            read(tmp_path, WHOLE[:length])


@pytest.mark.parametrize(("offset", "what"), [(8, "tensors"), (16, "keys")], ids=["tensor count", "key count"])
@pytest.mark.parametrize("count", [2**64 - 1, 2**40, 200_000, 5000])
def test_absurd_count_is_refused_before_anything_is_allocated(
    tmp_path: Path, offset: int, what: str, count: int
) -> None:
    data = WHOLE[:offset] + struct.pack("<Q", count) + WHOLE[offset + 8 :]
    assert refusal(tmp_path, data).endswith(f"it claims {count:,} {what}.")


def test_absurd_list_is_refused(tmp_path: Path) -> None:
    at = WHOLE.index(b"tokenizer.ggml.tokens") + len(b"tokenizer.ggml.tokens") + 8
    data = WHOLE[:at] + struct.pack("<Q", 2**50) + WHOLE[at + 8 :]
    assert "list elements" in refusal(tmp_path, data)


def test_lists_within_lists_end_somewhere(tmp_path: Path) -> None:
    nested = struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 1000
    head = b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 1) + b"k" + nested
    assert "nested too deeply" in refusal(tmp_path, head)


@pytest.mark.parametrize("alignment", [0, 3, 2**31])
def test_impossible_alignment_is_refused(tmp_path: Path, alignment: int) -> None:
    data = tiny_gguf(LLAMA | {"general.alignment": alignment})
    assert f"its alignment is {alignment}" in refusal(tmp_path, data)


def test_absurd_number_of_layers_is_refused(tmp_path: Path) -> None:
    data = tiny_gguf(LLAMA | {"llama.block_count": 2**32 - 1})
    assert "it claims 4,294,967,295 layers" in refusal(tmp_path, data)


def test_number_given_as_text_is_refused(tmp_path: Path) -> None:
    data = tiny_gguf(LLAMA | {"llama.context_length": "long"})
    assert "its context_length is 'long'" in refusal(tmp_path, data)


def test_file_without_architecture_is_refused(tmp_path: Path) -> None:
    assert "which architecture" in refusal(tmp_path, tiny_gguf({"general.name": "Tiny"}))


@settings(max_examples=400, deadline=None)
@given(st.lists(st.tuples(st.integers(0, HEADER_BYTES - 1), st.integers(0, 255)), min_size=1, max_size=12))
def test_damaged_header_is_read_or_refused_and_never_costs_memory(
    tmp_path_factory: pytest.TempPathFactory, changes: list[tuple[int, int]]
) -> None:
    """Whatever bytes a header is made of, the end is a header or a ModelInvalidError, in small memory."""
    data = bytearray(WHOLE)
    for at, value in changes:
        data[at] = value
    path = tmp_path_factory.getbasetemp() / "damaged.gguf"
    path.write_bytes(data)
    tracemalloc.start()
    try:
        header = read_header(path)
        assert header.file_size_bytes == len(WHOLE)
    except ModelInvalidError as refused:
        assert "damaged.gguf" in refused.message
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 4 * 1024 * 1024


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=600))
def test_any_bytes_behind_the_magic_are_refused(tmp_path_factory: pytest.TempPathFactory, junk: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "junk.gguf"
    path.write_bytes(b"GGUF\x03\0\0\0" + junk)
    with pytest.raises(ModelInvalidError):
        read_header(path)


@pytest.mark.parametrize(
    ("values", "purpose"),
    [
        ({}, "generate"),
        ({"llama.pooling_type": 0}, "generate"),
        ({"llama.pooling_type": 3}, "embed"),
        ({"llama.pooling_type": 4}, "rerank"),
        ({"general.architecture": "nomic-bert"}, "embed"),
        ({"general.architecture": "bert", "bert.pooling_type": 4}, "rerank"),
    ],
)
def test_purpose_is_read_from_the_header(tmp_path: Path, values: dict[str, int | str], purpose: str) -> None:
    """A model that ranks is a reranker, whatever it is built like; one that pools, or is a BERT, embeds."""
    assert purpose_of(read(tmp_path, tiny_gguf(LLAMA | values))) == purpose


def test_facts_are_what_a_heartbeat_tells(tmp_path: Path) -> None:
    header = read(tmp_path, WHOLE)
    assert facts_of(header) == ModelFacts(
        architecture="llama",
        quantization="Q8_0",
        context_tokens=2048,
        has_chat_template=True,
        purpose="generate",
        memory=memory_of(header),
    )
