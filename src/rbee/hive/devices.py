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
    """Return the devices a model can run on: `cpu` first, then `cuda:0`, `cuda:1`, … where NVIDIA's driver is.

    GPUs are numbered as a worker will see them under CUDA_VISIBLE_DEVICES, in bus order
    (CUDA_DEVICE_ORDER=PCI_BUS_ID). One that gives no answer is left out without hiding the others. The first call
    may take a second; NVML then stays open for the life of the process, because opening it anew wakes idle GPUs.
    """
    total, free = memory_bytes()
    cpu = DeviceInfo(device="cpu", name=_cpu_name(), memory_bytes=total, memory_free_bytes=free)
    return [cpu, *_gpus()]


def memory_bytes(cgroup: Path = _CGROUP) -> tuple[int, int]:
    """Return the memory this process may use and how much of it is free, in bytes, container limits included."""
    memory = psutil.virtual_memory()
    limit, used = _number(cgroup / "memory.max"), _number(cgroup / "memory.current")
    if limit is None or used is None or limit >= memory.total:
        return memory.total, memory.available
    return limit, max(0, min(memory.available, limit - used))


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


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None


def _existing(path: Path) -> Path:
    """Return the nearest directory above `path` that is there."""
    return next((p for p in (path, *path.absolute().parents) if p.exists()), Path("/"))
