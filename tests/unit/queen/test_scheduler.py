from __future__ import annotations

from typing import Any

import pytest

from rbee.contracts.heartbeats import ModelInfo
from rbee.queen.decisions import Claim, Closed, Decision, Refuse, Start, Use, Wait, Wanted
from rbee.queen.fit import by_size
from rbee.queen.inventory import ANY_ENGINE, GRACE_S, HiveSpot, Kind, WorkerSpot
from rbee.queen.scheduler import ADD_AFTER_S, CLAIM_AFTER_S, can_take, place
from tests.unit.queen.fleet_stage import (
    GIB,
    MIB,
    MODEL,
    NOW,
    fleet,
    gpu,
    hive,
    kind,
    model_info,
    start,
    wanted,
    worker,
)

NEEDED = by_size(GIB)
SECOND = model_info("n")


def placed(*hives: HiveSpot, want: Wanted | None = None, waited_s: float = 0.0, **values: object) -> Decision:
    return place(want or wanted(), fleet(*hives), NOW, waited_s=waited_s, **values)  # type: ignore[arg-type]


def started(decision: Decision) -> Start:
    assert isinstance(decision, Start), decision
    return decision


def waited(decision: Decision) -> Wait:
    assert isinstance(decision, Wait), decision
    return decision


# Reuse


def test_emptiest_worker_is_taken_first() -> None:
    decision = placed(hive("h", worker("a", used=1), worker("b", used=0)))

    assert decision == Use("h", "b", "b has m loaded and 2 of 2 slots free")


@pytest.mark.parametrize("other", [kind(purpose="embed"), kind(engine="vllm"), kind("n")])
def test_worker_of_another_model_purpose_or_engine_is_not_used(other: object) -> None:
    different = worker("a")
    different = type(different)(
        **{**{f: getattr(different, f) for f in different.__struct_fields__}, "kind": other}
    )

    assert isinstance(placed(hive("h", different)), Start)


def test_worker_of_any_engine_is_used_where_the_models_settings_name_none() -> None:
    """One that somebody started on an engine of the configuration is of use to whoever asks for its model."""
    other = worker("a", engine="vllm")

    assert isinstance(placed(hive("h", other), want=wanted(is_any_engine=True)), Use)
    assert isinstance(placed(hive("h", other), want=wanted()), Start)


def test_worker_that_is_being_stopped_is_not_used() -> None:
    assert isinstance(placed(hive("h", worker("a", is_draining=True))), Start)


def test_worker_of_a_silent_hive_is_not_used() -> None:
    decision = placed(hive("h1", worker("a"), live=False), hive("h2", worker("b", used=1)))

    assert isinstance(decision, Use)
    assert decision.worker_id == "b"


def test_named_hive_is_the_only_one() -> None:
    hives = (hive("h1", worker("a")), hive("h2"))

    assert started(placed(*hives, want=wanted(hive_id="h2"))).hive_id == "h2"
    assert waited(placed(*hives, want=wanted(hive_id="h3"))).why == "no hive has registered with this queen"


# Waiting for one that is there


def test_loading_worker_is_waited_for() -> None:
    assert placed(hive("h", worker("a", ready=False))) == Wait("a is loading m")


def test_worker_that_is_being_started_is_waited_for() -> None:
    assert placed(hive("h", starts=(start(),))) == Wait("a worker for m is being started")


def test_full_worker_is_waited_for_at_first() -> None:
    hives = (hive("h1", worker("a", slots=1, used=1)), hive("h2"))

    assert placed(*hives, waited_s=ADD_AFTER_S - 0.1) == Wait("the one slot of a is taken")


# A second worker


def test_second_worker_is_started_on_another_hive_once_a_job_has_waited_for_a_slot() -> None:
    decision = started(placed(hive("h1", worker("a", used=2)), hive("h2"), waited_s=ADD_AFTER_S))

    assert (decision.hive_id, decision.is_additional) == ("h2", True)
    assert decision.why == "all 2 slots of a are taken, and h2 has the memory for it"


