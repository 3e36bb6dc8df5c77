"""The models directory: names, manifests, and what counts as a model."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from rbee.contracts.models import KNOWN_MODELS, ModelRef, parse_model_ref
from rbee.hive.catalog import Catalog, Manifest, directory_name

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


def test_file_without_manifest_is_no_model(tmp_path: Path) -> None:
    catalog = Catalog(tmp_path)
    committed(catalog, HUB).with_name("model.json").unlink()
    assert catalog.find(HUB) is None
    assert catalog.models() == []


def test_file_shorter_than_its_manifest_says_is_no_model(tmp_path: Path) -> None:
    catalog = Catalog(tmp_path)
    committed(catalog, HUB).write_bytes(b"GG")
    assert catalog.find(HUB) is None


def test_manifest_that_is_junk_is_no_model(tmp_path: Path) -> None:
    catalog = Catalog(tmp_path)
    committed(catalog, HUB).with_name("model.json").write_text("{")
    assert catalog.models() == []


def test_known_model_with_another_digest_is_not_the_one_of_today(tmp_path: Path) -> None:
    catalog = Catalog(tmp_path)
    committed(catalog, KNOWN)
    assert catalog.find(KNOWN) is None
    committed(catalog, KNOWN, digest=KNOWN_MODELS["smollm2:135m"].sha256)
    assert catalog.find(KNOWN) is not None


def test_commit_replaces_what_does_not_count(tmp_path: Path) -> None:
    catalog = Catalog(tmp_path)
    committed(catalog, HUB, b"GGUF1").with_name("model.json").unlink()
    assert committed(catalog, HUB, b"GGUF2").read_bytes() == b"GGUF2"


def test_remove_takes_the_directory_away(tmp_path: Path) -> None:
    catalog = Catalog(tmp_path)
    path = committed(catalog, HUB)
    assert catalog.remove(HUB) is True
    assert not path.parent.exists()
    assert catalog.partial_names() == []
    assert catalog.remove(HUB) is False


def test_directory_that_is_not_there_has_no_models(tmp_path: Path) -> None:
    assert Catalog(tmp_path / "none").models() == []
