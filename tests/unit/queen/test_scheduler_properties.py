"""What holds of placement whatever the hives are: searched for with made-up fleets, and queues in made-up time."""

from __future__ import annotations

from typing import Any

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st

from rbee.contracts.heartbeats import ModelInfo
from rbee.queen.decisions import NOTHING_CLOSED, Decision, Refuse, Start, Use, Wait, Wanted
from rbee.queen.eviction import fewest
from rbee.queen.inventory import HiveSpot, Inventory, Kind, StartSpot, WorkerSpot
from rbee.queen.look import Look
from rbee.queen.round import Round
from rbee.queen.scheduler import CLAIM_AFTER_S, place
from tests.unit.queen.fleet_stage import GIB, MIB, NOW, fleet, gpu, hive, model_info, start, worker

MODELS = ("m", "n", "o")
DEVICES = ("cpu", "cuda:0")


def mostly(usual: object, *others: object) -> st.SearchStrategy[Any]:
    """Draw one value in most cases, so that what depends on many of them comes about."""
    return st.sampled_from([usual] * 5 + list(others))


@st.composite
def workers(draw: st.DrawFn, worker_id: str) -> WorkerSpot:
    slots = draw(st.integers(1, 3))
    return worker(
        worker_id,
        model=draw(st.sampled_from(["m", "n", "n", "o", "o"])),
        ready=draw(mostly(True, False)),
        slots=slots,
        used=draw(st.sampled_from([0, 0, 0, 1, slots])),
        taken=draw(st.integers(0, 4)) * 512 * MIB,
        idle_s=draw(st.sampled_from([0.0, 20.0, 40.0, 90.0])),
        device=draw(st.sampled_from(DEVICES)),
        is_draining=draw(mostly(False, True)),
        has_answered=draw(mostly(True, False)),
        is_kept=draw(mostly(False, True)),
    )


@st.composite
def hives(draw: st.DrawFn, hive_id: str) -> HiveSpot:
    gpus = (gpu(free=draw(st.integers(0, 4)) * GIB, total=8 * GIB, is_usable=draw(mostly(True, False))),)
    infos = st.builds(model_info, st.sampled_from(MODELS), st.just(GIB), slot=st.sampled_from([None, 256 * MIB]))
    known = draw(st.lists(infos, max_size=3))
    starts = draw(mostly((), ("m",), ("n",)))
    return hive(
        hive_id,
        *[draw(workers(f"{hive_id}w{number}")) for number in range(draw(st.integers(0, 4)))],
        live=draw(mostly(True, False)),
        free=draw(st.integers(0, 3)) * GIB,
        total=8 * GIB,
        models=tuple({info.model: info for info in known}.values()),
        gpus=gpus if draw(st.booleans()) else (),
        starts=tuple(start(f"{hive_id}s", model=model) for model in starts),
        engines=draw(mostly(("llama_cpp",), ("vllm",))),
        workers_max=draw(mostly(None, 0, 1, 3)),
        refused=draw(mostly({}, {"m": NOW - 1}, {"m": NOW + 1})),
    )


inventories = st.integers(1, 3).flatmap(lambda count: st.tuples(*[hives(f"h{number}") for number in range(count)]))
wishes = st.builds(
    Wanted,
    mostly(Kind("m"), Kind("n"), Kind("o")),
    slots=st.integers(1, 4),
    device=mostly(None, "cpu", "cuda:0"),
    workers_max=mostly(None, 1, 2),
    hive_id=mostly(None, "h1"),
)
waits = st.sampled_from([0.0, 6.0, 60.0])


@given(inventories, wishes, waits)
def test_place_never_uses_a_full_unready_leaving_or_silent_worker_nor_one_of_another_kind(
    spots: tuple[HiveSpot, ...], wanted: Wanted, waited_s: float
) -> None:
    decision = place(wanted, fleet(*spots), NOW, waited_s=waited_s)

    if isinstance(decision, Use):
        spot = next(spot for spot in spots if spot.hive_id == decision.hive_id)
        used = next(one for one in spot.workers if one.worker_id == decision.worker_id)
        assert spot.live_until > NOW
        assert used.is_ready
        assert not used.is_draining
        assert used.slots_used < used.slots
        assert used.kind == wanted.kind
        assert wanted.hive_id in (None, spot.hive_id)


