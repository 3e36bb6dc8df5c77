from __future__ import annotations

from rbee.queen.decisions import Start, Use, Wait
from rbee.queen.round import Round
from rbee.queen.scheduler import CLAIM_AFTER_S
from tests.unit.queen.fleet_stage import GIB, NOW, fleet, hive, model_info, wanted, worker

LONG = CLAIM_AFTER_S


def test_worker_that_a_job_has_waited_for_long_is_not_given_to_those_behind_it() -> None:
    inventory = fleet(hive("h", worker("a", model="n", used=1, taken=2 * GIB), free=GIB))
    looking = Round(NOW)

    first = looking.decide(wanted("m"), LONG, inventory)
    behind = looking.decide(wanted("n"), 0.0, inventory)

    assert isinstance(first, Wait)
    assert first.claim is not None
    assert isinstance(behind, Wait)
    assert isinstance(Round(NOW).decide(wanted("n"), 0.0, inventory), Use)


def test_those_behind_may_pass_until_a_job_has_waited_for_long() -> None:
    inventory = fleet(hive("h", worker("a", model="n", used=1, taken=2 * GIB), free=GIB))
    looking = Round(NOW)

    assert isinstance(looking.decide(wanted("m"), LONG - 0.1, inventory), Wait)
    assert isinstance(looking.decide(wanted("n"), 0.0, inventory), Use)


def test_small_model_is_not_started_in_what_a_large_one_waits_for() -> None:
    models = (model_info("m", 4 * GIB), model_info("o", GIB // 4))
    inventory = fleet(hive("h", worker("a", model="n", used=1, taken=4 * GIB), free=2 * GIB, models=models))
    looking = Round(NOW)

    looking.decide(wanted("m"), LONG, inventory)

    assert isinstance(looking.decide(wanted("o"), 0.0, inventory), Wait)
    assert isinstance(Round(NOW).decide(wanted("o"), 0.0, inventory), Start)


def test_many_jobs_for_one_model_claim_no_more_than_one_does() -> None:
    busy = [
        hive(f"h{number}", worker(f"w{number}", model="n", used=1, taken=4 * GIB), free=0) for number in range(3)
    ]
    inventory = fleet(*busy)
    looking = Round(NOW)

    claims = {
        wait.claim
        for wait in (looking.decide(wanted("m"), LONG, inventory) for _ in range(5))
        if isinstance(wait, Wait)
    }

    assert len(claims) == 1
    assert isinstance(looking.decide(wanted("n"), 0.0, inventory), Use)
