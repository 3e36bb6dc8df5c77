"""What the machine has: facts that can be checked against the system, and CUDA's rules for visible GPUs."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import psutil
import pytest

from rbee.hive.devices import list_devices, machine_info, memory_bytes, visible_gpus

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