@given(inventories, wishes, waits)
def test_place_uses_the_least_busy_worker_exactly_when_one_has_a_free_slot(
    spots: tuple[HiveSpot, ...], wanted: Wanted, waited_s: float
) -> None:
    free = [
        one.slots_used
        for spot in spots
        for one in spot.workers
        if spot.live_until > NOW
        and wanted.hive_id in (None, spot.hive_id)
        and (one.kind, one.is_ready, one.is_draining) == (wanted.kind, True, False)
        and one.slots_used < one.slots
    ]

    decision = place(wanted, fleet(*spots), NOW, waited_s=waited_s)

    assert isinstance(decision, Use) == bool(free)
    if isinstance(decision, Use):
        assert fleet(*spots).worker(decision.hive_id, decision.worker_id).slots_used == min(free)


@given(inventories, wishes, waits)
def test_place_never_stops_a_busy_kept_loading_or_leaving_worker(
    spots: tuple[HiveSpot, ...], wanted: Wanted, waited_s: float
) -> None:
    decision = place(wanted, fleet(*spots), NOW, waited_s=waited_s)

    for one in decision.evict if isinstance(decision, Start) else ():
        assert not one.slots_used
        assert not one.is_kept
        assert one.is_ready
        assert not one.is_draining


@given(inventories, wishes, waits)
def test_place_never_starts_beyond_the_memory_or_the_workers_that_were_told(
    spots: tuple[HiveSpot, ...], wanted: Wanted, waited_s: float
) -> None:
    decision = place(wanted, fleet(*spots), NOW, waited_s=waited_s)

    if isinstance(decision, Start):
        spot = next(spot for spot in spots if spot.hive_id == decision.hive_id)
        [device] = [one for one in spot.devices if one.device == decision.room]
        assert spot.live_until > NOW
        assert wanted.device in (None, decision.room)
        assert wanted.kind.engine in spot.engines
        assert spot.refused.get(wanted.model, 0) <= NOW
        assert 1 <= decision.slots <= wanted.slots
        gone = {one.worker_id for one in decision.evict}
        left = [one for one in spot.workers if one.worker_id not in gone]
        assert spot.workers_max is None or len(left) + len(spot.starts) < spot.workers_max
        here = [one for one in spot.workers if one.device == decision.room]
        freed = sum(one.memory_bytes for one in here if one.worker_id in gone)
        loading = sum(one.memory_bytes for one in here if not one.is_ready)
        starts = sum(one.memory_bytes for one in spot.starts if one.device == decision.room)
        staying = sum(one.memory_bytes for one in here if one.worker_id not in gone)
        assert device.is_usable
        assert decision.memory_bytes <= device.memory_free_bytes - loading - starts + freed
        assert decision.memory_bytes <= device.memory_bytes - staying - starts


@given(inventories, wishes, waits)
def test_place_decides_the_same_for_the_same_inventory_however_it_came_about(
    spots: tuple[HiveSpot, ...], wanted: Wanted, waited_s: float
) -> None:
    built = Inventory()
    for spot in spots:  # each hive with nothing first, then as it is: one change after the other
        built = built.with_hives([msgspec.structs.replace(spot, workers=(), starts=(), models={})])
    for spot in spots:
        built = built.with_hives([spot])

    at_once = fleet(*spots)

    assert place(wanted, built, NOW, waited_s=waited_s) == place(wanted, at_once, NOW, waited_s=waited_s)
    assert (built.gpus, built.cpus, built.starts) == (at_once.gpus, at_once.cpus, at_once.starts)
    assert {kind: one for kind, one in built.serving.items() if one.free or one.full or one.loading} == {
        kind: one for kind, one in at_once.serving.items() if one.free or one.full or one.loading
    }


