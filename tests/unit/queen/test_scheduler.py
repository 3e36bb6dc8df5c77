from __future__ import annotations

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from rbee.queen.scheduler import (
    HiveSpot,
    Refuse,
    Start,
    Use,
    Wait,
    WorkerSpot,
    can_take,
    memory_needed_bytes,
    place,
)

GIB = 2**30
MODEL = "m"


def worker(
    worker_id: str = "w", *, model: str = MODEL, ready: bool = True, slots: int = 2, used: int = 0
) -> WorkerSpot:
    return WorkerSpot(worker_id=worker_id, model=model, is_ready=ready, slots=slots, slots_used=used)


def hive(
    hive_id: str = "h",
    *workers: WorkerSpot,
    live: bool = True,
    silent_s: float = 0.0,
    free: int = 8 * GIB,
    sizes: dict[str, int] | None = None,
    starting: frozenset[str] = frozenset(),
    refused: frozenset[str] = frozenset(),
) -> HiveSpot:
    return HiveSpot(
        hive_id=hive_id,
        is_live=live,
        silent_s=silent_s,
        memory_free_bytes=free,
        model_sizes=sizes if sizes is not None else {MODEL: GIB},
        starting=starting,
        workers=workers,
        refused=refused,
    )


MODELS = st.sampled_from(["m", "n"])


@st.composite
def inventories(draw: st.DrawFn) -> tuple[HiveSpot, ...]:
    numbers = iter(range(100))

    def some_worker() -> WorkerSpot:
        slots = draw(st.integers(1, 4))
        return worker(
            f"w{next(numbers)}",
            model=draw(MODELS),
            ready=draw(st.booleans()),
            slots=slots,
            used=draw(st.integers(0, slots)),
        )

    return tuple(
        hive(
            f"h{index}",
            *[some_worker() for _ in range(draw(st.integers(0, 3)))],
            live=draw(st.booleans()),
            silent_s=draw(st.floats(0, 100)),
            free=draw(st.integers(0, 4 * GIB)),
            sizes=draw(st.dictionaries(MODELS, st.integers(0, 3 * GIB), max_size=2)),
            starting=draw(st.frozensets(MODELS, max_size=2)),
            refused=draw(st.frozensets(MODELS, max_size=2)),
        )
        for index in range(draw(st.integers(0, 3)))
    )


@given(inventories(), MODELS)
def test_place_chooses_only_live_hives_and_gives_a_reason(hives: tuple[HiveSpot, ...], model: str) -> None:
    decision = place(model, hives)

    assert isinstance(decision, Refuse) or decision.why
    if not isinstance(decision, Wait):
        assert decision.hive_id in {spot.hive_id for spot in hives if spot.is_live}


@given(inventories(), MODELS)
def test_place_takes_a_free_slot_of_a_ready_worker_exactly_when_there_is_one(
    hives: tuple[HiveSpot, ...], model: str
) -> None:
    free = {
        found.worker_id: found
        for spot in hives
        for found in spot.workers
        if spot.is_live and found.model == model and found.is_ready and found.slots_used < found.slots
    }

    decision = place(model, hives)

    assert isinstance(decision, Use) == bool(free)
    if isinstance(decision, Use):
        fewest = min(found.slots_used for found in free.values())
        assert free[decision.worker_id].slots_used == fewest


@given(inventories(), MODELS)
def test_place_starts_only_what_fits_and_is_not_there_yet(hives: tuple[HiveSpot, ...], model: str) -> None:
    decision = place(model, hives)

    if isinstance(decision, Start):
        live = [spot for spot in hives if spot.is_live]
        chosen = next(spot for spot in live if spot.hive_id == decision.hive_id)
        assert all(found.model != model for spot in live for found in spot.workers)
        assert all(model not in spot.starting for spot in live)
        size = chosen.model_sizes.get(model)
        assert size is None or memory_needed_bytes(size) <= chosen.memory_free_bytes


@given(inventories(), MODELS, st.integers(1, 30))
def test_place_again_and_again_never_gives_more_than_the_slots(
    hives: tuple[HiveSpot, ...], model: str, jobs: int
) -> None:
    for _ in range(jobs):
        decision = place(model, hives)
        if isinstance(decision, Use):
            hives = tuple(_with_slot_taken(spot, decision.worker_id) for spot in hives)

    assert all(found.slots_used <= found.slots for spot in hives for found in spot.workers)


