"""Models laid out in rows: what is on disk, what is on its way, what cannot be loaded."""

from __future__ import annotations

import msgspec

from rbee.contracts.heartbeats import DownloadInfo, ModelInfo, ModelMemory, UnusableModel
from rbee.contracts.model_settings import ModelSettings, ModelTable, SettingsInForce
from rbee.contracts.views import HiveView
from rbee.keeper.model_tables import faults, model_fields, models_table, share, shown_model
from tests.unit.keeper.small_queen import HIVE

MODEL = ModelInfo(
    model="hf:org/repo",
    size_bytes=2_000_000,
    path="/m/x.gguf",
    sha256="0123456789abcdef",
    architecture="llama",
    quantization="Q4_K_M",
    context_tokens=8192,
    has_chat_template=True,
    purpose="generate",
    memory=ModelMemory(weights_bytes=2_000_000, cache_bytes_per_token=1000, work_bytes=0),
)
FETCHED = DownloadInfo(model="hf:org/other", done_bytes=31, total_bytes=100)
BROKEN = UnusableModel(model="hf:org/broken", size_bytes=5, path="/m/y.gguf", fault="it is cut short")
SETTINGS = SettingsInForce(
    model="smollm2:135m",
    slots=4,
    context_tokens=4096,
    keep_alive_s=300.0,
    table=ModelTable(aliases={"mine": "hf:org/repo"}, models={"hf:org/repo": ModelSettings(slots=1)}),
)
WHOLE = msgspec.structs.replace(
    msgspec.convert(HIVE, type=HiveView), models=[MODEL], downloads=[FETCHED], unusable_models=[BROKEN]
)


OTHER = msgspec.structs.replace(msgspec.convert(HIVE, type=HiveView), hive_id="hive-2", models=[])


def test_every_model_of_a_hive_is_a_row_with_its_state() -> None:
    columns, rows = models_table([WHOLE, OTHER])
    nothing = dict.fromkeys(columns)
    assert [dict(zip(columns, row, strict=True)) for row in rows] == [
        {
            "model": "hf:org/repo",
            "state": "on disk",
            "size": "2.0 MB",
            "quant": "Q4_K_M",
            "context": 8192,
            "purpose": "generate",
            "template": "yes",
            "digest": "01234567",
            "hive": "hive-1",
        },
        nothing | {"model": "hf:org/other", "state": "fetching 31 %", "size": "31 B", "hive": "hive-1"},
        nothing | {"model": "hf:org/broken", "state": "unusable", "size": "5 B", "hive": "hive-1"},
    ]
    assert faults([WHOLE, OTHER]) == ["hf:org/broken on hive-1 (/m/y.gguf): it is cut short."]


def test_one_hive_alone_is_not_named_in_every_row() -> None:
    several, one = models_table([WHOLE, OTHER]), models_table([WHOLE])
    assert one == (several[0][:-1], [row[:-1] for row in several[1]])


def test_share_of_a_download_of_unknown_size_is_its_bytes() -> None:
    assert share(msgspec.structs.replace(FETCHED, total_bytes=None)) == "31 B"


def test_model_is_shown_by_its_alias_with_copies_settings_and_the_memory_for_them() -> None:
    shown = shown_model("mine", [WHOLE, msgspec.structs.replace(WHOLE, hive_id="hive-2")], SETTINGS)
    assert (shown.model, shown.aliases, shown.settings.slots) == ("hf:org/repo", ["mine"], 1)
    assert [(copy.hive_id, copy.needed_bytes) for copy in shown.copies] == [
        ("hive-1", 2_000_000 + 1000 * 4096),
        ("hive-2", 2_000_000 + 1000 * 4096),
    ]
    assert ("  memory in all, 1 slots of 4096 tokens", "6.1 MB") in model_fields(shown)


def test_model_on_its_way_and_broken_one_are_shown() -> None:
    fetched, broken = (shown_model(name, [WHOLE], SETTINGS) for name in ("hf:org/other", "hf:org/broken"))
    assert ("fetching", "31 % on hive-1") in model_fields(fetched)
    assert ("unusable", "on hive-1, /m/y.gguf: it is cut short") in model_fields(broken)


def test_known_model_that_is_nowhere_says_how_to_get_it() -> None:
    shown = shown_model("smollm2:135m", [], SETTINGS)
    assert ("size", "98.4 MB, on no hive yet (rbee models pull smollm2:135m)") in model_fields(shown)
