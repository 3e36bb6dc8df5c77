"""What crosses a process boundary stands in the reference, by its name."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from msgspec import Struct

from rbee.contracts.heartbeats import Heartbeat, WorkerInfo
from rbee.contracts.operations import API_CALLS, SUBMITTABLE, ApiCall, Operation, operation_name

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "docs" / "reference" / name for name in ("wire.md", "api.md")]
REFERENCE = "\n".join(page.read_text("utf-8") for page in PAGES)
WORD = re.compile(r'"((?:queen|hive|worker)_[a-z_]+)"')
NO_ACTIONS = {"queen_url", "hive_id", "worker_id", "worker_token"}


def names(text: str) -> set[str]:
    """Return all words of some text."""
    return set(re.findall(r"[a-z][a-z0-9_]*", text))


def test_every_action_word_is_named() -> None:
    """Whoever reads a log can look up what stands in it."""
    sources = [path for part in ("queen", "hive", "worker") for path in (ROOT / "src/rbee" / part).rglob("*.py")]
    said = {word for path in sources for word in WORD.findall(path.read_text("utf-8"))}
    assert "queen_evict" in said
    assert said - NO_ACTIONS - names(REFERENCE) == set()


@pytest.mark.parametrize("operation", SUBMITTABLE, ids=operation_name)
def test_every_field_of_an_operation_is_named(operation: type[Operation]) -> None:
    """With what every operation takes."""
    fields = set(operation.__struct_fields__) - (
        {"worker_id"} if "engine" in operation.__struct_fields__ else set()
    )
    assert fields - names(REFERENCE) == set()


@pytest.mark.parametrize("call", API_CALLS, ids=operation_name)
def test_every_route_of_the_api_is_named(call: type[ApiCall]) -> None:
    """With the word by which its jobs are listed."""
    assert f"`POST {call.path}`" in re.sub(r" \(`query`.*?\)", "", REFERENCE)
    assert operation_name(call) in names(REFERENCE)


@pytest.mark.parametrize("body", [Heartbeat, WorkerInfo])
def test_every_field_of_a_heartbeat_is_named(body: type[Struct]) -> None:
    """What a hive tells of itself."""
    assert set(body.__struct_fields__) - names(REFERENCE) == set()


@pytest.mark.parametrize(
    "header", ["x-rbee-keep", "x-rbee-narrate", "x-api-key", "x-request-id", "x-should-retry", "x-correlation-id"]
)
def test_every_header_of_ours_is_named(header: str) -> None:
    """As callers send or read it."""
    assert f"`{header}" in REFERENCE
