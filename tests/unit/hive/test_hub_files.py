"""Which file of a repository a reference means."""

from __future__ import annotations

import pytest

from rbee.errors import InvalidRequestError, ModelNotFoundError
from rbee.hive.sources.hub_files import HubFile, choose_file


def chosen(names: list[str], wanted: str | None = None) -> str:
    return choose_file("org/repo", [HubFile(name=name) for name in names], wanted).name


USUAL = ["README.md", "m-Q8_0.gguf", "m-Q4_0.gguf", "m-Q4_K_M.gguf", "m-Q4_K_S.gguf", "mmproj-m-Q4_K_M.gguf"]


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (USUAL, "m-Q4_K_M.gguf"),
        (["m-Q8_0.gguf", "m-Q4_1.gguf", "m-Q4_0.gguf"], "m-Q4_0.gguf"),
        (["m-Q8_0.gguf", "m-Q4_1.gguf"], "m-Q4_1.gguf"),
        (["m-Q8_0.gguf", "m-Q2_K.gguf"], "m-Q8_0.gguf"),
        (["m-BF16.gguf"], "m-BF16.gguf"),
        (["m-BF16.gguf", "mmproj-m.gguf"], "m-BF16.gguf"),
        (["Q4_K_M/m-Q4_K_M-00001-of-00002.gguf", "m-Q8_0.gguf"], "m-Q8_0.gguf"),
        (["m-Q4_K_M-00001-of-00001.gguf"], "m-Q4_K_M-00001-of-00001.gguf"),
    ],
)
def test_no_wish_takes_the_usual_file(names: list[str], expected: str) -> None:
    assert chosen(names) == expected


@pytest.mark.parametrize(
    ("names", "wanted", "expected"),
    [
        (USUAL, "Q4_K_M", "m-Q4_K_M.gguf"),
        (USUAL, "q4_k_m", "m-Q4_K_M.gguf"),
        (["m.q4_k_m.gguf"], "Q4_K_M", "m.q4_k_m.gguf"),
        (["m_Q4_0.gguf", "m_Q4_0_4_4.gguf"], "Q4_0", "m_Q4_0.gguf"),
        (["m-IQ4_XS.gguf", "m-Q4_K_M-imat.gguf"], "Q4_K_M", "m-Q4_K_M-imat.gguf"),
        (USUAL, "m-Q8_0.gguf", "m-Q8_0.gguf"),
        (["sub/m-Q8_0.gguf"], "m-q8_0.gguf", "sub/m-Q8_0.gguf"),
        (["sub/m.gguf", "m.gguf"], "sub/m.gguf", "sub/m.gguf"),
        (USUAL, "mmproj-m-Q4_K_M.gguf", "mmproj-m-Q4_K_M.gguf"),
    ],
)
def test_wish_takes_what_it_names(names: list[str], wanted: str, expected: str) -> None:
    assert chosen(names, wanted) == expected


@pytest.mark.parametrize("wanted", ["Q4_K", "Q6_K", "other.gguf"])
def test_wish_that_fits_nothing_lists_what_there_is(wanted: str) -> None:
    with pytest.raises(ModelNotFoundError, match=r"It has m-Q8_0.gguf, m-Q4_0.gguf, m-Q4_K_M.gguf"):
        chosen(USUAL, wanted)


def test_list_in_an_error_has_ten_names_and_counts_the_rest() -> None:
    with pytest.raises(ModelNotFoundError) as refused:
        chosen([f"m-{number}.gguf" for number in range(13)], "Q4_0")
    assert refused.value.message.count(".gguf") == 10
    assert refused.value.message.endswith("and 3 more.")


def test_repository_without_model_files_is_not_found() -> None:
    with pytest.raises(ModelNotFoundError, match=r"has no \.gguf file"):
        chosen(["model.safetensors", "README.md"])


def test_several_unusual_files_ask_for_a_name() -> None:
    with pytest.raises(InvalidRequestError, match=r"Several files of org/repo fit. It has a-Q2_K.gguf, a-Q3_K_S"):
        chosen(["a-Q2_K.gguf", "a-Q3_K_S.gguf"])


@pytest.mark.parametrize("wanted", [None, "Q4_K_M", "m-Q4_K_M-00001-of-00002.gguf"])
def test_model_in_parts_is_refused_as_not_supported(wanted: str | None) -> None:
    parts = ["m-Q4_K_M-00001-of-00002.gguf", "m-Q4_K_M-00002-of-00002.gguf"]
    with pytest.raises(InvalidRequestError, match="split into parts, which is not supported"):
        chosen(parts, wanted)
