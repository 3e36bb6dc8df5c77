"""Which models fit which device, and what to try first: pure."""

from __future__ import annotations

from collections.abc import Sequence

from msgspec import Struct

from rbee.contracts.heartbeats import DeviceInfo, ModelMemory
from rbee.contracts.model_memory import estimate_memory
from rbee.contracts.model_settings import SettingsInForce
from rbee.contracts.models import KNOWN_MODELS
from rbee.contracts.states import HiveState, WorkerState
from rbee.contracts.views import HiveView

PROMPT = "Why is the sky blue?"


class SizeClass(Struct, frozen=True, kw_only=True):
    """How models of about this many parameters are usually built.

    Attributes:
        name: As people call it, such as `8B`.
        parameters: How many numbers the model has learned.
        layers: How many layers it has.
        kv_width: Numbers of a key, and of a value, that a layer keeps of a token.
        embedding_length: Numbers a token is between two layers.
        vocabulary_size: Tokens it knows.
    """

    name: str
    parameters: float
    layers: int
    kv_width: int
    embedding_length: int
    vocabulary_size: int

    def memory(self, bits_per_weight: float) -> ModelMemory:
        """Estimate what such a model takes when its weights are written in so many bits."""
        return estimate_memory(
            weights_bytes=int(self.parameters * bits_per_weight / 8),
            cached_numbers=self.layers * 2 * self.kv_width,
            vocabulary_size=self.vocabulary_size,
            embedding_length=self.embedding_length,
        )


SIZE_CLASSES = tuple(
    SizeClass(
        name=name,
        parameters=billions * 1e9,
        layers=layers,
        kv_width=kv_width,
        embedding_length=embedding_length,
        vocabulary_size=vocabulary_size,
    )
    for name, billions, layers, kv_width, embedding_length, vocabulary_size in (
        ("1B", 1.24, 16, 512, 2048, 128_256),
        ("3B", 3.21, 28, 1024, 3072, 128_256),
        ("8B", 8.03, 32, 1024, 4096, 128_256),
        ("14B", 14.8, 48, 1024, 5120, 152_064),
        ("32B", 32.8, 64, 1024, 5120, 152_064),
        ("70B", 70.6, 80, 1024, 8192, 128_256),
    )
)

BITS_PER_WEIGHT = {"Q8_0": 8.5, "Q6_K": 6.6, "Q5_K_M": 5.7, "Q4_K_M": 4.9, "Q3_K_M": 3.9, "Q2_K": 3.2}
"""By quantization, the best first: how many bits a weight takes in a whole file, on the average."""


class ModelFit(Struct, frozen=True, kw_only=True):
    """Whether one model fits one device.

    Attributes:
        needed_bytes: What a worker would take with the slots and the context in force; None where it is not known.
        fits: It has the room, or is loaded there already; None where it is not known.
    """

    model: str
    is_on_disk: bool
    is_loaded: bool
    is_generating: bool
    slots: int
    context_tokens: int
    needed_bytes: int | None
    fits: bool | None


class ClassFit(Struct, frozen=True, kw_only=True):
    """The best quantization of a size class that fits one device; None where none does."""

    size_class: str
    quantization: str | None
    needed_bytes: int | None


class DeviceFit(Struct, frozen=True, kw_only=True):
    """What fits one device."""

    hive_id: str
    device: str
    name: str
    memory_free_bytes: int
    is_usable: bool
    note: str
    models: list[ModelFit]
    classes: list[ClassFit]


class Recommendation(Struct, frozen=True, kw_only=True):
    """What fits where, and the one command to try; None where nothing fits."""

    devices: list[DeviceFit]
    command: str | None
    why: str


def recommend(hives: Sequence[HiveView], settings: SettingsInForce) -> Recommendation:
    """Tell what fits the devices of all live hives, and what to try first."""
    live = [hive for hive in hives if hive.state is HiveState.LIVE]
    devices = [_device_fit(hive, device, settings) for hive in live for device in hive.devices]
    command, why = _command(devices)
    return Recommendation(devices=devices, command=command, why=why)


def _device_fit(hive: HiveView, device: DeviceInfo, settings: SettingsInForce) -> DeviceFit:
    known = {name: known.memory for name, known in KNOWN_MODELS.items()}
    on_disk = {model.model: model for model in hive.models}
    loaded = {worker.model for worker in hive.workers if worker.state is WorkerState.READY}
    memories = {**known, **{name: model.memory for name, model in on_disk.items()}}
    return DeviceFit(
        hive_id=hive.hive_id,
        device=device.device,
        name=device.name,
        memory_free_bytes=device.memory_free_bytes,
        is_usable=device.is_usable,
        note=device.note,
        models=[
            _model_fit(
                name,
                memory,
                device,
                settings,
                is_on_disk=name in on_disk,
                is_loaded=name in loaded,
                is_generating=name not in on_disk or on_disk[name].purpose in (None, "generate"),
            )
            for name, memory in sorted(memories.items())
        ],
        classes=[_class_fit(size_class, device, settings) for size_class in SIZE_CLASSES],
    )


def _model_fit(
    name: str,
    memory: ModelMemory | None,
    device: DeviceInfo,
    settings: SettingsInForce,
    *,
    is_on_disk: bool,
    is_loaded: bool,
    is_generating: bool,
) -> ModelFit:
    own = settings.of(name)
    slots, context_tokens = own.slots or settings.slots, own.context_tokens or settings.context_tokens
    needed = memory.needed_bytes(context_tokens, slots) if memory is not None else None
    has_room = None if needed is None else needed <= device.memory_free_bytes
    return ModelFit(
        model=name,
        is_on_disk=is_on_disk,
        is_loaded=is_loaded,
        is_generating=is_generating,
        slots=slots,
        context_tokens=context_tokens,
        needed_bytes=needed,
        fits=None if needed is None and not is_loaded else device.is_usable and (is_loaded or bool(has_room)),
    )


def _class_fit(size_class: SizeClass, device: DeviceInfo, settings: SettingsInForce) -> ClassFit:
    for quantization, bits in BITS_PER_WEIGHT.items():
        needed = size_class.memory(bits).needed_bytes(settings.context_tokens, settings.slots)
        if device.is_usable and needed <= device.memory_free_bytes:
            return ClassFit(size_class=size_class.name, quantization=quantization, needed_bytes=needed)
    return ClassFit(size_class=size_class.name, quantization=None, needed_bytes=None)


def _command(devices: Sequence[DeviceFit]) -> tuple[str | None, str]:
    """Choose the command: the largest model on a disk that fits and writes, else a known one to fetch."""
    fitting = [
        (device, model) for device in devices for model in device.models if model.fits and model.is_generating
    ]
    here = [pair for pair in fitting if pair[1].is_on_disk]
    if here:
        device, model = max(here, key=lambda pair: (pair[1].needed_bytes or 0, pair[1].model))
        return f'rbee infer -m {model.model} "{PROMPT}"', (
            f"{model.model} is the largest model on a disk that fits ({device.device} of {device.hive_id})."
        )
    if fitting:
        device, model = max(fitting, key=lambda pair: (pair[1].needed_bytes or 0, pair[1].model))
        return f"rbee models pull {model.model} --hive {device.hive_id}", (
            f"No model on a disk fits; {model.model} would fit {device.device} of {device.hive_id}."
        )
    if not devices:
        return None, "No hive is live, so nothing can be said of devices."
    return None, "No model fits a device as it is now: stop a worker, or use fewer slots or a shorter context."
