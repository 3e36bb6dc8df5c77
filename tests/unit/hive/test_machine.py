"""The machine and its engine: what the installed engine offers, and what is said of devices it cannot use."""

from __future__ import annotations

from pathlib import Path

import pytest

from rbee.contracts.heartbeats import DeviceInfo
from rbee.hive import machine
from rbee.hive.machine import Machine, offered_devices
from rbee.narration.emit import captured_narration

CPU = DeviceInfo(device="cpu", name="A processor", memory_bytes=1, memory_free_bytes=1)
GPU = DeviceInfo(device="rocm:0", name="Some card", memory_bytes=1, memory_free_bytes=1)


async def test_installed_engine_offers_the_processor() -> None:
    found = await offered_devices()
    assert found is not None
    assert any(device.name == "CPU" and device.type.endswith("_CPU") for device in found)


async def test_engine_that_cannot_be_asked_is_told_and_holds_nothing_against_a_device(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(machine, "_PROBE", "raise SystemExit(1)")
    with captured_narration("hive") as sink:
        assert await offered_devices() is None
    assert [(event["action"], event["level"]) for event in sink.events] == [("hive_engine_silent", "warning")]


async def test_engine_that_hangs_is_given_up_and_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_PROBE", "import time; time.sleep(600)")
    monkeypatch.setattr(machine, "PROBE_S", 0.2)
    with captured_narration("hive"):
        assert await offered_devices() is None


async def test_gpu_that_the_engine_cannot_use_is_told_once_with_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "list_devices", lambda: [CPU, GPU])
    looked = Machine(tmp_path)
    assert looked.devices()[1].is_usable
    with captured_narration("hive") as sink:
        await looked.ask_engine()
    assert sink.actions == ["hive_devices", "hive_device_unused"]
    assert "xllamacpp's ROCm build" in sink.events[1]["message"]
    assert [device.is_usable for device in looked.devices()] == [True, False]


async def test_machine_without_gpu_says_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "list_devices", lambda: [CPU])
    with captured_narration("hive") as sink:
        await Machine(tmp_path).ask_engine()
    assert sink.events == []