def test_one_processor_has_one_worker_of_a_model_unless_more_are_configured() -> None:
    alone = hive("h1", worker("a", used=2))

    assert placed(alone, waited_s=60) == Wait("all 2 slots of a are taken")
    assert started(placed(alone, waited_s=60, want=wanted(workers_max=2))).hive_id == "h1"


def test_no_more_workers_are_started_than_are_configured() -> None:
    hives = (hive("h1", worker("a", used=2)), hive("h2", worker("b", used=2)), hive("h3"))

    decision = placed(*hives, waited_s=60, want=wanted(workers_max=2))

    assert decision == Wait("all slots of the 2 workers of m are taken")


def test_gpu_has_as_many_workers_as_there_is_room_for() -> None:
    full = worker("a", used=2, device="cuda:0")

    assert started(placed(hive("h", full, gpus=(gpu(),)), waited_s=60)).device == "cuda:0"


def test_nothing_is_stopped_for_a_second_worker() -> None:
    other = hive("h2", worker("idle", model="n", taken=8 * GIB), free=0)

    assert placed(hive("h1", worker("a", used=2)), other, waited_s=60) == Wait("all 2 slots of a are taken")


# Starting


def test_hive_that_has_the_file_comes_before_one_with_more_memory() -> None:
    decision = placed(hive("has", free=2 * GIB), hive("more", free=64 * GIB, models=()))

    assert started(decision).hive_id == "has"


def test_gpu_comes_before_a_processor_with_more_memory() -> None:
    decision = started(placed(hive("cpu", free=64 * GIB), hive("gpu", gpus=(gpu(free=2 * GIB),))))

    assert (decision.hive_id, decision.device, decision.room) == ("gpu", "cuda:0", "cuda:0")
    assert decision.why == "no worker has m loaded, and gpu has the memory for it on cuda:0"


def test_processor_is_named_only_where_there_is_a_choice() -> None:
    small = gpu(free=MIB, total=MIB)

    assert started(placed(hive("h"))).device is None
    assert started(placed(hive("h", gpus=(small,)))).device == "cpu"


def test_gpu_that_cannot_be_used_is_left_out() -> None:
    broken = gpu(is_usable=False, note="The engine has no CUDA.")
    want = wanted(device="cuda:0")

    assert started(placed(hive("h", gpus=(broken,)))).room == "cpu"
    assert waited(placed(hive("h", gpus=(broken,)), want=want)) == Wait(
        "h cannot use cuda:0: The engine has no CUDA", needs_hive=True
    )


def test_wished_device_is_the_only_one() -> None:
    two = hive("h", gpus=(gpu("cuda:0"), gpu("cuda:1", free=2 * GIB)))

    assert started(placed(two, want=wanted(device="cuda:1"))).device == "cuda:1"
    assert started(placed(two, want=wanted(device="cpu"))).device == "cpu"
    assert waited(placed(two, want=wanted(device="cuda:2"))) == Wait("h has no device cuda:2", needs_hive=True)


def test_hive_without_the_engine_is_left_out() -> None:
    want = Wanted(kind(engine="vllm"))

    assert placed(hive("h1"), want=want) == Wait("h1 does not have the engine vllm", needs_hive=True)
    assert started(placed(hive("h1"), hive("h2", engines=("vllm",)), want=want)).hive_id == "h2"


# Memory


def test_memory_is_asked_of_the_header_with_slots_and_context() -> None:
    known = model_info(size=GIB, slot=256 * MIB)

    enough = started(placed(hive("h", free=2 * GIB, models=(known,))))
    doubled = started(placed(hive("h", free=3 * GIB, models=(known,)), want=wanted(context_tokens=8192)))

    assert (enough.slots, enough.memory_bytes) == (4, 2 * GIB)
    assert (doubled.slots, doubled.memory_bytes) == (4, 3 * GIB)


def test_fewer_slots_are_started_where_all_do_not_fit_and_the_reason_says_so() -> None:
    known = model_info(size=GIB, slot=256 * MIB)

    decision = started(placed(hive("h", free=2 * GIB - 1, models=(known,))))

    assert (decision.slots, decision.memory_bytes) == (3, GIB + 3 * 256 * MIB)
    assert decision.why == (
        "no worker has m loaded, and h has the memory for it, for 3 of the 4 slots that are wanted"
    )


