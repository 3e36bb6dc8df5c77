"""Model references: the forms that some source takes, and a hint for the others."""

from __future__ import annotations

import pytest

from rbee.contracts.models import DEFAULT_MODEL, KNOWN_MODELS, ModelRef, parse_model_ref
from rbee.errors import ModelNotFoundError


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (DEFAULT_MODEL, ModelRef(text=DEFAULT_MODEL, source="known")),
        ("hf:org/repo", ModelRef(text="hf:org/repo", source="hub", repo="org/repo")),
        ("hf:org/repo:Q4_K_M", ModelRef(text="hf:org/repo:Q4_K_M", source="hub", repo="org/repo", quant="Q4_K_M")),
        ("hf:o.g/r-_1/d/m", ModelRef(text="hf:o.g/r-_1/d/m", source="hub", repo="o.g/r-_1", quant="d/m")),
        ("/m/a b.gguf", ModelRef(text="/m/a b.gguf", source="file", path="/m/a b.gguf")),
    ],
)
def test_reference_of_a_form_some_source_takes_is_read(text: str, expected: ModelRef) -> None:
    assert parse_model_ref(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        *(
            "",
            "nope",
            "hf:",
            "hf:org",
            "hf:org/",
            "hf:../x",
            "hf:org/repo/../../x",
            "hf:org/repo:",
            "hf:org/repo\n",
        ),
        *("HF:org/repo", "model.gguf", "../m.gguf", "/m\x00.gguf", "/m\n.gguf", "https://host/m.gguf"),
    ],
)
def test_reference_of_no_known_form_is_not_found(text: str) -> None:
    with pytest.raises(ModelNotFoundError) as caught:
        parse_model_ref(text)
    assert caught.value.param == "model"
    assert caught.value.status == 404


def test_misspelt_reference_names_the_nearest() -> None:
    with pytest.raises(ModelNotFoundError, match=r"`smollm2:135` \(did you mean `smollm2:135m`\?\)"):
        parse_model_ref("smollm2:135")


def test_known_models_carry_a_whole_checksum() -> None:
    assert all(len(model.sha256) == 64 and model.size_bytes > 0 for model in KNOWN_MODELS.values())
