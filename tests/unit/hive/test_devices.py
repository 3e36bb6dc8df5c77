"""What the machine has: facts that can be checked against the system, and CUDA's rules for visible GPUs."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import psutil
import pynvml
import pytest

from rbee.contracts.heartbeats import DeviceInfo
from rbee.hive import devices
from rbee.hive.devices import list_devices, machine_info, memory_bytes, sysfs_gpus, visible_gpus

GPUS = ["GPU-aaaa-1", "GPU-bbbb-2", None, "GPU-abcd-4"]


def test_devices_begin_with_the_cpu() -> None:
    cpu = list_devices()[0]
    assert cpu.device == "cpu"
    assert cpu.name
    assert 0 < cpu.memory_free_bytes <= cpu.memory_bytes <= psutil.virtual_memory().total


def test_devices_have_each_name_once() -> None:
    names = [device.device for device in list_devices()]
    assert names == ["cpu", *(f"cuda:{number}" for number in range(len(names) - 1))]


def test_machine_info_of_a_directory_that_is_not_there_tells_its_disk(tmp_path: Path) -> None:
    info = machine_info(tmp_path / "not" / "there" / "yet")
    assert info.hostname == socket.gethostname()
    assert info.cpus == len(os.sched_getaffinity(0))
    assert 0 < info.disk_free_bytes <= psutil.disk_usage(str(tmp_path)).total


def test_memory_limit_of_a_container_counts(tmp_path: Path) -> None:
    (tmp_path / "memory.max").write_text("67108864\n")
    (tmp_path / "memory.current").write_text("60000000\n")
    assert memory_bytes(tmp_path) == (67108864, 7108864)


def test_memory_of_a_container_that_holds_files_is_free(tmp_path: Path) -> None:
    """Without this a model that was just downloaded would not fit beside its own file."""
    (tmp_path / "memory.max").write_text("67108864\n")
    (tmp_path / "memory.current").write_text("60000000\n")
    (tmp_path / "memory.stat").write_text("anon 10000000\nfile 50000000\nactive_file 7\ninactive_file 40000000\n")
    assert memory_bytes(tmp_path) == (67108864, 7108864 + 40000007)


def test_memory_used_beyond_the_limit_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "memory.max").write_text("67108864\n")
    (tmp_path / "memory.current").write_text("77108864\n")
    assert memory_bytes(tmp_path) == (67108864, 0)


def test_memory_without_limit_is_the_machine_s(tmp_path: Path) -> None:
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("60000000\n")
    assert memory_bytes(tmp_path)[0] == psutil.virtual_memory().total


@pytest.mark.parametrize(
    ("visible", "expected"),
    [
        (None, [0, 1, 2, 3]),
        ("", []),
        ("1,0", [1, 0]),
        ("3", [3]),
        (" 1 , 3 ", [1, 3]),
        ("-1", []),
        ("0,-1,1", [0]),
        ("0,9,1", [0]),
        ("0,0", [0]),
        ("GPU-bbbb", [1]),
        ("GPU-a", []),
        ("GPU-abcd-4,GPU-aaaa", [3, 0]),
        ("MIG-1", []),
    ],
)
def test_visible_gpus_follow_cuda_s_rules(visible: str | None, expected: list[int]) -> None:
    assert visible_gpus(visible, GPUS) == expected


def card(directory: Path, number: int, address: str, **files: str) -> None:
    """Lay a graphics card into a tree like sysfs; `device_` is a file of that name beside the others."""
    device = directory / "devices" / address
    device.mkdir(parents=True)
    for name, text in files.items():
        (device / name.rstrip("_")).write_text(text + "\n")
    place = directory / "drm" / f"card{number}"
    place.mkdir(parents=True)
    (place / "device").symlink_to(device)
    (directory / "drm" / f"card{number}-HDMI-A-1").mkdir()


AMD_CARD = {"vendor": "0x1002", "device_": "0x744c", "mem_info_vram_total": str(24 * 2**30)}


def test_cards_of_amd_and_intel_are_read_from_sysfs(tmp_path: Path) -> None:
    """Each with its memory; NVIDIA's are left to its driver."""
    card(tmp_path, 0, "0000:01:00.0", vendor="0x10de", device_="0x2684")
    card(tmp_path, 1, "0000:03:00.0", **AMD_CARD, mem_info_vram_used=str(4 * 2**30), product_name="Radeon")
    card(tmp_path, 2, "0000:04:00.0", **AMD_CARD)
    card(tmp_path, 10, "0000:05:00.0", vendor="0x8086", device_="0x56a0")
    (tmp_path / "drm" / "card10" / "lmem_total_bytes").write_text(str(16 * 2**30))
    found = sysfs_gpus(tmp_path / "drm")
    assert [
        (gpu.device, gpu.name, gpu.memory_bytes // 2**30, gpu.memory_free_bytes // 2**30) for gpu in found
    ] == [
        ("rocm:0", "Radeon", 24, 20),
        ("rocm:1", "AMD GPU 744c", 24, 24),
        ("intel:0", "Intel GPU 56a0", 16, 16),
    ]


def test_graphics_within_a_processor_are_no_device(tmp_path: Path) -> None:
    card(tmp_path, 0, "0000:00:02.0", vendor="0x8086", device_="0x9bc5")
    card(tmp_path, 1, "0000:07:00.0", vendor="0x1002", device_="0x1638", mem_info_vram_total=str(512 * 2**20))
    assert sysfs_gpus(tmp_path / "drm") == []


def test_sysfs_that_is_not_there_or_unreadable_has_no_devices(tmp_path: Path) -> None:
    assert sysfs_gpus(tmp_path / "none") == []
    card(tmp_path, 0, "0000:03:00.0", vendor="junk")
    assert sysfs_gpus(tmp_path / "drm") == []


class SmallDriver:
    """A driver of two GPUs, the second of which gives no answer but its UUID."""

    NVMLError = pynvml.NVMLError

    class Memory:
        total, free = 24 * 2**30, 20 * 2**30

    def nvmlInit(self) -> None:  # noqa: N802  # the driver's own names
        """Begin."""

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802
        """Count."""
        return 2

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:  # noqa: N802
        """Find one."""
        return index

    def nvmlDeviceGetUUID(self, handle: int) -> bytes:  # noqa: N802
        """Identify one."""
        return f"GPU-{handle}".encode()

    def nvmlDeviceGetMemoryInfo(self, handle: int) -> type[Memory]:  # noqa: N802
        """Look at one's memory."""
        if handle == 1:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_GPU_IS_LOST)
        return self.Memory

    def nvmlDeviceGetName(self, handle: int) -> bytes:  # noqa: N802
        """Name one."""
        return b"Some card"


def test_gpus_of_the_driver_are_told_with_their_memory_and_a_lost_one_hides_no_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Numbered as a worker will see them."""
    monkeypatch.setattr(devices, "pynvml", SmallDriver())
    monkeypatch.setattr(devices, "sysfs_gpus", list)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,0")
    _, gpu = list_devices()
    assert gpu == DeviceInfo(
        device="cuda:1", name="Some card", memory_bytes=24 * 2**30, memory_free_bytes=20 * 2**30
    )
