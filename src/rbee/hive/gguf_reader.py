"""Walk through a GGUF header with every step bounded by what the file can hold.

Nothing is allocated on the word of the file alone: counts are compared with the bytes that are left before they
are believed, long texts and lists are skipped, not read.
"""

from __future__ import annotations

import struct
from math import prod
from typing import BinaryIO, Final

from rbee.errors import ModelInvalidError
from rbee.hive.gguf_types import LIST, NUMBER_FORMATS, TENSOR_TYPES, TEXT, UINT32, UINT64

MAGIC: Final = b"GGUF"
VERSIONS: Final = (2, 3)
KEYS_MAX: Final = 65_536
TENSORS_MAX: Final = 100_000
ELEMENTS_MAX: Final = 4_000_000
NAME_BYTES_MAX: Final = 65_535
TEXT_BYTES_KEPT_MAX: Final = 1024
LIST_LENGTH_KEPT_MAX: Final = 4096
DIMENSIONS_MAX: Final = 8
NESTING_MAX: Final = 4
ALIGNMENT_MAX: Final = 1024 * 1024

_KEY_BYTES_MIN = 13
_TENSOR_BYTES_MIN = 24
_ELEMENT_BYTES_MIN = {TEXT: 8, LIST: 12}
_NUMBERS = {kind: struct.Struct(code) for kind, code in NUMBER_FORMATS.items()}

Value = int | float | str | list[int | float] | None
"""A header value: a number, a short text, a short list of numbers; None for what is too long to be kept."""


class GgufReader:
    """Reads one file's header from its first byte on; use each instance once.

    Attributes:
        version: The format's version, once `read` returned.
        values: The header's values by key; long ones are None.
        lengths: How many elements each list has, by key.
        tensor_count: Tensors in the file.
    """

    def __init__(self, file: BinaryIO, size_bytes: int, name: str) -> None:
        self.version = 0
        self.values: dict[str, Value] = {}
        self.lengths: dict[str, int] = {}
        self.tensor_count = 0
        self._file = file
        self._size = size_bytes
        self._name = name
        self._at = 0
        self._elements = 0

    def read(self) -> None:
        """Read the header and check that the file is long enough for its tensors.

        Raises:
            ModelInvalidError: What is wrong with the file.
        """
        if self._size < len(MAGIC) or self._take(len(MAGIC)) != MAGIC:
            raise self.invalid("is no GGUF file: it does not begin with the letters GGUF")
        self.version = self._version()
        self.tensor_count = self._count(self._whole(UINT64), TENSORS_MAX, _TENSOR_BYTES_MIN, "tensors")
        keys = self._count(self._whole(UINT64), KEYS_MAX, _KEY_BYTES_MIN, "keys")
        for _ in range(keys):
            key = self._name_text()
            self.values[key] = self._value(key, self._whole(UINT32))
        self._check_length()

    def invalid(self, what: str) -> ModelInvalidError:
        """Make the error that says what is wrong with this file."""
        return ModelInvalidError(f"The model file {self._name} {what}.")

    def _version(self) -> int:
        version = self._whole(UINT32)
        if version in VERSIONS:
            return version
        if version in {number << 24 for number in VERSIONS}:
            raise self.invalid("is in big-endian byte order, which is not supported")
        raise self.invalid(f"has GGUF version {version}; versions 2 and 3 are supported")

    def _value(self, key: str, kind: int) -> Value:
        if kind == LIST:
            return self._list(key, depth=0)
        if kind == TEXT:
            length = self._whole(UINT64)
            if length > TEXT_BYTES_KEPT_MAX:
                self._skip(length)
                return None
            return self._take(length).decode("utf-8", "replace")
        return self._number(kind)

    def _list(self, key: str, depth: int) -> Value:
        kind, count = self._whole(UINT32), self._whole(UINT64)
        number = _NUMBERS.get(kind)
        if number is None and kind not in _ELEMENT_BYTES_MIN:
            raise self.invalid(f"is damaged: there is no value type {kind}")
        self._count(count, self._size, number.size if number else _ELEMENT_BYTES_MIN[kind], "list elements")
        if depth == 0:
            self.lengths[key] = count
        if number is None:
            self._skip_elements(key, kind, count, depth)
        elif depth or count > LIST_LENGTH_KEPT_MAX:
            self._skip(count * number.size)
        else:
            return [self._number(kind) for _ in range(count)]
        return None

    def _skip_elements(self, key: str, kind: int, count: int, depth: int) -> None:
        self._elements += count
        if self._elements > ELEMENTS_MAX or depth >= NESTING_MAX:
            raise self.invalid("is damaged: its lists are too long or nested too deeply")
        for _ in range(count):
            if kind == TEXT:
                self._skip(self._whole(UINT64))
            else:
                self._list(key, depth + 1)

    def _check_length(self) -> None:
        alignment = self.values.get("general.alignment", 32)
        if not isinstance(alignment, int) or not 0 < alignment <= ALIGNMENT_MAX or alignment & (alignment - 1):
            raise self.invalid(f"is damaged: its alignment is {alignment!r}")
        end = max((self._tensor_end() for _ in range(self.tensor_count)), default=0)
        needed = -(-self._at // alignment) * alignment + end
        if end and needed > self._size:
            raise self.invalid(f"is cut short: it has {self._size:,} of {needed:,} bytes")

    def _tensor_end(self) -> int:
        """Read one tensor's description and return where its data ends, counted from where all data begins."""
        self._name_text()
        dimensions = self._whole(UINT32)
        if dimensions > DIMENSIONS_MAX:
            raise self.invalid(f"is damaged: a tensor has {dimensions} dimensions")
        elements = prod(self._whole(UINT64) for _ in range(dimensions))
        # A type that is not known yet is the engine's to refuse; its size counts as nothing.
        block, size = TENSOR_TYPES.get(self._whole(UINT32), (1, 0))
        return self._whole(UINT64) + -(-elements // block) * size

    def _count(self, count: int, limit: int, bytes_each: int, what: str) -> int:
        if count > limit or count * bytes_each > self._size - self._at:
            raise self.invalid(f"is damaged or cut short: it claims {count:,} {what}")
        return count

    def _name_text(self) -> str:
        length = self._whole(UINT64)
        if length > NAME_BYTES_MAX:
            raise self.invalid(f"is damaged: a name is {length:,} bytes long")
        return self._take(length).decode("utf-8", "replace")

    def _whole(self, kind: int) -> int:
        number: int = _NUMBERS[kind].unpack(self._take(_NUMBERS[kind].size))[0]
        return number

    def _number(self, kind: int) -> int | float:
        if kind not in _NUMBERS:
            raise self.invalid(f"is damaged: there is no value type {kind}")
        return self._whole(kind)

    def _take(self, length: int) -> bytes:
        self._at += length
        data = self._file.read(length) if self._at <= self._size else b""
        if len(data) != length:
            raise self.invalid(f"is cut short: its header goes on beyond its {self._size:,} bytes")
        return data

    def _skip(self, length: int) -> None:
        self._at += length
        if self._at > self._size:
            raise self.invalid(f"is cut short: its header goes on beyond its {self._size:,} bytes")
        self._file.seek(length, 1)
