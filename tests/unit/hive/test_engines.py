"""Engines of the configuration, as a hive knows them."""

from __future__ import annotations

from pathlib import Path

import pytest

from rbee.contracts.home import Home
from rbee.errors import ConfigurationError
from rbee.hive.catalog import LocalModel
from rbee.hive.outbox import Outbox
from rbee.hive.service import HiveService
from rbee.hive.settings import HiveSettings
from rbee.hive.worker_wanted import WorkerWanted, command_of
from rbee.jobs import JobRegistry
from tests.unit.hive.small_queen import small_queen

CONFIG = """
[engines.cook]
command = ["cook", "{model}", "{port}"]
ready_timeout_s = 77

[engines.reader]
command = ["reader", "{port}"]
purposes = ["embed"]
needs_file = false
prefill = true
"""
MODEL = LocalModel(ref="smollm2:135m", path=Path("/m/model.gguf"), size_bytes=5, sha256=None)


def wanted(**values: object) -> WorkerWanted:
    """Want a worker."""
    known = {"worker_id": "w", "model": MODEL, "slots": 2, "context_tokens": 64, "job_id": None}
    return WorkerWanted(**{**known, "correlation_id": None, **values})  # type: ignore[arg-type]


async def service_of(tmp_path: Path, config: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return which engines a hive with this configuration tells its queen of."""
    home = Home.at(tmp_path / "home")
    home.config.write_text(config, "utf-8")
    registry = JobRegistry.open(None)
    try:
        async with small_queen() as (_, link):
            outbox = Outbox(link)
            (home.hive / "boot").touch()
            try:
                settings = HiveSettings(home=home.root)
                service = HiveService(
                    settings, home, registry, link, outbox, hive_id="hive-1", boot_id="boot", url="http://hive"
                )
                told = await service.heartbeat()
            finally:
                outbox.close()
    finally:
        await registry.close()
    return told.engines, told.fetching_engines


async def test_queen_is_told_of_every_engine_and_which_need_no_file(tmp_path: Path) -> None:
    """The built-in one is always among them."""
    assert await service_of(tmp_path, CONFIG) == (("llama_cpp", "cook", "reader"), ("reader",))
    assert await service_of(tmp_path, "") == (("llama_cpp",), ())


async def test_hive_does_not_start_with_an_engine_it_cannot_read(tmp_path: Path) -> None:
    """It says which and why."""
    with pytest.raises(ConfigurationError, match=r"One of \{port\} and \{socket\}"):
        await service_of(tmp_path, '[engines.cook]\ncommand = ["cook"]')


def test_worker_is_told_its_engine_and_device() -> None:
    """The built-in one needs no word, and chooses its device itself."""
    program = Path("/bin/worker")
    assert "--engine" not in command_of(wanted(device="cuda:1"), program)
    assert "--device" not in command_of(wanted(device="cuda:1"), program)
    command = command_of(wanted(engine="cook", device="cuda:1"), program)
    assert command[command.index("--engine") :][:4] == ["--engine", "cook", "--device", "cuda:1"]
