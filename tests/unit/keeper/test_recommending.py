"""What fits which device: computed from sizes, slots and context, and one command to try."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rbee.contracts.heartbeats import DeviceInfo, ModelInfo, ModelMemory
from rbee.contracts.model_settings import ModelSettings, ModelTable, SettingsInForce
from rbee.contracts.models import KNOWN_MODELS
from rbee.contracts.states import HiveState
from rbee.contracts.views import HiveView
from rbee.keeper.recommending import BITS_PER_WEIGHT, PROMPT, SIZE_CLASSES, ModelFit, Recommendation, recommend
from tests.unit.keeper.small_queen import HIVE

GB = 10**9
SETTINGS = SettingsInForce(
    model="smollm2:135m", slots=4, context_tokens=4096, keep_alive_s=300.0, table=ModelTable()
)


def device(free: int, name: str = "cpu", **more: Any) -> DeviceInfo:
    return DeviceInfo(device=name, name=name, memory_bytes=free, memory_free_bytes=free, **more)


def model(name: str, weights: int, purpose: Any = "generate", cache: int = 0) -> ModelInfo:
    memory = ModelMemory(weights_bytes=weights, cache_bytes_per_token=cache, work_bytes=0)
    return ModelInfo(model=name, size_bytes=weights, path=f"/{name}", purpose=purpose, memory=memory)


def hive(*devices: DeviceInfo, models: tuple[ModelInfo, ...] = (), **more: Any) -> HiveView:
    view = msgspec.convert(HIVE, type=HiveView)
    return msgspec.structs.replace(view, devices=list(devices), models=list(models), **more)


def fit_of(found: Recommendation, name: str) -> ModelFit:
    [fit] = [fit for fit in found.devices[0].models if fit.model == name]
    return fit


def test_largest_model_on_a_disk_that_fits_and_writes_is_the_one_to_try() -> None:
    models = (
        model("small", GB),
        model("large", 3 * GB),
        model("huge", 9 * GB),
        model("numbers", 4 * GB, "embed"),
    )
    found = recommend([hive(device(5 * GB), models=models)], SETTINGS)
    assert found.command == f'rbee infer -m large "{PROMPT}"'
    assert [fit_of(found, name).fits for name in ("small", "large", "huge", "numbers")] == [
        True,
        True,
        False,
        True,
    ]


def test_known_model_is_to_be_pulled_where_none_on_a_disk_fits() -> None:
    found = recommend([hive(device(GB), models=(model("huge", 9 * GB),))], SETTINGS)
    assert found.command == "rbee models pull smollm2:135m --hive hive-1"


@pytest.mark.parametrize("hives", [[], [hive(device(9 * GB), state=HiveState.LOST)], [hive(device(1))]])
def test_nothing_is_recommended_where_nothing_fits_or_no_hive_is_live(hives: list[HiveView]) -> None:
    assert recommend(hives, SETTINGS).command is None


def test_slots_and_context_in_force_for_a_model_decide() -> None:
    """Half a kilobyte a token, 2 slots of 1000 tokens."""
    own = {"mine": ModelSettings(slots=2, context_tokens=1000)}
    settings = msgspec.structs.replace(SETTINGS, table=ModelTable(models=own))
    found = recommend([hive(device(GB), models=(model("mine", 100, cache=512),))], settings)
    fit = fit_of(found, "mine")
    assert (fit.slots, fit.context_tokens, fit.needed_bytes) == (2, 1000, 100 + 512 * 2000)


def test_model_that_is_loaded_fits_however_little_is_free() -> None:
    worker = {
        "worker_id": "worker-1",
        "hive_id": "hive-1",
        "model": "mine",
        "state": "ready",
        "purpose": "generate",
    }
    busy = msgspec.convert({**HIVE, "workers": [{**worker, "slots": 4, "slots_used": 0, "pid": 1}]}, type=HiveView)
    busy = msgspec.structs.replace(busy, devices=[device(1)], models=[model("mine", GB)])
    fit = fit_of(recommend([busy], SETTINGS), "mine")
    assert (fit.is_loaded, fit.fits) == (True, True)


def test_model_whose_header_was_not_read_yet_may_or_may_not_fit() -> None:
    unread = msgspec.structs.replace(model("mine", GB), memory=None, purpose=None)
    fit = fit_of(recommend([hive(device(9 * GB), models=(unread,))], SETTINGS), "mine")
    assert (fit.needed_bytes, fit.fits) == (None, None)


def test_nothing_fits_a_device_that_cannot_be_used() -> None:
    broken = device(80 * GB, "cuda:0", is_usable=False, note="install a build for it")
    found = recommend([hive(broken, models=(model("mine", GB),))], SETTINGS)
    assert fit_of(found, "mine").fits is False
    assert {fit.quantization for fit in found.devices[0].classes} == {None}


@given(st.integers(0, 200 * GB), st.integers(1, 16), st.integers(16, 100_000))
def test_best_quantization_that_fits_is_named_and_more_memory_never_names_a_worse_one(
    free: int, slots: int, context_tokens: int
) -> None:
    settings = msgspec.structs.replace(SETTINGS, slots=slots, context_tokens=context_tokens)
    less, more = (recommend([hive(device(size))], settings).devices[0].classes for size in (free, 2 * free + 1))
    order = [*BITS_PER_WEIGHT, None]
    for size_class, fit, roomy in zip(SIZE_CLASSES, less, more, strict=True):
        assert order.index(roomy.quantization) <= order.index(fit.quantization)
        for quantization, bits in BITS_PER_WEIGHT.items():
            fits = size_class.memory(bits).needed_bytes(context_tokens, slots) <= free
            assert fits == (order.index(quantization) >= order.index(fit.quantization))


def test_known_models_say_what_they_take() -> None:
    """Their weights are their file."""
    assert all(known.memory.weights_bytes == known.size_bytes for known in KNOWN_MODELS.values())
