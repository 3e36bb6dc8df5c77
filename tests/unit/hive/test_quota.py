"""Which models make room: the least recently used, no more than needed, and none where it would not help."""

from __future__ import annotations

from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from rbee.hive.catalog import LocalModel
from rbee.hive.quota import models_to_evict


def model(name: str, size_bytes: int, used_at: float) -> LocalModel:
    return LocalModel(ref=name, path=Path(name), size_bytes=size_bytes, sha256=None, used_at=used_at)


models = st.lists(
    st.tuples(st.integers(0, 20), st.integers(1, 100), st.floats(0, 1000)), max_size=8, unique_by=lambda m: m[0]
).map(lambda found: [model(str(name), size, used) for name, size, used in found])


def test_least_recently_used_goes_first_and_no_more_than_needed() -> None:
    found = [model("new", 10, 3.0), model("old", 10, 1.0), model("middle", 10, 2.0)]
    assert [chosen.ref for chosen in models_to_evict(found, set(), 11)] == ["old", "middle"]


def test_nothing_goes_where_all_together_would_not_be_enough() -> None:
    assert models_to_evict([model("a", 10, 1.0), model("b", 10, 2.0)], {"b"}, 11) == []


@given(models, st.sets(st.integers(0, 20).map(str)), st.integers(-10, 500))
def test_what_goes_is_enough_is_not_spared_and_none_of_it_could_stay(
    found: list[LocalModel], spared: set[str], excess: int
) -> None:
    chosen = models_to_evict(found, spared, excess)
    freed = sum(one.size_bytes for one in chosen)
    evictable = sum(one.size_bytes for one in found if one.ref not in spared)
    assert bool(chosen) == (0 < excess <= evictable)
    assert not {one.ref for one in chosen} & spared
    if chosen:
        assert freed - chosen[-1].size_bytes < excess <= freed
