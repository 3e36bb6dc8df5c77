"""Which of a machine's devices its engine can use: pure."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
from msgspec import Struct

from rbee.contracts.heartbeats import DeviceInfo

BUILDS = {"cuda": ("CUDA", "Vulkan"), "rocm": ("ROCm", "Vulkan"), "intel": ("SYCL", "Vulkan")}
"""By the word that a device's name begins with: the engine's builds that can use it, the one to name first."""

INSTALLABLE = {"cuda": "CUDA", "rocm": "ROCm", "intel": "Vulkan"}
"""By the same word: which of xllamacpp's builds to install."""


class OfferedDevice(Struct, frozen=True, kw_only=True):
    """A device as the engine lists it: its name (`CUDA0`), what it is, and its type in the engine's word."""

    name: str
    description: str
    type: str


def with_usability(devices: Sequence[DeviceInfo], offered: Sequence[OfferedDevice] | None) -> list[DeviceInfo]:
    """Return the devices with whether the engine can use each, and what to install where it cannot.

    Args:
        devices: What the machine has.
        offered: What the engine offers; None where that is not known, so that nothing is held against a device.
    """
    if offered is None:
        return list(devices)
    return [_judged(device, offered) for device in devices]


def _judged(device: DeviceInfo, offered: Sequence[OfferedDevice]) -> DeviceInfo:
    kind = device.device.partition(":")[0]
    builds = BUILDS.get(kind, ())
    if not builds or any(_is_of(build, found) for build in builds for found in offered):
        return device
    note = (
        f"the installed llama.cpp (xllamacpp) cannot use it; install xllamacpp's {INSTALLABLE[kind]} build "
        "(its own package index; see its documentation)."
    )
    return msgspec.structs.replace(device, is_usable=False, note=note)


def _is_of(build: str, found: OfferedDevice) -> bool:
    return found.name.upper().startswith(build.upper())
