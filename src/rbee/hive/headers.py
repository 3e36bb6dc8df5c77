"""What the headers of model files say, each read once while the hive runs."""

from __future__ import annotations

from pathlib import Path

import msgspec
from msgspec import Struct

from rbee.errors import ModelInvalidError
from rbee.hive.catalog import LocalModel
from rbee.hive.gguf import ModelFacts, facts_of, read_header

KNOWN_MAX = 4096


class _Read(Struct, frozen=True):
    """What was found in a file that was like this then."""

    size_bytes: int
    changed_ns: int
    facts: ModelFacts | None
    fault: str | None


class Headers:
    """Remembers, by path, what was read; a file that has changed since is not known. Safe to use from threads."""

    def __init__(self) -> None:
        self._known: dict[Path, _Read] = {}

    def known(self, model: LocalModel) -> LocalModel:
        """Return a model with its facts, where they are known."""
        read = self._read_of(model) if model.facts is None else None
        return model if read is None else msgspec.structs.replace(model, facts=read.facts)

    def fault(self, model: LocalModel) -> str | None:
        """Return what was found to be wrong with a model's file."""
        read = self._read_of(model) if model.facts is None else None
        return None if read is None else read.fault

    def read(self, model: LocalModel) -> LocalModel:
        """Read a file's header; blocks for some tenths of a second on a large vocabulary.

        Raises:
            ModelInvalidError: What is wrong with the file; it is remembered.
        """
        try:
            facts = facts_of(read_header(model.path))
        except ModelInvalidError as error:
            self._keep(model, None, error.message)
            raise
        self._keep(model, facts, None)
        return msgspec.structs.replace(model, facts=facts)

    def _keep(self, model: LocalModel, facts: ModelFacts | None, fault: str | None) -> None:
        changed_ns = _changed_ns(model.path)
        if changed_ns is not None:
            if len(self._known) >= KNOWN_MAX:
                self._known.clear()
            self._known[model.path] = _Read(model.size_bytes, changed_ns, facts, fault)

    def _read_of(self, model: LocalModel) -> _Read | None:
        read = self._known.get(model.path)
        if read is None or (read.size_bytes, read.changed_ns) != (model.size_bytes, _changed_ns(model.path)):
            return None
        return read


def _changed_ns(path: Path) -> int | None:
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return None
