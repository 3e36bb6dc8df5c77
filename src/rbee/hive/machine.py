"""The machine a hive runs on: its memory and disk, its devices, and which of them its engine can use."""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path

import msgspec

from rbee.contracts.heartbeats import DeviceInfo, MachineInfo
from rbee.hive.devices import list_devices, machine_info
from rbee.hive.engine_fit import OfferedDevice, with_usability
from rbee.narration import narrate

PROBE_S = 60.0

# Run as `python -c`: in a process of its own, because what the engine loads to look at GPUs is never given back.
_PROBE = (
    "import json, xllamacpp; "
    "print(json.dumps([{'name': d['name'], 'description': d['description'], 'type': d['type'].name} "
    "for d in xllamacpp.get_device_info()]))"
)


class Machine:
    """Looks at the machine; what the engine offers is asked once."""

    def __init__(self, home: Path) -> None:
        """Take the directory whose disk is meant."""
        self._home = home
        self._offered: list[OfferedDevice] | None = None

    def info(self) -> MachineInfo:
        """Return the machine's facts of this moment."""
        return machine_info(self._home)

    def devices(self) -> list[DeviceInfo]:
        """Return the devices of this moment; one that the engine cannot use says why, once that is known."""
        return with_usability(list_devices(), self._offered)

    async def ask_engine(self) -> None:
        """Ask the engine which devices it offers, where there is more than the processor; tell what is of no use.

        A machine without a GPU is asked nothing, and nothing is said of it.
        """
        if all(device.device == "cpu" for device in await asyncio.to_thread(self.devices)):
            return
        self._offered = await offered_devices()
        devices = await asyncio.to_thread(self.devices)
        named = ", ".join(f"{device.device} ({device.name})" for device in devices)
        narrate("hive_devices", f"This machine has {named}.", devices=[device.device for device in devices])
        for device in devices:
            if not device.is_usable:
                said = f"{device.device} ({device.name}) is not used: {device.note}"
                narrate("hive_device_unused", said, level="warning", device=device.device)


async def offered_devices() -> list[OfferedDevice] | None:
    """Return the devices that the installed engine offers; None, with a warning told, where it does not say."""
    try:
        return msgspec.json.decode(await _probe(), type=list[OfferedDevice])
    except (OSError, TimeoutError, msgspec.MsgspecError) as error:
        why = str(error) or f"silent for {PROBE_S:g} s"
        said = f"The engine does not tell which devices it can use ({why}), so all of them are taken as usable."
        narrate("hive_engine_silent", said, level="warning")
        return None


async def _probe() -> bytes:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-P", "-c", _PROBE),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
        env={**os.environ, "CUDA_DEVICE_ORDER": "PCI_BUS_ID"},
    )
    try:
        async with asyncio.timeout(PROBE_S):
            return (await process.communicate())[0]
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