def _with_slot_taken(spot: HiveSpot, worker_id: str) -> HiveSpot:
    workers = tuple(
        msgspec.structs.replace(found, slots_used=found.slots_used + (found.worker_id == worker_id))
        for found in spot.workers
    )
    return msgspec.structs.replace(spot, workers=workers)


@given(inventories(), MODELS)
def test_place_with_a_named_hive_never_chooses_another(hives: tuple[HiveSpot, ...], model: str) -> None:
    decision = place(model, hives, hive_id="h1")

    if not isinstance(decision, Wait):
        assert decision.hive_id == "h1"


def test_no_hive_is_said_to_be_none() -> None:
    assert place(MODEL, ()) == Wait("no hive has registered with this queen", needs_hive=True)


def test_stale_hive_is_waited_for_with_its_silence() -> None:
    decision = place(MODEL, (hive("h1", worker(), live=False, silent_s=4.2),))

    assert decision == Wait("h1 has been silent for 4 s", needs_hive=True)


def test_emptiest_worker_is_taken_first() -> None:
    decision = place(MODEL, (hive("h", worker("a", used=1), worker("b", used=0)),))

    assert decision == Use("h", "b", "b has m loaded and 2 of 2 slots free")


def test_full_worker_is_waited_for_even_where_another_hive_has_room() -> None:
    decision = place(MODEL, (hive("h1", worker("a", slots=1, used=1)), hive("h2")))

    assert decision == Wait("the one slot of a is taken")


def test_loading_worker_is_waited_for() -> None:
    assert place(MODEL, (hive("h", worker("a", ready=False)),)) == Wait("a is loading m")


def test_worker_that_is_being_started_is_waited_for() -> None:
    decision = place(MODEL, (hive("h", starting=frozenset({MODEL})),))

    assert decision == Wait("a worker for m is being started")


def test_hive_that_has_the_file_comes_before_one_with_more_memory() -> None:
    decision = place(MODEL, (hive("has", free=2 * GIB), hive("more", free=64 * GIB, sizes={})))

    assert isinstance(decision, Start)
    assert decision.hive_id == "has"


def test_memory_that_another_start_will_take_is_not_given_twice() -> None:
    needed = memory_needed_bytes(GIB)
    both = {MODEL: GIB, "n": GIB}

    alone = place(MODEL, (hive("h", free=2 * needed, sizes=both, starting=frozenset({"n"})),))
    too_much = place(MODEL, (hive("h", free=2 * needed - 1, sizes=both, starting=frozenset({"n"})),))

    assert isinstance(alone, Start)
    assert too_much == Wait("h has 1484 MiB of memory free, and m needs 1484 MiB")


def test_model_that_fits_nowhere_says_why_hive_by_hive() -> None:
    hives = (hive("h1", free=GIB), hive("h2", free=2 * GIB, sizes={MODEL: 4 * GIB}))

    assert place(MODEL, hives) == Wait(
        "h1 has 1024 MiB of memory free, and m needs 1484 MiB; "
        "h2 has 2048 MiB of memory free, and m needs 5171 MiB",
        needs_hive=True,
    )


def test_model_that_fits_once_another_worker_goes_is_waited_for_without_end() -> None:
    decision = place(MODEL, (hive("h", worker("a", model="n"), free=GIB),))

    assert isinstance(decision, Wait)
    assert not decision.needs_hive


def test_place_starts_on_another_hive_what_one_refuses() -> None:
    refusing = hive("h", refused=frozenset({MODEL}))

    decision = place(MODEL, (refusing, hive("i", free=2 * GIB)))

    assert isinstance(decision, Start)
    assert decision.hive_id == "i"


def test_place_refuses_what_every_hive_refuses() -> None:
    assert place(MODEL, (hive("h", refused=frozenset({MODEL})),)) == Refuse("h")


def test_place_uses_a_ready_worker_of_a_model_that_is_not_started_again() -> None:
    assert isinstance(place(MODEL, (hive("h", worker(), refused=frozenset({MODEL})),)), Use)


def test_job_can_go_only_where_another_hive_takes_it() -> None:
    alone = (hive("h", worker()),)

    assert not can_take(MODEL, alone, without="h")
    assert not can_take(MODEL, (*alone, hive("i", live=False)), without="h")
    assert can_take(MODEL, (*alone, hive("i")), without="h")
    assert can_take(MODEL, (*alone, hive("i", worker(used=2))), without="h")
