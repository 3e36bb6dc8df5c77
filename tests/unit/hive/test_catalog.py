"""The models directory: names, manifests, and what counts as a model."""

from __future__ import annotations

import os
from datetime import UTC, datetime, timedelta
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rbee.contracts.heartbeats import UnusableModel
from rbee.contracts.models import KNOWN_MODELS, ModelRef, parse_model_ref
from rbee.hive.catalog import Catalog, Manifest, directory_name
from rbee.hive.gguf import facts_of, read_header
from rbee.testing.tiny_gguf import tiny_gguf

HUB = parse_model_ref("hf:org/repo:Q4_K_M")
KNOWN = parse_model_ref("smollm2:135m")
hub_names = st.from_regex(r"[A-Za-z0-9][\w.-]{0,60}", fullmatch=True).filter(lambda name: ".." not in name)


def committed(catalog: Catalog, ref: ModelRef, data: bytes = b"GGUF", digest: str = "00") -> Path:
    partial = catalog.prepare(ref)
    (partial / "model.gguf").write_bytes(data)
    manifest = Manifest(
        ref=ref.text,
        sha256=digest,
        size_bytes=len(data),
        source=ref.source,
        origin="test",
        pulled_at=datetime.now(UTC),
    )
    return catalog.commit(ref, manifest).path


def test_directory_of_a_known_model_can_be_read_by_people() -> None:
    assert directory_name(KNOWN) == "smollm2--135m"


@given(hub_names, hub_names, hub_names)
def test_directory_name_of_any_hub_model_is_one_safe_part(org: str, repo: str, quant: str) -> None:
    name = directory_name(parse_model_ref(f"hf:{org}/{repo}:{quant}"))
    assert len(name) <= 140
    assert "/" not in name
    assert name.startswith("hf--")


def test_directory_names_differ_where_readable_parts_do_not() -> None:
    assert directory_name(parse_model_ref("hf:a/b--c")) != directory_name(parse_model_ref("hf:a/b:c"))


def test_committed_model_is_found_and_listed(tmp_path: Path) -> None:
    catalog = Catalog(tmp_path)
    path = committed(catalog, HUB)
    found = catalog.find(HUB)
    assert found is not None
    assert (found.ref, found.path, found.size_bytes) == (HUB.text, path, 4)
    assert catalog.models() == [found]
    assert found.info().path == str(path)
    assert not catalog.partial(HUB).exists()


def faults(catalog: Catalog) -> list[tuple[str, str]]:
    return [(found.model, found.fault) for found in catalog.entries() if isinstance(found, UnusableModel)]


def test_file_without_manifest_is_no_model_and_its_fault_is_told(tmp_path: Path) -> None:
    catalog = Catalog(tmp_path)
    place = committed(catalog, HUB).parent
    (place / "model.json").unlink()
    assert catalog.find(HUB) is None
    assert catalog.models() == []
    assert faults(catalog) == [
        (place.name, "its model.json is damaged or missing; pull it again, or remove it"),
    ]


def test_directory_that_has_nothing_to_do_with_models_is_not_told_of(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    assert Catalog(tmp_path).entries() == []


def test_file_shorter_than_its_manifest_says_is_no_model(tmp_path: Path) -> None:
    catalog = Catalog(tmp_path)
    committed(catalog, HUB).write_bytes(b"GG")
    assert catalog.find(HUB) is None
    assert faults(catalog) == [(HUB.text, "its file has 2 of 4 bytes; pull it again, or remove it")]


def test_manifest_that_is_junk_is_no_model(tmp_path: Path) -> None:
    catalog = Catalog(tmp_path)
    committed(catalog, HUB).with_name("model.json").write_text("{")
    assert catalog.models() == []


def test_known_model_with_another_digest_is_not_the_one_of_today(tmp_path: Path) -> None:
    catalog = Catalog(tmp_path)
    committed(catalog, KNOWN)
    assert catalog.find(KNOWN) is None
    assert catalog.models() == []
    assert faults(catalog)[0][1].startswith("it is not the version that is meant today")
    committed(catalog, KNOWN, digest=KNOWN_MODELS["smollm2:135m"].sha256)
    assert catalog.find(KNOWN) is not None


def test_commit_replaces_what_does_not_count(tmp_path: Path) -> None:
    catalog = Catalog(tmp_path)
    committed(catalog, HUB, b"GGUF1").with_name("model.json").unlink()
    assert committed(catalog, HUB, b"GGUF2").read_bytes() == b"GGUF2"


def test_facts_are_added_to_an_older_manifest_and_nothing_else_changes(tmp_path: Path) -> None:
    catalog = Catalog(tmp_path)
    committed(catalog, HUB, tiny_gguf())
    before = catalog.find(HUB)
    assert before is not None
    assert before.facts is None
    facts = facts_of(read_header(before.path))
    catalog.keep_facts(before, facts)
    assert catalog.find(HUB) == msgspec.structs.replace(before, facts=facts)


def test_model_was_used_when_it_was_touched_last_or_else_when_it_came(tmp_path: Path) -> None:
    catalog = Catalog(tmp_path)
    committed(catalog, HUB)
    new = catalog.find(HUB)
    assert new is not None
    assert datetime.fromtimestamp(new.used_at, UTC) - datetime.now(UTC) < timedelta(seconds=60)
    catalog.touch(new)
    os.utime(new.path.with_name("used"), (5.0, 5.0))
    touched = catalog.find(HUB)
    assert touched is not None
    assert touched.used_at == 5.0


def test_relative_directory_stays_where_it_was_meant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert Catalog(Path("models")).directory == tmp_path / "models"


def test_remove_takes_the_directory_away(tmp_path: Path) -> None:
    catalog = Catalog(tmp_path)
    path = committed(catalog, HUB)
    assert catalog.remove(HUB) == 4
    assert not path.parent.exists()
    assert catalog.kept() == []
    assert catalog.remove(HUB) == 0


def test_directory_that_is_not_there_has_no_models(tmp_path: Path) -> None:
    assert Catalog(tmp_path / "none").models() == []
