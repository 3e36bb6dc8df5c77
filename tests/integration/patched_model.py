"""Copies of a model with another chat template in the header."""

from __future__ import annotations

import struct
from pathlib import Path

_KEY = b"tokenizer.chat_template"


def with_template(model: Path, template: str, copy: Path) -> Path:
    """Write a copy whose template is another one, filled up with spaces to the length of the first."""
    data = model.read_bytes()
    at = data.index(_KEY) + len(_KEY) + 4  # the type stands before the value
    (length,) = struct.unpack("<Q", data[at : at + 8])
    text = template.encode().ljust(length)
    assert len(text) == length, f"the template may have {length} bytes"
    copy.write_bytes(data[: at + 8] + text + data[at + 8 + length :])
    return copy