@given(inventories, wishes, waits)
def test_wait_says_of_each_hive_why(spots: tuple[HiveSpot, ...], wanted: Wanted, waited_s: float) -> None:
    decision = place(wanted, fleet(*spots), NOW, waited_s=waited_s)

    if isinstance(decision, Wait):
        meant = [spot for spot in spots if wanted.hive_id in (None, spot.hive_id)]
        if not meant:
            assert decision.why == "no hive has registered with this queen"
        elif "loading" not in decision.why and "started" not in decision.why and "taken" not in decision.why:
            assert all(spot.hive_id in decision.why for spot in meant)
        for spot in meant:
            if f"{spot.hive_id} has been silent" in decision.why:
                assert spot.live_until <= NOW
            if f"{spot.hive_id} does not have the engine" in decision.why:
                assert wanted.kind.engine not in spot.engines
            if f"{spot.hive_id} runs" in decision.why:
                assert spot.places_left <= 0


@given(inventories, wishes, waits)
def test_place_never_waits_where_something_fits_once_idle_workers_have_gone(
    spots: tuple[HiveSpot, ...], wanted: Wanted, waited_s: float
) -> None:
    """The proof is by trying: without the idle workers, it would be started."""
    inventory = fleet(*spots)
    decision = place(wanted, inventory, NOW, waited_s=waited_s)
    is_there = any(
        one.kind == wanted.kind and not one.is_draining for spot in spots for one in (*spot.workers,)
    ) or any(one.kind == wanted.kind for spot in spots for one in spot.starts)
    if isinstance(decision, Wait) and not is_there:
        look = Look(wanted, inventory, NOW, NOTHING_CLOSED, None)
        emptied = [_without_idle(spot) for spot in spots]
        for spot in emptied:
            for device in spot.devices:
                there = [one.memory_bytes for one in spot.workers if one.device == device.device]
                starts = sum(one.memory_bytes for one in spot.starts if one.device == device.device)
                free = device.memory_free_bytes - _loading(spot, device.device) - starts
                fits = min(free, device.memory_bytes - sum(there) - starts) >= look.need.least_bytes
                allowed = (
                    spot.live_until > NOW
                    and device.is_usable
                    and wanted.device in (None, device.device)
                    and wanted.hive_id in (None, spot.hive_id)
                    and wanted.kind.engine in spot.engines
                    and spot.refused.get(wanted.model, 0) <= NOW
                    and spot.places_left > 0
                )
                assert not (fits and allowed)


def _loading(spot: HiveSpot, device: str) -> int:
    return sum(one.memory_bytes for one in spot.workers if not one.is_ready and one.device == device)


def _without_idle(spot: HiveSpot) -> HiveSpot:
    """Return the hive as it is when all have gone that may."""
    going = [one for one in spot.workers if one.may_go(NOW)]
    devices = tuple(
        msgspec.structs.replace(
            device,
            memory_free_bytes=device.memory_free_bytes
            + sum(one.memory_bytes for one in going if one.device == device.device),
        )
        for device in spot.devices
    )
    staying = tuple(one for one in spot.workers if one not in going)
    return msgspec.structs.replace(spot, workers=staying, devices=devices)


@given(st.lists(st.integers(0, 5), max_size=6), st.integers(-2, 12), st.integers(-1, 4))
def test_fewest_are_enough_and_one_fewer_never_is(sizes: list[int], missing: int, places: int) -> None:
    idle = [worker(f"w{number}", taken=size) for number, size in enumerate(sizes)]

    chosen = fewest(idle, "cpu", missing_bytes=missing, missing_places=places)

    if chosen is None:
        assert sum(sizes) < missing or len(sizes) < places
        return
    assert sum(one.memory_bytes for one in chosen) >= missing
    assert len(chosen) >= places
    largest = sorted(sizes, reverse=True)[: max(0, len(chosen) - 1)]
    assert not chosen or sum(largest) < missing or len(largest) < places
    assert list(chosen) == [one for one in idle if one in chosen]


# A queue in made-up time

STEP_S = 1.0
LOAD_STEPS = 2
ANSWER_STEPS = 3
HIVE_FREE = 3 * GIB


class Job:
    """One job of the made-up queue."""

    def __init__(self, number: int, model: str, came_at: float) -> None:
        self.number = number
        self.wanted = Wanted(Kind(model), slots=1)
        self.came_at = came_at
        self.placed_at: float | None = None


