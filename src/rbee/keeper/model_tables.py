"""The tables of `rbee models`: values laid out in rows. Pure."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import msgspec
from msgspec import Struct

from rbee.contracts.heartbeats import DownloadInfo, ModelInfo, UnusableModel
from rbee.contracts.model_settings import ModelSettings, SettingsInForce
from rbee.contracts.models import KNOWN_MODELS, parse_model_ref
from rbee.contracts.views import HiveView
from rbee.errors import ModelNotFoundError
from rbee.keeper.recommending import ClassFit, Recommendation
from rbee.keeper.tables import size

DIGEST_LETTERS = 8

Table = tuple[tuple[str, ...], list[tuple[object, ...]]]
"""Column names and rows."""


class ModelCopy(Struct, frozen=True, kw_only=True):
    """A model on one hive; `needed_bytes` with the slots and the context in force, None where not known."""

    hive_id: str
    info: ModelInfo
    needed_bytes: int | None


class ModelShown(Struct, frozen=True, kw_only=True):
    """All that is known of one model."""

    model: str
    aliases: list[str]
    settings: ModelSettings
    copies: list[ModelCopy]
    downloads: dict[str, DownloadInfo]
    unusable: dict[str, UnusableModel]


def models_table(hives: Sequence[HiveView]) -> Table:
    """Lay out the models of all hives, a row each; what is being fetched and what is unusable among them."""
    rows: list[tuple[object, ...]] = []
    for hive in hives:
        loaded = {worker.model for worker in hive.workers}
        for model in hive.models:
            state = "loaded" if model.model in loaded else "on disk"
            digest = (model.sha256 or "")[:DIGEST_LETTERS]
            facts = (model.quantization, model.context_tokens, model.purpose, _yes(model.has_chat_template))
            rows.append((model.model, state, size(model.size_bytes), *facts, digest, hive.hive_id))
        for fetched in hive.downloads:
            state = f"fetching {share(fetched)}"
            rows.append((fetched.model, state, size(fetched.done_bytes), *[None] * 5, hive.hive_id))
        for broken in hive.unusable_models:
            rows.append((broken.model, "unusable", size(broken.size_bytes), *[None] * 5, hive.hive_id))
    columns = ("model", "state", "size", "quant", "context", "purpose", "template", "digest", "hive")
    return _without_hive(columns, rows, -1, hives)


def faults(hives: Sequence[HiveView]) -> list[str]:
    """Say of each file that cannot be loaded where it is and what is wrong, a sentence each."""
    return [
        f"{broken.model} on {hive.hive_id} ({broken.path}): {broken.fault}."
        for hive in hives
        for broken in hive.unusable_models
    ]


def _without_hive(
    columns: tuple[str, ...], rows: list[tuple[object, ...]], at: int, hives: Collection[object]
) -> Table:
    """Leave the column of the hives out where there is one hive alone."""
    if len(hives) > 1:
        return columns, rows
    at %= len(columns)
    return (*columns[:at], *columns[at + 1 :]), [(*row[:at], *row[at + 1 :]) for row in rows]


def share(download: DownloadInfo) -> str:
    """Write how far a download is: `31 %`, or the bytes where the whole is not known."""
    if not download.total_bytes:
        return str(size(download.done_bytes))
    return f"{min(100, 100 * download.done_bytes // download.total_bytes)} %"


def shown_model(name: str, hives: Sequence[HiveView], settings: SettingsInForce) -> ModelShown:
    """Gather what is known of a model, or of what an alias stands for.

    Raises:
        ModelNotFoundError: Nobody knows such a model; the nearest name is told.
    """
    model = settings.table.resolve(name)
    own = settings.of(model)
    tokens = (own.context_tokens or settings.context_tokens, own.slots or settings.slots)
    shown = ModelShown(
        model=model,
        aliases=sorted(alias for alias, stands_for in settings.table.aliases.items() if stands_for == model),
        settings=own,
        copies=[
            ModelCopy(
                hive_id=hive.hive_id,
                info=info,
                needed_bytes=info.memory.needed_bytes(*tokens, own.purpose or info.purpose or "generate")
                if info.memory is not None
                else None,
            )
            for hive in hives
            for info in hive.models
            if info.model == model
        ],
        downloads={hive.hive_id: one for hive in hives for one in hive.downloads if one.model == model},
        unusable={hive.hive_id: one for hive in hives for one in hive.unusable_models if one.model == model},
    )
    if not shown.copies and not shown.downloads and not shown.unusable and model not in KNOWN_MODELS:
        names = {*settings.table.aliases, *(info.model for hive in hives for info in hive.models)}
        ref = parse_model_ref(model, names)
        raise ModelNotFoundError(
            f"{ref.text} is on no hive.", remedy=f"Fetch it: rbee models pull {ref.text}", param="model"
        )
    return shown


def model_fields(shown: ModelShown) -> list[tuple[object, ...]]:
    """Lay out what is known of a model, a field a row."""
    rows: list[tuple[object, ...]] = [("model", shown.model)]
    if shown.aliases:
        rows.append(("aliases", ", ".join(shown.aliases)))
    rows += [(f"setting {name}", _plain(value)) for name, value in msgspec.structs.asdict(shown.settings).items()]
    known = KNOWN_MODELS.get(shown.model)
    if known is not None and not shown.copies:
        rows.append(("size", f"{size(known.size_bytes)}, on no hive yet (rbee models pull {shown.model})"))
    for copy in shown.copies:
        rows += _copy_fields(copy, shown.settings)
    for hive_id, download in shown.downloads.items():
        rows.append(("fetching", f"{share(download)} on {hive_id}"))
    for hive_id, broken in shown.unusable.items():
        rows.append(("unusable", f"on {hive_id}, {broken.path}: {broken.fault}"))
    return rows


def _copy_fields(copy: ModelCopy, settings: ModelSettings) -> list[tuple[object, ...]]:
    info, memory = copy.info, copy.info.memory
    rows: list[tuple[object, ...]] = [
        ("on hive", copy.hive_id),
        ("  path", info.path),
        ("  size", size(info.size_bytes)),
        ("  digest (SHA-256)", info.sha256),
        ("  architecture", info.architecture),
        ("  quantization", info.quantization),
        ("  context it was trained for", info.context_tokens),
        ("  purpose", info.purpose),
        ("  chat template", _yes(info.has_chat_template)),
    ]
    if memory is not None:
        rows += [
            ("  memory for its weights", size(memory.weights_bytes)),
            ("  memory for a token of context", size(memory.cache_bytes_per_token)),
            ("  memory to work in", size(memory.work_bytes)),
            (
                f"  memory in all, {settings.slots} slots of {settings.context_tokens} tokens",
                size(copy.needed_bytes),
            ),
        ]
    return rows


def fits_table(found: Recommendation) -> Table:
    """Lay out which model fits which device."""
    rows: list[tuple[object, ...]] = []
    for device in found.devices:
        place = (device.hive_id, device.device, size(device.memory_free_bytes))
        if not device.is_usable:
            rows.append((*place, None, "not usable", None, None, "no"))
            continue
        for model in device.models:
            here = "loaded" if model.is_loaded else "on disk" if model.is_on_disk else "to be pulled"
            slots = f"{model.slots} x {model.context_tokens}"
            rows.append((*place, model.model, here, slots, size(model.needed_bytes), _yes(model.fits)))
    columns = ("hive", "device", "free", "model", "state", "slots x context", "needs", "fits")
    return _without_hive(columns, rows, 0, {device.hive_id for device in found.devices})


def classes_table(found: Recommendation) -> Table:
    """Lay out which quantization of each size class fits which device."""
    usable = [device for device in found.devices if device.is_usable]
    names = [fit.size_class for fit in usable[0].classes] if usable else []
    rows: list[tuple[object, ...]] = [
        (device.hive_id, device.device, *(_best(fit) for fit in device.classes)) for device in usable
    ]
    return _without_hive(("hive", "device", *names), rows, 0, {device.hive_id for device in found.devices})


def _best(fit: ClassFit) -> str | None:
    return None if fit.quantization is None else f"{fit.quantization} ({size(fit.needed_bytes)})"


def _yes(value: bool | None) -> str | None:
    return None if value is None else "yes" if value else "no"


def _plain(value: Any) -> object:
    if isinstance(value, bool):
        return _yes(value)
    if isinstance(value, (dict, list, tuple)):
        return msgspec.json.encode(value).decode() if value else None
    return value