def test_room_for_all_slots_comes_before_a_hive_that_has_the_file_and_less_room() -> None:
    known = model_info(size=GIB, slot=256 * MIB)

    decision = started(placed(hive("h1", free=2 * GIB - 1, models=(known,)), hive("h2", free=2 * GIB, models=())))

    assert (decision.hive_id, decision.slots) == ("h2", 4)


def test_not_even_one_slot_is_said_with_both_numbers() -> None:
    known = model_info(size=GIB, slot=256 * MIB)

    assert placed(hive("h", free=GIB, models=(known,))) == Wait(
        "h has 1024 MiB of memory free, and m needs 1280 MiB even for one slot", needs_hive=True
    )


def test_slots_that_somebody_asked_for_are_not_made_fewer() -> None:
    known = model_info(size=GIB, slot=256 * MIB)

    assert isinstance(placed(hive("h", free=2 * GIB - 1, models=(known,)), want=wanted(slots_min=4)), Wait)


def test_context_is_no_longer_than_the_model_was_made_for() -> None:
    known = model_info(slot=256 * MIB, context_tokens=2048)

    decision = started(placed(hive("h", models=(known,)), want=wanted(context_tokens=100_000)))

    assert (decision.context_tokens, decision.memory_bytes) == (2048, GIB + 4 * 128 * MIB)
    assert decision.why.endswith(", with 2048 tokens of context, as many as it was made for")


def test_what_another_hive_knows_of_the_model_counts_where_the_file_is_not() -> None:
    known = hive("h1", models=(model_info(size=3 * GIB, slot=0),), free=0)

    assert isinstance(placed(known, hive("h2", free=3 * GIB - 1, models=())), Wait)
    assert started(placed(known, hive("h2", free=3 * GIB, models=()))).hive_id == "h2"


@pytest.mark.parametrize(
    ("model", "needed"), [("smollm2:135m", by_size(98_362_432)), ("hf:some/model", by_size(0))]
)
def test_model_that_is_nowhere_is_as_large_as_its_release_or_taken_on_trust(model: str, needed: int) -> None:
    assert isinstance(placed(hive("h", free=needed - 1, models=()), want=wanted(model)), Wait)
    assert started(placed(hive("h", free=needed, models=()), want=wanted(model))).memory_bytes == needed


def test_memory_that_another_start_will_take_is_not_given_twice() -> None:
    other = (start(model="n", taken=NEEDED),)

    alone = placed(hive("h", free=2 * NEEDED, starts=other))
    too_much = placed(hive("h", free=2 * NEEDED - 1, starts=other))

    assert isinstance(alone, Start)
    assert too_much == Wait("h has 1484 MiB of memory free, and m needs 1484 MiB (workers there: 1 starting)")


def test_what_workers_have_mapped_is_not_free_though_the_machine_says_so() -> None:
    busy = worker("a", model="n", used=1, taken=7 * GIB)

    decision = waited(placed(hive("h", busy, free=8 * GIB, total=8 * GIB)))

    assert decision.why == ("h has 1024 MiB of memory free, and m needs 1484 MiB (workers there: 1 answering)")


def test_model_that_fits_nowhere_says_why_hive_by_hive() -> None:
    assert placed(hive("h1", free=GIB), hive("h2", free=GIB + 1, live=False, silent_s=4.2)) == Wait(
        "h1 has 1024 MiB of memory free, and m needs 1484 MiB; h2 has been silent for 4 s", needs_hive=True
    )


def test_reasons_of_very_many_hives_are_shortened() -> None:
    decision = waited(placed(*(hive(f"h{number}", free=0) for number in range(20))))

    assert decision.why.endswith("; and 12 more hives cannot either")


def test_model_that_would_never_fit_does_not_wait_for_workers_to_end() -> None:
    small = hive("h", worker("a", model="n", used=1, taken=GIB), free=0, models=(model_info(size=4 * GIB),))

    assert waited(placed(small)).needs_hive


