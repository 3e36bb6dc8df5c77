"""Which devices the engine can use: by what it offers, and what to install where it offers nothing."""

from __future__ import annotations

import pytest

from rbee.contracts.heartbeats import DeviceInfo
from rbee.hive.engine_fit import OfferedDevice, with_usability

CPU = OfferedDevice(name="CPU", description="A processor", type="GGML_BACKEND_DEVICE_TYPE_CPU")


def device(name: str) -> DeviceInfo:
    return DeviceInfo(device=name, name="Some card", memory_bytes=1, memory_free_bytes=1)


def offered(name: str) -> OfferedDevice:
    return OfferedDevice(name=name, description="Some card", type="GGML_BACKEND_DEVICE_TYPE_GPU")


@pytest.mark.parametrize(
    ("name", "build"), [("cuda:0", "CUDA build"), ("rocm:1", "ROCm build"), ("intel:0", "Vulkan build")]
)
def test_gpu_that_the_engine_does_not_offer_names_the_build_to_install(name: str, build: str) -> None:
    cpu, gpu = with_usability([device("cpu"), device(name)], [CPU])
    assert (cpu.is_usable, cpu.note, gpu.is_usable) == (True, "", False)
    assert f"install xllamacpp's {build}" in gpu.note


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("cuda:0", "CUDA0"),
        ("cuda:1", "Vulkan0"),
        ("rocm:0", "ROCm0"),
        ("intel:0", "SYCL0"),
        ("intel:0", "Vulkan1"),
    ],
)
def test_gpu_that_the_engine_offers_is_usable(name: str, found: str) -> None:
    assert with_usability([device(name)], [CPU, offered(found)]) == [device(name)]


def test_gpu_of_another_maker_is_no_proof() -> None:
    assert [found.is_usable for found in with_usability([device("rocm:0")], [offered("CUDA0")])] == [False]


def test_engine_that_does_not_tell_holds_nothing_against_a_device() -> None:
    assert with_usability([device("cuda:0")], None) == [device("cuda:0")]
