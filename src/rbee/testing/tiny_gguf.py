"""Make very small GGUF files: whole to every reader of headers, with nothing to say."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence

ALIGNMENT = 32

GgufValue = int | float | bool | str | Sequence[int] | Sequence[str]

LLAMA: dict[str, GgufValue] = {
    "general.architecture": "llama",
    "general.name": "Tiny",
    "general.file_type": 7,
    "llama.block_count": 2,
    "llama.context_length": 2048,
    "llama.embedding_length": 64,
    "llama.attention.head_count": 4,
    "llama.attention.head_count_kv": 2,
    "tokenizer.ggml.tokens": ["<s>", "</s>", "bee"],
    "tokenizer.chat_template": "{{ messages }}",
}
"""The header of a model of two layers."""


def tiny_gguf(values: Mapping[str, GgufValue] | None = None, *, elements: int = 256, salt: bytes = b"") -> bytes:
    """Return the bytes of a file with one tensor of `elements` 32-bit numbers.

    Args:
        values: The header's values; LLAMA by default. Whole numbers become uint32.
        elements: How many numbers the tensor has.
        salt: The first bytes of the tensor's data, so that files of one size differ.
    """
    values = LLAMA if values is None else values
    head = b"GGUF" + struct.pack("<IQQ", 3, 1, len(values))
    head += b"".join(_text(key) + _value(value) for key, value in values.items())
    head += _text("token_embd.weight") + struct.pack("<IQIQ", 1, elements, 0, 0)
    head += bytes(-len(head) % ALIGNMENT)
    return head + salt + bytes(4 * elements - len(salt))


def _text(text: str) -> bytes:
    encoded = text.encode()
    return struct.pack("<Q", len(encoded)) + encoded


def _value(value: GgufValue) -> bytes:
    match value:
        case bool():
            return struct.pack("<I?", 7, value)
        case int():
            return struct.pack("<II", 4, value)
        case float():
            return struct.pack("<If", 6, value)
        case str():
            return struct.pack("<I", 8) + _text(value)
        case _:
            kind = 8 if value and isinstance(value[0], str) else 4
            packed = (_text(item) if isinstance(item, str) else struct.pack("<I", item) for item in value)
            return struct.pack("<IIQ", 9, kind, len(value)) + b"".join(packed)
