"""What rbee.toml may say about engines, and what it is told when it says something else."""

from __future__ import annotations

from pathlib import Path

import pytest

from rbee.contracts.engine_settings import EngineTable, fill, load_engine_table
from rbee.errors import ConfigurationError, InvalidRequestError

VLLM = """
[engines.vllm]
command = ["vllm", "serve", "{model}", "--port", "{port}", "--override", '{"a": {"b": 1}}', "{{messages}}"]
ready_timeout_s = 900
env = { HF_HOME = "/data/hf" }
api_key_env = "VLLM_API_KEY"
purposes = ["generate", "embed"]
needs_file = false
prefill = true

[engines.server]
command = ["llama-server", "--host", "{socket}"]
"""


def load(tmp_path: Path, text: str) -> EngineTable:
    """Read a configuration."""
    path = tmp_path / "rbee.toml"
    path.write_text(text, "utf-8")
    return load_engine_table(path)


def test_engines_are_read_with_their_defaults(tmp_path: Path) -> None:
    """What is not said has its default; braces that are no placeholder are text."""
    table = load(tmp_path, VLLM)
    vllm, server = table.find("vllm"), table.find("server")
    assert vllm is not None
    assert server is not None
    assert vllm.placeholders() == {"model", "port"}
    assert (vllm.listens_on_socket(), server.listens_on_socket()) == (False, True)
    assert (server.ready, server.ready_timeout_s, server.purposes) == ("/health", 600.0, ("generate",))
    assert (server.needs_file, server.prefill, server.model_name) == (True, False, "{model_name}")
    assert table.names() == ("llama_cpp", "vllm", "server")
    assert table.fetching() == ("vllm",)


def test_missing_file_describes_no_engine(tmp_path: Path) -> None:
    """The built-in one is there all the same."""
    table = load_engine_table(tmp_path / "rbee.toml")
    assert table.names() == ("llama_cpp",)
    assert table.find("llama_cpp") is None


def test_unknown_engine_is_named_with_the_nearest(tmp_path: Path) -> None:
    """And with those there are."""
    with pytest.raises(
        InvalidRequestError, match=r"no engine `vlm` \(did you mean `vllm`\?\)\. There are: llama_cpp"
    ):
        load(tmp_path, VLLM).find("vlm")


def test_placeholders_are_filled_and_nothing_else() -> None:
    """One without a value, JSON and doubled braces stay as they stand."""
    values = {"port": "80", "model": "/m/{port}.gguf"}
    assert fill("--x={port}:{model}", values) == "--x=80:/m/{port}.gguf"
    assert fill('{"port": 1} {{port}} {socket}', values) == '{"port": 1} {{port}} {socket}'


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("[engines]\nvllm = 1", r"`engines.vllm` in .* must be a table"),
        (
            '[engines.v]\ncomand = ["a"]',
            r"Unknown key `comand` in \[engines.v\] of .* \(did you mean `command`\?\)",
        ),
        ("[engines.v]\ncommand = []", r"says of an engine what cannot be used: .*\$.engines\[...\].command"),
        ('[engines.v]\ncommand = "vllm {port}"', r"Expected `array`, got `str`"),
        ("[engines.v]\nready = '/health'", r"missing required field `command`"),
        ('[engines.v]\ncommand = ["a", "{prt}", "{port}"]', r"placeholder \{prt\} in the command .*mean `port`"),
        ('[engines.v]\ncommand = ["a"]', r"One of \{port\} and \{socket\} must stand in the command"),
        ('[engines.v]\ncommand = ["a", "{port}", "{socket}"]', r"One of \{port\} and \{socket\}"),
        ('[engines.v]\ncommand = ["{port}"]\nready = "health"', r"\.ready"),
        ('[engines.v]\ncommand = ["{port}"]\nready_timeout_s = 0', r"ready_timeout_s"),
        ('[engines.v]\ncommand = ["{port}"]\npurposes = ["chat"]', r"Invalid enum value 'chat'"),
        ('[engines.v]\ncommand = ["{port}"]\npurposes = []', r"purposes"),
        ('[engines.v]\ncommand = ["{port}"]\nenv = { "A B" = "1" }', r"env"),
        ('[engines.v]\ncommand = ["{port}"]\nmodel_name = "{port}"', r"placeholder \{port\} in `model_name`"),
        ('[engines.llama_cpp]\ncommand = ["{port}"]', r"`llama_cpp` in .* is the engine that is built in"),
        ('[engines."A b"]\ncommand = ["{port}"]', r"`A b` in .* is no engine's name"),
        ("[engines.v", r"cannot be read"),
    ],
)
def test_what_does_not_fit_is_named_with_its_place(tmp_path: Path, text: str, complaint: str) -> None:
    """The file, the table, the key, and the nearest known word."""
    with pytest.raises(ConfigurationError, match=complaint):
        load(tmp_path, text)