class World:
    """A hive with room for one model at a time, and the jobs that come to it: a pump and nothing else."""

    def __init__(self) -> None:
        self.now = NOW
        self.loaded: WorkerSpot | None = None
        self.starting: tuple[StartSpot, int] | None = None
        self.answers: list[tuple[int, Job]] = []
        self.waiting: list[Job] = []
        self.evicted: list[bool] = []
        self.placed = 0

    def step(self) -> None:
        """Let a second pass."""
        self.now += STEP_S
        self.answers = [(left - 1, job) for left, job in self.answers]
        ended = [job for left, job in self.answers if left <= 0]
        self.answers = [entry for entry in self.answers if entry[0] > 0]
        if ended and self.loaded is not None:
            self._change(slots_used=len(self.answers), has_answered=True, idle_since=self.now)
        if self.starting is not None:
            spot, left = self.starting
            self.starting = (spot, left - 1) if left > 1 else None
            if left <= 1:
                self.loaded = worker(spot.worker_id, model=spot.kind.model, slots=1, taken=2 * GIB, idle_s=0)
                self._change(idle_since=self.now, has_answered=False)
        self.pump()

    def _change(self, **values: Any) -> None:
        assert self.loaded is not None
        self.loaded = msgspec.structs.replace(self.loaded, **values)

    def _inventory(self) -> Inventory:
        there = () if self.loaded is None else (self.loaded,)
        starts = () if self.starting is None else (self.starting[0],)
        memory = HIVE_FREE - sum(one.memory_bytes for one in there)
        spot = hive("h", *there, free=memory, total=HIVE_FREE, starts=starts, models=_known())
        return fleet(msgspec.structs.replace(spot, heard_at=self.now, live_until=self.now + 1))

    def pump(self) -> None:
        """Give what there is to those who wait, in their turn."""
        looking = Round(self.now)
        for job in list(self.waiting):
            self._follow(job, looking.decide(job.wanted, self.now - job.came_at, self._inventory()))

    def _follow(self, job: Job, decision: Decision) -> None:
        assert not isinstance(decision, Refuse)
        if isinstance(decision, Use):
            assert self.loaded is not None
            self._change(slots_used=self.loaded.slots_used + 1)
            self.answers.append((ANSWER_STEPS, job))
            job.placed_at = self.now
            self.waiting.remove(job)
            self.placed += 1
        elif isinstance(decision, Start):
            if decision.evict:
                assert self.loaded is not None
                self.evicted.append(self.loaded.has_answered)
                self.loaded = None
            name = f"w{self.now}"
            spot = StartSpot(worker_id=name, kind=job.wanted.kind, device="cpu", memory_bytes=2 * GIB)
            self.starting = (spot, LOAD_STEPS)


def _known() -> tuple[ModelInfo, ...]:
    return tuple(model_info(model, 2 * GIB, slot=0) for model in MODELS)


@settings(max_examples=40)
@given(
    st.lists(st.tuples(st.integers(0, 60), st.sampled_from(MODELS)), min_size=1, max_size=25),
    st.sampled_from(MODELS),
)
def test_nobody_starves_where_models_do_not_fit_together_and_one_is_asked_for_without_end(
    arrivals: list[tuple[int, str]], hot: str
) -> None:
    """Each job is placed within the time that those before it take, though the hot model's jobs never cease."""
    world = World()
    jobs = [Job(number, model, NOW + at) for number, (at, model) in enumerate(sorted(arrivals))]
    turns = CLAIM_AFTER_S + LOAD_STEPS + 2 * ANSWER_STEPS + 3
    for second in range(61 + int(turns * (len(jobs) + 1))):
        world.waiting += [job for job in jobs if job.came_at == NOW + second]
        if not any(job.wanted.model == hot for job in world.waiting):
            world.waiting.append(Job(10_000 + second, hot, world.now))
        world.waiting.sort(key=lambda job: (job.came_at, job.number))
        world.step()

    assert all(job.placed_at is not None for job in jobs)
    assert all(world.evicted), "a worker was stopped before it had answered anything"


def test_two_models_that_do_not_fit_together_are_not_swapped_more_often_than_jobs_are_answered() -> None:
    world = World()
    number = 0
    for _ in range(600):
        for model in ("m", "n"):
            if not any(job.wanted.model == model for job in world.waiting):
                number += 1
                world.waiting.append(Job(number, model, world.now))
        world.step()

    assert world.placed > len(world.evicted) > 10
