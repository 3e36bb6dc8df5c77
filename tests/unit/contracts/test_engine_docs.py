"""The engines that documentation describes are ones that can be read."""

from __future__ import annotations

import re
from pathlib import Path

import msgspec

from rbee.contracts.engine_settings import PLACEHOLDERS, EngineSettings, load_engine_table

ROOT = Path(__file__).parents[3]
HOW_TO = ROOT / "docs" / "how-to" / "run-another-engine.md"
EXAMPLE = ROOT / "examples" / "rbee.example.toml"


def test_engines_of_the_how_to_can_be_read(tmp_path: Path) -> None:
    """Both, with what the text says of them."""
    blocks = re.findall(r"```toml\n(.*?)```", HOW_TO.read_text("utf-8"), re.DOTALL)
    path = tmp_path / "rbee.toml"
    path.write_text("\n".join(blocks), "utf-8")
    table = load_engine_table(path)
    assert table.names() == ("llama_cpp", "llama-server", "vllm")
    assert table.fetching() == ("vllm",)


def test_how_to_explains_every_key_and_placeholder_with_its_default() -> None:
    """None is missing, none is invented."""
    text = HOW_TO.read_text("utf-8")
    keys, placeholders = (part.split("\n\n")[0] for part in re.split(r"\| (?:key|placeholder) \|", text)[1:])
    named = [name for cell in re.findall(r"(?m)^\| (`.*?) \|", keys) for name in re.findall(r"`(\w+)`", cell)]
    assert sorted(named) == sorted(EngineSettings.__struct_fields__)
    found = [
        word for cell in re.findall(r"(?m)^\| (`.*?) \|", placeholders) for word in re.findall(r"\{(\w+)\}", cell)
    ]
    assert sorted(found) == sorted(PLACEHOLDERS)
    defaults = {field.name: field.default for field in msgspec.structs.fields(EngineSettings)}
    assert f"({defaults['ready_timeout_s']:g})" in text
    assert f"(`{defaults['ready']}`)" in text


def test_engine_of_the_example_can_be_read(tmp_path: Path) -> None:
    """Once its comment signs are taken away."""
    shown = re.findall(r"(?m)^#   (.*)$", EXAMPLE.read_text("utf-8"))
    path = tmp_path / "rbee.toml"
    path.write_text("\n".join(shown), "utf-8")
    assert load_engine_table(path).names() == ("llama_cpp", "llama-server")