def test_hive_with_as_many_workers_as_it_may_have_is_waited_for() -> None:
    busy = hive("h", worker("a", model="n", used=1), workers_max=1)

    assert placed(busy) == Wait("h runs 1 worker, as many as it may (workers there: 1 answering)")


# Evicting


def test_idle_worker_is_stopped_where_its_memory_is_needed() -> None:
    idle = worker("a", model="n", taken=GIB, idle_s=12)

    decision = started(placed(hive("h", idle, free=GIB)))

    assert [one.worker_id for one in decision.evict] == ["a"]
    assert decision.why == (
        "no worker has m loaded, and h makes room for it by stopping a (model n, idle for 12 s)"
    )


def test_idle_worker_is_stopped_where_its_hive_may_have_no_more() -> None:
    decision = started(placed(hive("h", worker("a", model="n"), workers_max=1)))

    assert [one.worker_id for one in decision.evict] == ["a"]


def test_fewest_workers_are_stopped_and_of_those_the_least_recently_used() -> None:
    workers = [
        worker("small", model="n", taken=100 * MIB, idle_s=900),
        worker("old", model="o", taken=GIB, idle_s=500),
        worker("older", model="p", taken=GIB, idle_s=700),
        worker("young", model="q", taken=GIB, idle_s=100),
    ]

    assert [one.worker_id for one in started(placed(hive("h", *workers, free=GIB))).evict] == ["older"]
    assert [one.worker_id for one in started(placed(hive("h", *workers, free=0))).evict] == ["old", "older"][::-1]


@pytest.mark.parametrize(
    "values", [{"used": 1}, {"is_kept": True}, {"is_draining": True}, {"ready": False}], ids=str
)
def test_busy_kept_loading_and_leaving_workers_are_never_stopped(values: dict[str, Any]) -> None:
    assert isinstance(placed(hive("h", worker("a", model="n", **values), free=GIB)), Wait)


def test_worker_that_has_answered_nothing_yet_is_left_alone_for_its_time() -> None:
    fresh = {"has_answered": False, "model": "n"}

    young = placed(hive("h", worker("a", idle_s=GRACE_S - 1, **fresh), free=GIB))  # type: ignore[arg-type]
    old = placed(hive("h", worker("a", idle_s=GRACE_S, **fresh), free=GIB))  # type: ignore[arg-type]

    assert waited(young).why.endswith("(workers there: 1 just started)")
    assert not waited(young).needs_hive
    assert isinstance(old, Start)


def test_nothing_is_stopped_while_there_is_room_elsewhere() -> None:
    decision = started(placed(hive("h1", worker("a", model="n"), free=GIB), hive("h2", free=2 * GIB, models=())))

    assert (decision.hive_id, decision.evict) == ("h2", ())


def test_idle_worker_of_a_gpu_goes_before_a_processor_is_used() -> None:
    idle = worker("a", model="n", taken=20 * GIB, device="cuda:0")

    decision = started(placed(hive("h", idle, free=64 * GIB, gpus=(gpu(free=GIB),))))

    assert (decision.room, len(decision.evict)) == ("cuda:0", 1)


def test_processor_is_used_where_a_gpu_is_busy() -> None:
    busy = worker("a", model="n", used=1, taken=20 * GIB, device="cuda:0")

    assert started(placed(hive("h", busy, gpus=(gpu(free=GIB),)))).device == "cpu"


def test_slots_are_as_many_as_fit_once_the_others_have_gone() -> None:
    known: ModelInfo = model_info(size=GIB, slot=256 * MIB)

    decision = started(placed(hive("h", worker("a", model="n", taken=GIB), free=600 * MIB, models=(known,))))

    assert decision.slots == 2


# Waiting for memory


def test_job_that_has_waited_for_long_claims_what_busy_workers_hold() -> None:
    busy = hive("h", worker("a", model="n", used=1), worker("b", model="o", used=2), free=GIB)

    assert waited(placed(busy, waited_s=CLAIM_AFTER_S - 1)).claim is None
    assert waited(placed(busy, waited_s=CLAIM_AFTER_S)).claim == Claim("h", "cpu", ("a",))


