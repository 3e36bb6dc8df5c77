"""What this machine has to run models on: its processors, its memory, its GPUs."""

from __future__ import annotations

import os
import platform
import socket
from collections.abc import Sequence
from pathlib import Path

import psutil
import pynvml

from rbee.contracts.heartbeats import DeviceInfo, MachineInfo

_CPU_INFO = Path("/proc/cpuinfo")
_DRM = Path("/sys/class/drm")
_AMD, _INTEL = 0x1002, 0x8086
_VENDORS = {"rocm": "AMD", "intel": "Intel"}
_INTEL_INTEGRATED = "0000:00:02.0"
_CARD_BYTES_MIN = 2 * 1024**3
_CGROUP = Path("/sys/fs/cgroup")


def machine_info(path: Path) -> MachineInfo:
    """Return the machine's facts of this moment; `path` says which disk is meant and need not exist yet."""
    total, free = memory_bytes()
    return MachineInfo(
        hostname=socket.gethostname(),
        cpus=len(os.sched_getaffinity(0)),
        memory_bytes=total,
        memory_free_bytes=free,
        disk_free_bytes=psutil.disk_usage(str(_existing(path))).free,
    )


def list_devices() -> list[DeviceInfo]:
    """Return the devices of this machine: `cpu` first, then `cuda:0`, `cuda:1`, … where NVIDIA's driver is.

    AMD's GPUs follow as `rocm:0`, …, Intel's own cards as `intel:0`, …, read from sysfs. NVIDIA's are numbered as
    a worker will see them under CUDA_VISIBLE_DEVICES, in bus order (CUDA_DEVICE_ORDER=PCI_BUS_ID). One that gives
    no answer is left out without hiding the others. The first call may take a second; NVML then stays open for
    the life of the process, because opening it anew wakes idle GPUs.
    """
    total, free = memory_bytes()
    cpu = DeviceInfo(device="cpu", name=_cpu_name(), memory_bytes=total, memory_free_bytes=free)
    return [cpu, *_gpus(), *sysfs_gpus()]


def memory_bytes(cgroup: Path = _CGROUP) -> tuple[int, int]:
    """Return the memory this process may use and how much of it is free, in bytes, container limits included.

    What a container holds of files that were read or written counts as free, as it does for a machine: the kernel
    gives it back when it is needed. After a download that is as much as the model.
    """
    memory = psutil.virtual_memory()
    limit, used = _number(cgroup / "memory.max"), _number(cgroup / "memory.current")
    if limit is None or used is None or limit >= memory.total:
        return memory.total, memory.available
    return limit, max(0, min(memory.available, limit - used + _files_bytes(cgroup / "memory.stat")))


def _files_bytes(path: Path) -> int:
    """Return how much of a container's memory holds files."""
    try:
        told = dict(line.split() for line in path.read_text().splitlines())
        return int(told.get("active_file", 0)) + int(told.get("inactive_file", 0))
    except (OSError, ValueError):
        return 0


def visible_gpus(visible: str | None, uuids: Sequence[str | None]) -> list[int]:
    """Return which GPUs CUDA shows, in its order, for a value of CUDA_VISIBLE_DEVICES.

    Args:
        visible: The variable's value: numbers or UUIDs (or beginnings of them); None where it is not set.
        uuids: The GPUs' UUIDs in bus order; None for one that gave no answer.

    As CUDA does, the first word that names no GPU, or one named already, ends the list.
    """
    if visible is None:
        return list(range(len(uuids)))
    found: list[int] = []
    for word in (part.strip() for part in visible.split(",")):
        if word.isdecimal():
            matching = [int(word)] if int(word) < len(uuids) else []
        else:
            matching = [n for n, uuid in enumerate(uuids) if word and uuid and uuid.startswith(word)]
        if len(matching) != 1 or matching[0] in found:
            break
        found.append(matching[0])
    return found


def _gpus() -> list[DeviceInfo]:
    try:
        pynvml.nvmlInit()
        count = pynvml.nvmlDeviceGetCount()
    except pynvml.NVMLError:
        return []
    uuids = [_uuid(index) for index in range(count)]
    visible = visible_gpus(os.environ.get("CUDA_VISIBLE_DEVICES"), uuids)
    infos = [_gpu(f"cuda:{number}", index) for number, index in enumerate(visible)]
    return [info for info in infos if info is not None]


def sysfs_gpus(directory: Path = _DRM) -> list[DeviceInfo]:
    """Return the graphics cards of AMD and Intel that have memory of their own, as the kernel's drivers tell.

    What is part of a processor is left out: less than 2 GiB at AMD, the processor's place on the bus at Intel.
    A driver that does not tell how much memory a card has is taken at 0.
    """
    cards = sorted(directory.glob("card[0-9]*"), key=lambda card: (len(card.name), card.name))
    found: list[DeviceInfo] = []
    for card in (card / "device" for card in cards if card.name[4:].isdecimal()):
        vendor = _hexadecimal(card / "vendor")
        kind = {_AMD: "rocm", _INTEL: "intel"}.get(vendor or 0)
        memory = _own_memory(card, kind)
        if kind is not None and memory is not None:
            number = sum(info.device.startswith(kind) for info in found)
            name = _line(card / "product_name") or f"{_VENDORS[kind]} GPU {_hexadecimal(card / 'device') or 0:04x}"
            total, free = memory
            found.append(
                DeviceInfo(
                    device=f"{kind}:{number}", name=name, memory_bytes=total, memory_free_bytes=max(0, free)
                )
            )
    return found


def _own_memory(card: Path, kind: str | None) -> tuple[int, int] | None:
    """Return a card's memory and how much of it is free; None for what is part of a processor."""
    if kind == "rocm":
        total, used = _number(card / "mem_info_vram_total"), _number(card / "mem_info_vram_used")
        return None if total is None or total < _CARD_BYTES_MIN else (total, total - (used or 0))
    if card.resolve().name == _INTEL_INTEGRATED:
        return None
    total = _number(card.parent / "lmem_total_bytes") or 0
    return total, _number(card.parent / "lmem_avail_bytes") or total


def _uuid(index: int) -> str | None:
    try:
        return _text(pynvml.nvmlDeviceGetUUID(pynvml.nvmlDeviceGetHandleByIndex(index)))
    except pynvml.NVMLError:
        return None


def _gpu(device: str, index: int) -> DeviceInfo | None:
    try:
        handle = pynvml.nvmlDeviceGetHandleByIndex(index)
        memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
        name = _text(pynvml.nvmlDeviceGetName(handle))
    except pynvml.NVMLError:
        return None
    return DeviceInfo(device=device, name=name, memory_bytes=int(memory.total), memory_free_bytes=int(memory.free))


def _text(value: str | bytes) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value


def _cpu_name() -> str:
    try:
        for line in _CPU_INFO.read_text("utf-8", "replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _line(path: Path) -> str | None:
    try:
        return path.read_text("utf-8", "replace").strip() or None
    except OSError:
        return None


def _hexadecimal(path: Path) -> int | None:
    try:
        return int(_line(path) or "", 16)
    except ValueError:
        return None


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None


def _existing(path: Path) -> Path:
    """Return the nearest directory above `path` that is there."""
    return next((p for p in (path, *path.absolute().parents) if p.exists()), Path("/"))
