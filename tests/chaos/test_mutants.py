"""The remedies that can be taken out still stand where they are looked for."""

from __future__ import annotations

import pytest

from tests.chaos.mutants import MUTANTS, ROOT, Mutant


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_remedy_stands_once_in_its_file(mutant: Mutant) -> None:
    assert (ROOT / "src" / "rbee" / mutant.file).read_text("utf-8").count(mutant.text) == 1