def test_claimed_worker_and_device_are_given_to_nobody_else() -> None:
    claimed = Closed().and_by(Claim("h", "cpu", ("a",)))
    free = hive("h", worker("a"), models=(model_info(), SECOND))

    assert isinstance(placed(free), Use)
    assert waited(placed(free, closed=claimed)).why == "what becomes free on h is for a job that has waited longer"
    assert not waited(placed(free, closed=claimed)).needs_hive
    assert isinstance(placed(free, want=wanted("n"), closed=claimed), Wait)


def test_claimed_worker_is_not_stopped_for_another() -> None:
    claimed = Closed(worker_ids=frozenset({"a"}))

    assert isinstance(placed(hive("h", worker("a", model="n"), free=GIB), closed=claimed), Wait)


# No hive, and refusals


def test_no_hive_is_said_to_be_none() -> None:
    assert placed() == Wait("no hive has registered with this queen", needs_hive=True)


def test_stale_hive_is_waited_for_with_its_silence() -> None:
    decision = placed(hive("h1", worker(), live=False, silent_s=4.2))

    assert decision == Wait("h1 has been silent for 4 s", needs_hive=True)


def test_place_starts_on_another_hive_what_one_refuses() -> None:
    refusing = hive("h", refused={MODEL: NOW + 1})

    assert started(placed(refusing, hive("i", free=2 * GIB))).hive_id == "i"


def test_place_refuses_what_every_hive_refuses_until_its_time_is_over() -> None:
    assert placed(hive("h", refused={MODEL: NOW + 1})) == Refuse("h")
    assert isinstance(placed(hive("h", refused={MODEL: NOW})), Start)


def test_place_waits_for_a_hive_that_is_busy_rather_than_refuse() -> None:
    busy = hive("i", worker("a", model="n", used=1, taken=2 * GIB), free=0)

    assert waited(placed(hive("h", refused={MODEL: NOW + 7}), busy)).why == (
        "m failed to start on h too often, and is tried again in 7 s; "
        "i has 0 MiB of memory free, and m needs 1484 MiB (workers there: 1 answering)"
    )


def test_place_uses_a_ready_worker_of_a_model_that_is_not_started_again() -> None:
    assert isinstance(placed(hive("h", worker(), refused={MODEL: NOW + 1})), Use)


def test_job_can_go_only_where_another_hive_takes_it() -> None:
    alone = hive("h", worker())

    def can(*hives: HiveSpot) -> bool:
        return can_take(wanted(), fleet(*hives), NOW, without="h")

    assert not can(alone)
    assert not can(alone, hive("i", live=False))
    assert can(alone, hive("i"))
    assert can(alone, hive("i", worker(used=2)))
    assert not can(alone, hive("i", free=0))


def test_worker_that_is_asked_for_is_started_beside_others() -> None:
    assert started(placed(hive("h", worker()), want=wanted(is_another=True))).hive_id == "h"


def test_inventory_keeps_nothing_of_models_and_workers_that_are_gone() -> None:
    before = fleet(hive("h", worker("w")))

    after = before.with_hives([hive("h", models=())])

    assert set(before.serving) == {Kind(MODEL), Kind(MODEL, engine=ANY_ENGINE)}
    assert set(before.holders) == {MODEL}
    assert (after.serving, after.holders) == ({}, {})


def test_answer_that_was_begun_goes_to_a_worker_that_goes_on_with_it() -> None:
    """It waits for one that is full; where none goes on with it, the first one is asked, and says so."""
    anew, other = worker("a", has_prefill=False), worker("b", used=1)
    full = worker("b", used=2)

    def placed(*workers: WorkerSpot) -> Decision:
        return place(wanted(goes_on=True), fleet(hive("h", *workers)), NOW)

    assert isinstance(use := placed(anew, other), Use) and use.worker_id == "b"
    assert isinstance(placed(anew, full), Wait)
    assert isinstance(use := placed(anew), Use) and use.worker_id == "a"
    assert isinstance(use := place(wanted(), fleet(hive("h", anew, other)), NOW), Use) and use.worker_id == "a"
