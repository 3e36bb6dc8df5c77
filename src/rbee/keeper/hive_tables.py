"""The tables of `rbee hives show`: values laid out in rows. Pure."""

from __future__ import annotations

from rbee.contracts.views import HiveView
from rbee.keeper.model_tables import Table, share
from rbee.keeper.tables import size


def hive_fields(hive: HiveView) -> list[tuple[object, ...]]:
    """Lay out what a hive says of itself, a field a row."""
    machine = hive.machine
    rows: list[tuple[object, ...]] = [
        ("hive", hive.hive_id),
        ("state", hive.state),
        ("heartbeat", f"{hive.last_heartbeat_s:.0f} s ago"),
        ("url", hive.url),
        ("version", hive.version),
        ("machine", f"{machine.hostname}, {machine.cpus} processors"),
        ("memory", f"{size(machine.memory_free_bytes)} free of {size(machine.memory_bytes)}"),
        ("disk", f"{size(machine.disk_free_bytes)} free"),
        ("engines", ", ".join(hive.engines)),
        ("workers at most", hive.workers_max or "as many as the memory holds"),
    ]
    rows += [
        ("worker", f"{worker.worker_id}: {worker.model} to {worker.purpose}, {worker.state}")
        for worker in hive.workers
    ]
    rows += [("model", f"{model.model} ({size(model.size_bytes)})") for model in hive.models]
    rows += [("fetching", f"{download.model}, {share(download)}") for download in hive.downloads]
    rows += [("unusable", f"{broken.model}: {broken.fault}") for broken in hive.unusable_models]
    return rows


def devices_table(hive: HiveView) -> Table:
    """Lay out a hive's devices, with why one cannot be used."""
    rows: list[tuple[object, ...]] = [
        (
            device.device,
            device.name,
            size(device.memory_bytes),
            size(device.memory_free_bytes),
            "yes" if device.is_usable else f"no: {device.note}",
        )
        for device in hive.devices
    ]
    return ("device", "name", "memory", "free", "usable"), rows
