"""Which of a hub repository's files a reference means: decided from names alone."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from msgspec import Struct

from rbee.errors import InvalidRequestError, ModelNotFoundError

PREFERRED = ("Q4_K_M", "Q4_0", "Q4_1", "Q8_0")
NAMES_LISTED_MAX = 10

_PART = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$", re.IGNORECASE)


class HubFile(Struct, frozen=True, kw_only=True):
    """One file of a repository: its path in it, size in bytes and digest where the hub tells them."""

    name: str
    size_bytes: int | None = None
    sha256: str | None = None


def choose_file(repo: str, files: Sequence[HubFile], wanted: str | None) -> HubFile:
    """Choose the model file a reference means.

    Args:
        repo: The repository, for the sentences of errors.
        files: Everything in it.
        wanted: A file's name (`….gguf`), a quantization word (`Q4_K_M`, in any case), or None for the usual
            choice: Q4_K_M, then Q4_0, Q4_1, Q8_0, then the only one.

    Raises:
        ModelNotFoundError: Nothing fits; the message lists what there is.
        InvalidRequestError: Several files fit, or one that is split into parts.
    """
    models = [file for file in files if file.name.lower().endswith(".gguf")]
    if not models:
        raise ModelNotFoundError(
            f"The repository {repo} has no .gguf file.",
            remedy="Name a repository that has .gguf files.",
            param="model",
        )
    if wanted is not None and wanted.lower().endswith(".gguf"):
        fitting = _named(models, wanted)
    else:
        models = [file for file in models if not _base(file.name).startswith("mmproj")]
        fitting = _quantized(models, wanted) if wanted else _usual(models)
    if not fitting:
        raise ModelNotFoundError(
            f"The repository {repo} has no model file `{wanted or 'of the usual kinds'}`. {_listed(models)}",
            remedy=f"Name one of its files: hf:{repo}:FILE.",
            param="model",
        )
    return _only(repo, fitting)


def _only(repo: str, fitting: Sequence[HubFile]) -> HubFile:
    whole = [file for file in fitting if not _is_part(file.name)]
    if not whole:
        raise InvalidRequestError(
            f"{fitting[0].name} of {repo} is split into parts, which is not supported.",
            remedy="Name a quantization that comes as one file, or join the parts (llama-gguf-split --merge).",
            param="model",
        )
    if len(whole) > 1:
        raise InvalidRequestError(
            f"Several files of {repo} fit. {_listed(whole)}", remedy=f"Name one: hf:{repo}:FILE.", param="model"
        )
    return whole[0]


def _named(models: Iterable[HubFile], wanted: str) -> list[HubFile]:
    """Find a file by its path in the repository, or else by its last part."""
    models = list(models)
    exact = [file for file in models if file.name == wanted]
    return exact or [file for file in models if _base(file.name) == wanted.lower()]


def _quantized(models: Iterable[HubFile], word: str) -> list[HubFile]:
    """Find the files with a quantization word that stands by itself in their names: `Q4_K` is not in `Q4_K_M`."""
    standing = re.compile(rf"(?<![a-z0-9]){re.escape(word.lower())}(?![a-z0-9_])")
    return [file for file in models if standing.search(_base(file.name))]


def _usual(models: list[HubFile]) -> list[HubFile]:
    whole = [file for file in models if not _is_part(file.name)]
    for word in PREFERRED:
        fitting = _quantized(whole, word)
        if fitting:
            return fitting
    return whole or models


def _is_part(name: str) -> bool:
    part = _PART.search(name)
    return part is not None and int(part[2]) > 1


def _base(name: str) -> str:
    return name.rpartition("/")[2].lower()


def _listed(files: Sequence[HubFile]) -> str:
    names = ", ".join(file.name for file in files[:NAMES_LISTED_MAX])
    more = len(files) - NAMES_LISTED_MAX
    return f"It has {names}" + (f" and {more} more." if more > 0 else ".") if files else "It has none."
